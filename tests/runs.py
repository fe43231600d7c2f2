"""Tiny runs for tests: a recipe, data, and the train verb in this process or in one of its own."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

from lmboost import train
from lmboost.config import load
from lmboost.data.prepare import prepare

ROOT = pathlib.Path(__file__).parent.parent
RECIPE = """
from lmboost import config
from lmboost.models.transformer import ModelConfig

def get_config(variant=""):
    c = config.base()
    c.steps, c.batch_size, c.seq_len = 8, 8, 32
    c.model = config.model(ModelConfig(
        vocab_size=320, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64,
        max_seq_len=32, dtype="float32"))
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-2, 2
    c.checkpoint.every, c.eval.every, c.eval.batches, c.log.every = 2, 4, 2, 1
    if variant == "helped":
        c.objective.kd.weight, c.objective.kd.stop = 0.5, 0.5
        c.objective.align.weight, c.objective.align.stop = 0.5, 0.5
        c.objective.select.candidates, c.objective.select.stop = 2, 0.25
    return c
"""


def write_recipe(directory: pathlib.Path) -> str:
    path = directory / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


def write_data(directory: pathlib.Path, seed: int = 0, tokenizer: str = "train:320") -> str:
    """A prepared set of nonsense sentences with some structure to learn."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    source = directory / f"text{seed}"
    source.mkdir()
    for i in range(60):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(20, 200)))
        (source / f"{i}.txt").write_text(f"{i} {text}")
    out = directory / f"data{seed}"
    prepare(
        str(out), [f"{source}/*.txt"], tokenizer, validation_fraction=0.2, record_tokens=128, shards=1,
        report=lambda *_: None,
    )  # fmt: skip
    return str(out)


def run(recipe: str, workdir, *overrides: str):
    """The train verb in this process; returns the last state."""
    return train.train(*load([f"--config={recipe}", f"--workdir={workdir}", *overrides]))


def command(recipe: str, workdir, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "lmboost.train", f"--config={recipe}", f"--workdir={workdir}", *overrides]


def environment(devices: int = 8) -> dict[str, str]:
    """That of a process with so many simulated devices, which finds this project."""
    count = "--xla_force_host_platform_device_count"
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(count)]
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join([*flags, f"{count}={devices}"])}


def launch(
    processes: int,
    devices: int,
    recipe: str,
    workdir,
    *overrides: str,
    record: pathlib.Path | None = None,
    own: tuple[str, ...] = (),
) -> subprocess.Popen:
    """launch/local.py in a process group of its own: the train verb in `processes` processes of so many devices.

    record: where the batches that the devices are given are written down (tests/record.py). own: launcher's flags.
    """  # fmt: skip
    flags = [f"--processes={processes}", f"--devices={devices}", *own, *(["--module=tests.record"] if record else [])]
    return subprocess.Popen(
        [sys.executable, "launch/local.py", *flags, *command(recipe, workdir, *overrides)[3:]],
        env=environment(devices) | {"RECORD": str(record)}, cwd=ROOT,
        text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start(recipe: str, workdir, *overrides: str, file_limit_kb: int = 0) -> subprocess.Popen:
    """The train verb in a process of its own, in its own process group; no file may grow beyond the limit."""
    own = {}
    if file_limit_kb:  # is not for the cache of compiled programs, which is read only
        own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1000000"
    limit = ["bash", "-c", f'ulimit -f {file_limit_kb}; exec "$@"', "--"] if file_limit_kb else []
    return subprocess.Popen(
        [*limit, *command(recipe, workdir, *overrides)], env=environment() | own, cwd=ROOT,
        text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What a process has said, which ends with this status."""
    output, _ = process.communicate(timeout=1500)  # on a busy machine
    assert process.returncode == status, output
    return output


def wait_for_step(process: subprocess.Popen, workdir, step: int) -> None:
    """Until metrics.jsonl has the line of a step."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        path = pathlib.Path(workdir) / "metrics.jsonl"
        if path.exists() and re.search(rf'^{{"step": {step},', path.read_text(), re.M):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"no step {step}")


def kill_children(process: subprocess.Popen, number: int = signal.SIGKILL, which: slice = slice(None)) -> None:
    """A signal to the training processes of a launcher, in the order in which they were started."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in sorted(map(int, children))[which]:
        os.kill(child, number)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
