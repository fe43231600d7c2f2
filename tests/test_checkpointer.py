"""Checkpoints that were harmed, and saves that fail: what is used instead, what is said, what is never lost."""

import random
import shutil

import jax
import numpy as np
import pytest

from lmboost import config, optimizers, plan, sharding, train
from lmboost.checkpointer import Checkpointer
from tests import runs


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)))


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
    like = jax.eval_shape(
        lambda: train._fresh_state(run, optimizers.make_optimizer(c.optimizer, c.steps, train._shapes(run))[0])
    )
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


HARMS = {"flip": flip, "truncate": truncate, "delete": lambda path, _: path.unlink()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of TensorStore's own tasks
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_checkpoint_is_named_and_the_one_before_is_used(harm, workdir, reader, capsys):
    """Whatever byte of whatever file: the state is bit for bit that of step 6 or that of step 4."""
    draw, newest = random.Random(harm), workdir / "checkpoints" / "6"
    want = {6: reader(workdir)[0], 4: checkpointed(reader, workdir, 4)}
    keep, used = shutil.copytree(newest, workdir / "keep"), []
    targets = [p for p in files(keep) if p.stat().st_size or harm == "delete"]
    assert len(targets) > 10
    for path in targets + draw.choices(targets, k=20):
        capsys.readouterr()
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(keep, newest)
        HARMS[harm](newest / path.relative_to(keep), draw)
        state, position, step = reader(workdir)
        assert same(state, want[step]) and position["step"] == step
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
