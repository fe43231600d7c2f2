"""The loop: what it writes, how it goes on, what it refuses."""

import json
import os
import pathlib
import random
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import checkpoint, evaluate, train
from lmboost.errors import UserError
from lmboost.run import checkpointer, log
from tests import runs
from tests.compare import assert_same, content, lines


@pytest.fixture(scope="module")
def plain(home, recipe, data):
    """(workdir, last state) of an uninterrupted plain run."""
    return home / "plain", runs.run(recipe, home / "plain", data)


@pytest.fixture(scope="module")
def helped(home, recipe, data, teacher):
    """(workdir, last state) of an uninterrupted run with every help."""
    return home / "helped", runs.run(f"{recipe}:helped", home / "helped", data, teacher)


def restored(workdir, like):
    directory = checkpoint.find(str(workdir))
    return checkpointer.restore_state(directory, like, jax.tree.map(lambda x: x.sharding, like))[0]


def test_a_run_writes_its_numbers_and_a_manifest(helped):
    workdir, _ = helped
    training = [line for line in lines(workdir) if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    for line in training:
        assert set(log.FIELDS) <= set(line) and line["mfu"] is None
        assert line["tokens"] == line["step"] * 8 * 32
    assert [line["kept_fraction"] for line in training] == [0.5, 0.5] + [None] * 6
    assert [line["align"] is None for line in training] == [False] * 4 + [True] * 4
    assert [line["kd"] is None for line in training] == [False] * 4 + [True] * 4
    assert all(b["flops"] > a["flops"] for a, b in zip(training, training[1:], strict=False))
    validation = [line for line in lines(workdir) if "val_loss" in line]
    assert [line["step"] for line in validation] == [4, 8]
    assert validation[-1]["val_perplexity"] == pytest.approx(np.exp(validation[-1]["val_loss"]))
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["config"]["steps"] == 8 and manifest["versions"]["jax"] == jax.__version__
    assert len(manifest["teacher"]["fingerprint"]) == len(manifest["data"]["tokenizer"]) == 64
    assert list((workdir / "tensorboard").iterdir())


def test_the_loss_falls(plain):
    losses = [line["loss"] for line in lines(plain[0]) if "loss" in line]
    assert losses[-1] < losses[0] - 0.3


def test_the_teacher_is_unchanged_and_in_no_checkpoint(teacher, helped):
    workdir, state = helped
    helper = pathlib.Path(teacher.partition("=")[2])
    fingerprint = json.loads((workdir / "manifest.json").read_text())["teacher"]["fingerprint"]
    before = content(helper / "checkpoints")
    params = checkpoint.Saved.find(str(helper)).load(_mesh(), "bfloat16")
    assert checkpoint.fingerprint(params) == fingerprint and content(helper / "checkpoints") == before
    expected = sum(x.size for x in jax.tree.leaves(state))
    for step in (workdir / "checkpoints").iterdir():
        found = [checkpoint.tree_metadata(step, part) for part in ("params", "training")]
        assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(found)) == expected


def _mesh():
    from lmboost import sharding

    return sharding.make_mesh()


def test_the_teacher_is_freed_at_the_hand_over_and_nothing_is_compiled_twice(home, recipe, data, teacher, monkeypatch):
    seen, steps, compiled = {}, [], train.jit_train_step

    def spy(program, tx, learning_rate, state):
        seen[program.helps] = sum(x.dtype == jnp.bfloat16 for x in jax.live_arrays())
        steps.append(compiled(program, tx, learning_rate, state))
        return steps[-1]

    monkeypatch.setattr(train, "jit_train_step", spy)
    runs.run(f"{recipe}:helped", home / "freed", data, teacher)
    assert seen[frozenset({"kd", "align"})] > 0 and seen[frozenset()] == 0
    assert [step._cache_size() for step in steps] == [1, 1, 1]


def test_without_weight_it_is_bitwise_the_plain_run(home, recipe, data, teacher, plain):
    off = (
        "--config.objective.kd.weight=0",
        "--config.objective.align.weight=0",
        "--config.objective.select.candidates=1",
    )
    state = runs.run(f"{recipe}:helped", home / "off", data, teacher, *off)
    assert_same(state, plain[1])


def test_a_finished_run_is_left_alone(plain, recipe, data, capsys):
    before = content(plain[0])
    assert_same(runs.run(recipe, plain[0], data), plain[1])
    assert "is finished" in capsys.readouterr().out and content(plain[0]) == before


def test_a_run_that_was_written_under_older_names_is_the_same(home, plain, recipe, data, capsys):
    shutil.copytree(plain[0], home / "older")
    manifest = json.loads((plain[0] / "manifest.json").read_text())
    for name in ("teacher", "init", "resume"):
        manifest["config"][name]["from"] = manifest["config"][name].pop("path")
    (home / "older" / "manifest.json").write_text(json.dumps(manifest))
    runs.run(recipe, home / "older", data)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run of another config:\n  init.path: '' -> 'x'"):
        runs.run(recipe, home / "older", data, "--config.init.from=x")


@pytest.mark.parametrize("stop", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_it_goes_on_bitwise_from_where_it_stopped(stop, tmp_path, recipe, data, teacher, helped, monkeypatch):
    """Steps after the last checkpoint are done again. Stopped while the teacher helps, and after it."""
    profile = log.RunLog.profile

    def stopping(log, step):
        if step == stop:
            raise KeyboardInterrupt
        profile(log, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(log.RunLog, "profile", stopping)
        runs.run(f"{recipe}:helped", tmp_path, data, teacher)
    state = runs.run(f"{recipe}:helped", tmp_path, data, teacher)
    assert_same(state, helped[1])
    assert_same(restored(tmp_path, state), helped[1])
    times = {"tokens_per_second", "goodput"}
    numbers = [{k: v for k, v in line.items() if k not in times} for line in lines(tmp_path)]
    expected = [{k: v for k, v in line.items() if k not in times} for line in lines(helped[0])]
    assert [x for x in numbers if "loss" in x] == [x for x in expected if "loss" in x]


def kill_and_restart(kills, seconds, tmp_path, recipe, data, teacher, expected):
    draw, arguments = (
        random.Random(0),
        (f"{recipe}:helped", tmp_path / "run", data, teacher, "--config.checkpoint.every=1"),
    )
    for _ in range(kills):
        process = runs.start(*arguments)
        time.sleep(draw.uniform(*seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = runs.start(*arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_same(restored(tmp_path / "run", expected), expected)


@pytest.mark.slow
def test_ten_kills_leave_no_trace(tmp_path, recipe, data, teacher, helped):
    kill_and_restart(10, (4.0, 16.0), tmp_path, recipe, data, teacher, helped[1])


@pytest.mark.slow
def test_init_from_takes_parameters_and_resume_from_takes_all(home, recipe, data, plain, capsys):
    workdir, state = plain
    runs.run(recipe, home / "init", data, f"--config.init.path={workdir}", "--config.seed=7")
    assert f"start: init.path {workdir}" in capsys.readouterr().out
    assert lines(home / "init")[0]["loss"] < lines(workdir)[0]["loss"] - 0.3
    again = runs.run(recipe, home / "resumed", data, f"--config.resume.path={workdir}/checkpoints/6")
    assert_same(again, state)
    assert [line["step"] for line in lines(home / "resumed") if "loss" in line] == list(range(1, 9))
    with pytest.raises(UserError, match="data position"):
        runs.run(recipe, home / "other", data, f"--config.resume.path={workdir}/checkpoints/6", "--config.seed=3")


def test_evaluate_gives_the_number_of_the_run(plain):
    workdir, _ = plain
    last = [line for line in lines(workdir) if "val_loss" in line][-1]
    found = evaluate.evaluate(str(workdir), batches=2, batch_size=8)
    assert found == pytest.approx({k: last[k] for k in found}, rel=1e-5)


def test_steps_that_are_not_finite_end_the_run(tmp_path, recipe, data):
    wild = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0", "--config.max_nonfinite=3")
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row \(max_nonfinite=3\)"):
        runs.run(recipe, tmp_path, data, *wild)


def test_a_run_that_ends_without_finite_losses_is_no_success(tmp_path, recipe, data, capsys):
    wild = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0")
    for _ in range(2):  # the second one finds it finished
        with pytest.raises(UserError, match=r"the last \d of 8 steps had no finite loss or gradient and were skipped"):
            runs.run(recipe, tmp_path, data, *wild)
    said = capsys.readouterr()
    assert "WARNING: step" in said.err and "steps so far had no finite loss or gradient" in said.err
    assert "  skipped " in said.out and (tmp_path / "checkpoints" / "8").exists()


def test_so_is_one_whose_last_step_lost_the_model(tmp_path, recipe, data):
    wild = ("--config.optimizer.learning_rate=1e39", "--config.optimizer.warmup_steps=0", "--config.steps=1")
    for _ in range(2):
        with pytest.raises(UserError, match="the model at the end of the run has values that are not finite"):
            runs.run(recipe, tmp_path, data, *wild, "--config.optimizer.schedule=constant")


def test_sixteen_bits_and_a_tied_head_on_cpus(tmp_path, recipe, data):
    bits = ("--config.model.dtype=bfloat16", "--config.model.tie_embeddings=true", "--config.steps=2")
    state = runs.run(recipe, tmp_path, data, *bits)
    assert int(state.step) == 2 and not int(state.skipped)


@pytest.mark.slow
def test_a_full_disk_names_itself_and_spares_the_checkpoint_before(tmp_path, recipe, data):
    assert runs.run(recipe, tmp_path, data, "--config.steps=2") is not None
    # A limit on the size of a file stands for a full disk: the next checkpoint cannot be written.
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "manifest.json").unlink()
    flags = (data, "--noconfig.log.tensorboard", "--config.checkpoint.retry_seconds=0.1")
    process = runs.start(recipe, tmp_path, *flags, file_limit_kb=30)
    output, _ = process.communicate()
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "error: saving" in output and "the checkpoint of step 2 is whole" in output
    assert int(runs.run(recipe, tmp_path, data, "--noconfig.log.tensorboard").step) == 8


def test_a_user_error_is_one_message_and_exit_status_2(tmp_path, recipe):
    process = runs.start(recipe, tmp_path / "run", "--config.optimizer.learningrate=1")
    output, _ = process.communicate()
    assert (
        process.returncode == 2
        and output.splitlines()[-1].startswith("error: ")
        and "did you mean 'optimizer.learning_rate'" in output
    )
    assert "Traceback" not in output and not (tmp_path / "run").exists()
    process = runs.start(recipe, tmp_path / "run", "--config.optimizer.learningrate=1", "--traceback")
    output, _ = process.communicate()
    assert process.returncode == 1 and "Traceback" in output


KD = "--config.objective.kd.weight=0.5"
ALIGN = "--config.objective.align.weight=1"
MISTAKES = {
    "no data": (["--config.data.train="], "data.train is empty"),
    "not data": (["--config.data.train=/"], "not a prepared data set|manifest"),
    "batch": (["--config.batch_size=12"], r"batch_size=12 is not a multiple of .* = 8 \* 1 \* 1"),
    "seconds": (["--config.checkpoint.seconds=-1"], "checkpoint.seconds=-1.0 must be at least 0"),
    "evaluation": (["--config.eval.batches=0"], "eval.batches=0 must be at least 1, or -1"),
    "mesh": (["--config.mesh.data=16"], "asks for 16 devices, but there are 8"),
    "positions": (["--config.model.position=learned", "--config.model.max_seq_len=16"], "longer than the 16 learned"),
    "vocabulary": (["--config.model.vocab_size=100"], "tokenizer of 320 pieces, but model.vocab_size=100"),
    "record": (["--config.seq_len=48"], "seq_len=48 does not divide"),
    "no teacher": ([KD], r"teacher.path is empty, but the objective asks for help \(kd\)"),
    "teacher is nothing": ([KD, "--config.teacher.path=/"], "is neither a run .* nor a checkpoint"),
    "layer": ([ALIGN, "--config.objective.align.pairs=3:last"], "the student has no layer 3; it has layers 1 to 2"),
    "teacher layer": ([ALIGN, "--config.objective.align.pairs=1:2"], "the teacher has no layer 2"),
    "pairs": ([ALIGN, "--config.objective.align.pairs=1"], "expected student:teacher pairs"),
    "heads": (["--config.model.num_kv_heads=3"], "num_heads=2 is not a multiple of model.num_kv_heads=3"),
    "kernel": (["--config.model.attention=splash"], "attention='splash' needs a TPU"),
    "8 bits to train": (["--config.model.quantize=int8"], "model.quantize='int8': what is trained needs gradients"),
    "8 bits": ([KD, "--config.teacher.quantize=int4"], r"teacher.quantize='int4' .*did you mean 'int8'"),
    "name": (["--config.optimizer.name=adam"], "did you mean 'adamw'"),
    "fraction": (
        ["--config.objective.select.candidates=2", "--config.objective.select.fraction=0.7"], "at most 1 / candidates",
    ),
    "init of another shape": (
        ["--config.init.path=PLAIN", "--config.model.mlp_dim=32"],
        r"mlp/down/kernel.* has shape \(2, 64, 32\).*\(2, 32, 32\)",
    ),
    "init of another model": (
        ["--config.init.path=PLAIN", "--config.model.qkv_bias=true"], "attn/k/bias' is missing in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_before_anything_is_written(name, tmp_path, recipe, data, teacher, plain):
    overrides, message = MISTAKES[name]
    overrides = [o.replace("PLAIN", str(plain[0])) for o in overrides]
    given = [] if any("teacher.path" in o for o in overrides) or name == "no teacher" else [teacher]
    with pytest.raises(UserError, match=message):
        runs.run(recipe, tmp_path / "run", data, *given, *overrides)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.json*"))


def test_a_teacher_whose_other_tokenizer_is_not_there_is_refused(home, tmp_path, recipe, teacher):
    other = "--config.data.train=" + runs.write_data(tmp_path, seed=1)
    shutil.copytree(teacher.partition("=")[2], tmp_path / "helper")
    (path,) = tmp_path.glob("helper/checkpoints/8/manifest/metadata")
    manifest = json.loads(path.read_text())
    manifest["config"]["data"]["train"] = str(tmp_path / "gone")
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="trained with another tokenizer .*: the model's own is not there"):
        runs.run(recipe, tmp_path / "run", other, f"--config.teacher.path={tmp_path / 'helper'}", KD)


def test_a_start_of_another_tokenizer_is_refused(tmp_path, recipe, plain):
    other = "--config.data.train=" + runs.write_data(tmp_path, seed=1)
    with pytest.raises(UserError, match="init.path: the model in .* was trained with another tokenizer"):
        runs.run(recipe, tmp_path / "run", other, f"--config.init.path={plain[0]}")


def test_a_workdir_of_another_config_is_refused(recipe, data, plain):
    with pytest.raises(UserError, match=r"holds a run of another config:\n  optimizer.learning_rate: 0.01 -> 0.02\n"):
        runs.run(recipe, plain[0], data, "--config.optimizer.learning_rate=0.02")


@pytest.mark.slow
def test_a_teacher_that_changed_is_refused(tmp_path, recipe, data, teacher):
    arguments = ("--config.model.num_layers=1", "--config.model.d_model=16")
    helper = tmp_path / "helper"
    shutil.copytree(teacher.partition("=")[2], helper)
    given = (data, f"--config.teacher.path={helper}", KD, "--config.objective.kd.stop=1")
    with pytest.raises(UserError):
        runs.run(recipe, tmp_path / "run", *given, "--config.optimizer.learning_rate=1e30", "--config.max_nonfinite=1")
    shutil.rmtree(helper)
    runs.run(recipe, helper, data, *arguments, "--config.seed=5")
    with pytest.raises(UserError, match="is not the one that the run in"):
        runs.run(recipe, tmp_path / "run", *given, "--config.optimizer.learning_rate=1e30", "--config.max_nonfinite=1")
