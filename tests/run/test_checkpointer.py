"""Checkpoints that were harmed, and saves that fail: what is used instead, what is said, what is never lost."""

import gc
import itertools
import json
import random
import shutil

import jax
import pytest

from lmboost import config, optimizers, plan, sharding
from lmboost.errors import UserError
from lmboost.run import checkpointer
from lmboost.run.checkpointer import Checkpointer
from lmboost.train_step import init_state
from tests import runs
from tests.compare import assert_same, losses

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see below


@pytest.fixture(autouse=True)
def complaints():
    """TensorStore's own tasks, which found damage, complain when they are collected: here, not in a later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def trained(home, recipe, data):
    """(workdir, last state) of a run with checkpoints of its steps 4 and 6, as if killed before step 8."""
    state = runs.run(recipe, home / "trained", data, "--config.checkpoint.keep=3")
    shutil.rmtree(home / "trained" / "checkpoints" / "8")
    return home / "trained", state


@pytest.fixture
def workdir(tmp_path, trained):
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture(scope="module")
def reader(recipe, data, trained):
    """restore(workdir) -> (state, position, step), as a run does it when it starts."""
    c, _ = config.load([f"--config={recipe}", data, "--workdir=unused"])
    run = plan.make(c, "unused", jax.default_backend(), jax.device_count())
    mesh = sharding.make_mesh()
    tx, _ = optimizers.make_optimizer(c.optimizer, c.steps, jax.eval_shape(run.init_params))
    like = jax.eval_shape(lambda: init_state(run.init_params(), tx))
    places = sharding.tree_sharding(like, mesh)

    def restore(workdir):
        with jax.set_mesh(mesh), Checkpointer(str(workdir), c.checkpoint, mesh) as checkpointer:
            return checkpointer.restore(like, places)

    return restore


def files(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path, draw):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def delete(path, draw):
    path.unlink()


HARMS = [
    pytest.param((flip, truncate, delete), id="in turn"),
    *(pytest.param((harm,), id=harm.__name__, marks=pytest.mark.slow) for harm in (flip, truncate, delete)),
]


@pytest.mark.parametrize("harms", HARMS)
def test_a_harmed_checkpoint_is_named_and_the_one_before_is_used(harms, workdir, reader, capsys):
    """Whatever byte of whatever file: the state is bit for bit that of step 6 or that of step 4."""
    draw, newest = random.Random(0), workdir / "checkpoints" / "6"
    want = {6: reader(workdir)[0], 4: checkpointed(reader, workdir, 4)}
    keep, used = shutil.copytree(newest, workdir / "keep"), []
    targets = [p for p in files(keep) if p.stat().st_size or harms == (delete,)]
    assert len(targets) > 10
    for path, harm in zip(targets + draw.choices(targets, k=10), itertools.cycle(harms), strict=False):
        capsys.readouterr()
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(keep, newest)
        harm(newest / path.relative_to(keep), draw)
        state, position, step = reader(workdir)
        assert_same(state, want[step])
        assert position["step"] == step
        used.append(step)
        said = capsys.readouterr().err
        assert newest.exists() == (step == 6)
        if step == 4:
            assert "checkpoints/6" in said and "put aside" in said and (workdir / "damaged-6").exists()
    assert used.count(4) > len(used) / 5, used


def checkpointed(reader, workdir, step):
    """The state of an older checkpoint."""
    copy = workdir.parent / "older"
    shutil.copytree(workdir / "checkpoints" / str(step), copy / "checkpoints" / str(step))
    return reader(copy)[0]


def test_if_none_is_whole_nothing_is_touched(workdir, reader):
    for step in ("4", "6"):
        (workdir / "checkpoints" / step / "position" / "metadata").unlink()
    before = files(workdir)
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be read .*checkpoints/6.*checkpoints/4"):
        reader(workdir)
    assert files(workdir) == before


def test_a_run_goes_on_from_the_one_before_and_ends_the_same(workdir, trained, recipe, data, capsys):
    max(files(workdir / "checkpoints" / "6" / "training"), key=lambda p: p.stat().st_size).write_bytes(b"")
    state = runs.run(recipe, workdir, data, "--config.checkpoint.keep=3")
    assert "start: own checkpoint, step 4" in capsys.readouterr().out
    assert_same(state, trained[1])


def test_a_position_that_does_not_fit_is_fatal(workdir, recipe, data):
    path = workdir / "checkpoints" / "6" / "position" / "metadata"
    position = json.loads(path.read_text())
    del position["fingerprints"]["position"]  # as an earlier release wrote it
    path.write_text(json.dumps(position | {"first_row": 7}))
    with pytest.raises(UserError, match="data position"):
        runs.run(recipe, workdir, data, "--config.checkpoint.keep=3")


@pytest.mark.parametrize(
    "change", [lambda text: text.replace('"step"', '"stdp"'), lambda text: text.replace("48", "40")]
)
def test_a_position_with_another_bit_is_damage(workdir, reader, capsys, change):
    path = workdir / "checkpoints" / "6" / "position" / "metadata"
    assert change(path.read_text()) != path.read_text()
    path.write_text(change(path.read_text()))
    assert reader(workdir)[2] == 4 and "put aside as" in capsys.readouterr().err


def test_an_unfinished_checkpoint_is_named_and_removed(workdir, reader, capsys):
    unfinished = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "6", unfinished)
    assert reader(workdir)[2] == 6
    said = capsys.readouterr().err
    assert "WARNING: the checkpoint of step 8 was not finished" in said and not unfinished.exists()


def steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def test_the_newest_are_kept_and_some_for_good(tmp_path, recipe, data):
    runs.run(recipe, tmp_path, data, "--config.checkpoint.every=1", "--config.checkpoint.keep_every=3")
    assert steps(tmp_path) == [3, 6, 7, 8]


@pytest.mark.slow
def test_the_best_is_kept_beside_the_newest(tmp_path, recipe, data, capsys):
    """At a rate that is too high the loss rises from some step on."""
    flags = ("checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_best=1", "eval.every=1")
    flags = [f"--config.{flag}" for flag in (*flags, "optimizer.learning_rate=0.3", "optimizer.warmup_steps=4")]
    runs.run(recipe, tmp_path, data, *flags)
    known = losses(tmp_path, "val_loss")
    best = min(range(1, 9), key=known.get)
    assert best < 8 and steps(tmp_path) == [best, 8]
    said = f"the best checkpoint is that of step {best}, validation loss {known[best]:.4f}"
    assert said in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    runs.run(recipe, tmp_path, data, *flags)
    assert said in capsys.readouterr().out and steps(tmp_path) == [best, 8]
    with pytest.raises(UserError, match="keep_best=1: no step before the last is both saved and evaluated"):
        runs.run(recipe, tmp_path, data, *flags, "--config.eval.every=8")


@pytest.mark.slow
def test_saves_by_the_clock(tmp_path, recipe, data):
    """Every step lasts longer than a nanosecond; no step is a multiple of 1,000."""
    flags = ("--config.checkpoint.every=1000", "--config.checkpoint.keep=9")
    runs.run(recipe, tmp_path / "clock", data, *flags, "--config.checkpoint.seconds=1e-9")
    assert steps(tmp_path / "clock") == list(range(1, 9))
    runs.run(recipe, tmp_path / "never", data, *flags, "--config.checkpoint.seconds=1e9")
    assert steps(tmp_path / "never") == [8]


def test_saves_that_fail_are_said_and_made_good(tmp_path, recipe, data, trained, monkeypatch, capsys):
    left, manager = iter(range(2)), checkpointer.ocp.CheckpointManager

    def save(self, *args, **kwargs):
        if next(left, None) is not None:
            raise OSError(28, "No space left on device")
        return whole(self, *args, **kwargs)

    whole = manager.save
    monkeypatch.setattr(manager, "save", save)
    flags = ("--config.checkpoint.every=3", "--config.checkpoint.keep=9", "--config.checkpoint.retry_seconds=0")
    state = runs.run(recipe, tmp_path, data, *flags)
    said = capsys.readouterr().err
    assert "WARNING: saving the checkpoint of step 3 failed (OSError: [Errno 28] No space left on device)" in said
    assert "saving the checkpoint of step 4 failed" in said
    assert steps(tmp_path) == [5, 6, 8]
    assert_same(state, trained[1])


def test_a_directory_that_cannot_be_opened_anew_is_tried_again(tmp_path, recipe, data, trained, monkeypatch, capsys):
    """After a failed save the manager is opened anew: that may fail, too, and is part of the next save."""
    opened, manager = [], checkpointer.ocp.CheckpointManager

    def save(self, step, **kwargs):
        if len(opened) == 1:
            raise OSError(28, "No space left on device")
        return whole(self, step, **kwargs)

    def construct(self, *args, **kwargs):
        opened.append(None)
        if len(opened) in (2, 3):
            raise OSError(30, "Read-only file system")
        return init(self, *args, **kwargs)

    whole, init = manager.save, manager.__init__
    monkeypatch.setattr(manager, "save", save)
    monkeypatch.setattr(manager, "__init__", construct)
    flags = ("--config.checkpoint.every=2", "--config.checkpoint.keep=9", "--config.checkpoint.retry_seconds=0")
    state = runs.run(recipe, tmp_path, data, *flags)
    said = capsys.readouterr().err
    assert "saving the checkpoint of step 2 failed (OSError: [Errno 28]" in said
    assert "saving the checkpoint of step 3 failed (OSError: [Errno 30] Read-only" in said
    assert "saving the checkpoint of step 4 failed (OSError: [Errno 30] Read-only" in said
    assert steps(tmp_path) == [5, 6, 8] and len(opened) == 4
    assert_same(state, trained[1])
