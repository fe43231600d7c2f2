"""Metrics and FLOPs: files survive kills and resumes, JSON is strict, FLOPs are those of the traced matmuls."""

import dataclasses
import glob
import io
import math
import os
import struct
import subprocess
import sys
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from lmboost import flops
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.objective import terms
from lmboost.objective.align import Alignment
from lmboost.objective.kd import Distillation
from lmboost.objective.select import Selection
from lmboost.objective.terms import Objective
from lmboost.run import metrics
from lmboost.run.progress import Progress, short
from tests.compare import lines

CONFIG = ModelConfig(
    vocab_size=50, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, attention="xla"
)


def write(workdir, steps, resume_step=0, **kwargs):
    with closing(metrics.Writers(str(workdir), resume_step=resume_step)) as writers:
        for s in steps:
            writers.write(s, {"loss": s / 3} | kwargs)


def test_mean_divides_once_and_knows_nothing_counted():
    sums = {"loss": (np.float32(6.0), 4), "kd": (jnp.zeros(()), jnp.zeros(())), "big": (2**24 + 2, 1)}
    assert metrics.mean(sums) == {"loss": 1.5, "kd": None, "big": 2**24 + 2}


def test_a_line_per_step_strict_json_and_written_at_once(tmp_path):
    writers = metrics.Writers(str(tmp_path))
    values = {
        "loss": jnp.float32(2.5),
        "kd": None,
        "ce": float("nan"),
        "mfu": np.float32("inf"),
        "tokens": np.int64(2**40),
    }
    writers.write(7, values | {"note": "as it is", "nested": {"x": float("-inf")}})
    expected = {"step": 7, "loss": 2.5, "kd": None, "ce": None, "mfu": None, "tokens": 2**40}
    assert lines(tmp_path) == [expected | {"note": "as it is", "nested": {"x": None}}], "before it is closed"
    writers.close()


@settings(max_examples=40, deadline=None)
@given(every=st.integers(1, 4), killed=st.integers(1, 30), cut=st.integers(0, 40), back=st.integers(0, 10))
def test_a_killed_and_resumed_run_writes_what_an_unbroken_one_does(tmp_path_factory, every, killed, cut, back):
    """Killed after `killed` steps, `cut` bytes of the last line lost, resumed `back` steps earlier."""
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    steps = [s for s in range(1, 31) if s % every == 0]
    resume = max(killed - back - 1, 0)  # a checkpoint lies before the line that was lost
    write(whole, steps)
    write(broken, [s for s in steps if s <= killed])
    file = broken / metrics.FILE
    content = file.read_bytes()
    last = len(content) - (content[:-1].rfind(b"\n") + 1)
    if content and killed % every == 0:
        file.write_bytes(content[: len(content) - min(cut, last)])
    write(broken, [s for s in steps if s > resume], resume_step=resume)
    assert lines(broken) == lines(whole)
    assert os.listdir(broken) == [metrics.FILE], "no temporary file is left"


def test_a_fresh_start_drops_the_lines_of_an_earlier_one(tmp_path):
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [0, 1])
    assert [line["step"] for line in lines(tmp_path)] == [0, 1]


def test_what_is_not_a_metrics_file_is_left_alone_and_named(tmp_path):
    write(tmp_path, [1, 2, 3])
    file = tmp_path / metrics.FILE
    damaged = file.read_text().replace('{"step": 2', '{"stp": 2')
    file.write_text(damaged)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2, is not a JSON object with a step .*: mend or remove"):
        write(tmp_path, [4], resume_step=3)
    assert file.read_text() == damaged


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir=.*file/run: .* cannot be written \(Not a directory\)"):
        metrics.Writers(str(tmp_path / "file" / "run"))


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path / "run", [1])
    console = rich.console.Console(file=io.StringIO())
    Progress(10, console=console).update(10, {"loss": 1.0})
    assert not (tmp_path / "run").exists() and not console.file.getvalue()


def tensorboard_events(workdir):
    """The events of a run's files, oldest file first; a record is length, checksum, bytes, checksum."""
    for path in sorted(glob.glob(os.path.join(workdir, "tensorboard", "*"))):
        with open(path, "rb") as file:
            while head := file.read(12):
                yield Event.FromString(file.read(struct.unpack("<Q", head[:8])[0]))
                file.read(4)


def test_tensorboard_holds_the_numbers_and_a_resume_purges_later_ones(tmp_path):
    with closing(metrics.Writers(str(tmp_path), trackers=["tensorboard"])) as writers:
        for s in (1, 2, 3):
            writers.write(s, {"loss": s / 2, "kd": None})
    with closing(metrics.Writers(str(tmp_path), 2, ["tensorboard"])) as writers:
        writers.write(3, {"loss": 9.0})
    events = list(tensorboard_events(tmp_path))
    found = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert found == [(1, "loss", 0.5), (2, "loss", 1.0), (3, "loss", 1.5), (3, "loss", 9.0)]
    starts = [e.step for e in events if e.HasField("session_log") and e.session_log.status]
    assert starts[-1] == 3, "TensorBoard hides what earlier files hold from this step on"


FULL = """
import errno, json, os, sys
from lmboost.run import metrics
directory, filler = sys.argv[1] + "/run", sys.argv[1] + "/filler"
writers = metrics.Writers(directory, trackers=["tensorboard"])
for s in range(1, 11):
    writers.write(s, {"loss": s / 3})
with open(filler, "wb", buffering=0) as file:
    for size in (65536, 1):  # to the last byte
        try:
            while True:
                file.write(b"x" * size)
        except OSError as error:
            assert error.errno == errno.ENOSPC
for s in range(11, 3001):
    writers.write(s, {"loss": s / 3, "note": "x" * 20})
during = [line["step"] for line in metrics.read(directory)]
assert during == list(range(1, during[-1] + 1)) and 10 <= during[-1] < 3000, during[-1]
os.remove(filler)
if len(sys.argv) > 2:
    writers.write(3001, {"loss": 1.0})
writers.close()
for root, _, names in os.walk(directory):
    for name in names:
        target = os.path.join(os.environ["OUT"], os.path.relpath(os.path.join(root, name), directory))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(os.path.join(root, name), "rb") as file, open(target, "wb") as out:
            out.write(file.read())
"""


@pytest.mark.parametrize("more", [[], ["more"]], ids=["room at the end", "room before"])
def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path, more):
    """On a file system of one megabyte. Everything is there in order once there is room again."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode:
        pytest.skip("mounting a file system of one's own is not permitted here")
    (disk := tmp_path / "disk").mkdir()
    mounted = f'mount -t tmpfs -o size=1m tmpfs {disk} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted, "--", sys.executable, "-c", FULL, str(disk), *more],
        env=os.environ | {"OUT": str(tmp_path / "out")}, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = list(range(1, 3001 + bool(more)))
    assert [line["step"] for line in lines(tmp_path / "out")] == steps
    assert [e.step for e in tensorboard_events(tmp_path / "out") if e.summary.value] == steps
    assert done.stderr.count("cannot be written (No space left on device). The run goes on") == 2, "once a file"
    assert done.stderr.count("can be written again") == 2, done.stderr


def printed(is_terminal=False):
    return rich.console.Console(file=io.StringIO(), force_terminal=is_terminal, width=160, highlight=False)


def test_off_a_terminal_a_plain_line_every_ten_seconds_and_at_evaluations():
    now, console = [0.0], printed()
    with closing(Progress(100, console=console, clock=lambda: now[0])) as progress:
        for s in range(1, 101):
            now[0] = 2.0 * s
            progress.update(s, {"loss": 3.14159, "kd": None, "tokens_per_second": 1234567.0, "mfu": 0.4217})
            if s == 50:
                progress.evaluation(s, {"val_loss": 3.2, "val_perplexity": 24.53})
    out = console.file.getvalue()
    assert "\r" not in out and "\x1b" not in out
    shown = out.splitlines()
    trained = [int(line.split()[1].split("/")[0]) for line in shown if " loss" in line]
    assert trained == [*range(1, 100, 5), 100], "the first, then every 10 seconds, and the last"
    assert shown[1] == "step 6/100  loss 3.142  1.23M tokens/s  MFU 42.2%  eta 0:03:08"
    assert "step 50/100  val_loss 3.2000  val_perplexity 24.530" in shown


def test_the_estimate_counts_from_where_the_run_goes_on_and_leaves_out_compilation():
    now, console = [0.0], printed()
    progress = Progress(1000, start_step=900, console=console, clock=lambda: now[0])
    for s, t in ((901, 300.0), (911, 320.0)):
        now[0] = t
        progress.update(s, {"loss": 1.0})
    assert console.file.getvalue().splitlines()[-1].endswith("eta 0:02:58")


def test_on_a_terminal_a_bar():
    console = printed(is_terminal=True)
    with closing(Progress(10, console=console)) as progress:
        progress.update(4, {"loss": 2.5})
        progress.evaluation(4, {"val_loss": 2.25})
    out = console.file.getvalue()
    assert (
        "4/10" in out.replace("\x1b[1m", "").replace("\x1b[0m", "") and "loss 2.500" in out and "val_loss 2.2500" in out
    )


@pytest.mark.parametrize("value, text", [(0.5, "0.5"), (999.7, "1k"), (1234, "1.23k"), (1.5e6, "1.5M"), (2e13, "20T")])
def test_short_numbers(value, text):
    assert short(value) == text


def dot_flops(jaxpr) -> int:
    """Twice the multiplications of all matmuls in a jaxpr, those of a scan once per turn."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            total += turns * dot_flops(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu", "num_kv_heads": 4, "tie_embeddings": True, "vocab_size": 97}])
def test_forward_flops_are_those_of_the_traced_matmuls(changes):
    config, T = dataclasses.replace(CONFIG, **changes), 32
    params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    ids = jnp.zeros((1, T), jnp.int32)

    def forward(p):
        h, _ = transformer.apply(config, p, ids, ids, ids)
        return h @ transformer.head(p)

    traced = dot_flops(jax.make_jaxpr(forward)(params).jaxpr)
    # The plain attention computes all T positions of a row, of which causality needs half.
    masked = config.num_layers * 2 * config.num_heads * config.head_dim * T
    assert traced / T == flops.forward_flops(config, T) + masked


def test_padded_vocabulary_rows_are_not_counted():
    padded = dataclasses.replace(CONFIG, vocab_multiple=128)
    assert flops.forward_flops(padded, 8) == flops.forward_flops(CONFIG, 8)


def test_a_step_costs_its_parts():
    teacher = dataclasses.replace(CONFIG, num_layers=2, d_model=8)
    plain = flops.step_flops(CONFIG, 4, 32)
    assert plain == 3 * flops.forward_flops(CONFIG, 32) * 4 * 32
    full = flops.forward_flops(teacher, 32) * 4 * 32
    objective = Objective(Distillation(), Alignment(((1, 1), (2, 2))), Selection(4, 0.25), weights={})

    def cost(*helps, objective=objective):
        models = {"teacher": teacher, "scorer": teacher}
        return flops.step_flops(CONFIG, 4, 32, terms.forwards(objective, frozenset(helps), models))

    assert cost() == plain, "a teacher that nobody asks costs nothing"
    assert cost("kd", "align") == cost("kd") == plain + full
    early = cost("align", objective=dataclasses.replace(objective, align=Alignment(((1, 1),))))
    last = cost("align")
    assert last + 2 * 8 * 50 * 4 * 32 == plain + full and (last - plain) == 2 * (early - plain)
    assert cost("select") == plain + 4 * full and cost("select", "kd") == plain + 5 * full


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12), ("TPU7x", 1153.5e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("cpu", None), ("NVIDIA T4", None),
    ],
)  # fmt: skip
def test_peaks_by_device_kind(kind, peak):
    assert flops.peak_flops(kind) == peak
    assert flops.mfu(1e12, kind, 4) == (None if peak is None else 1e12 / peak / 4)
