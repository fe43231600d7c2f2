"""After a loss spike: a new run goes on from an older checkpoint of the first one, without the rows of some steps."""

import contextlib
import shutil

import numpy as np
import pytest
from etils import epath

from lmboost import checkpoint
from lmboost.data import loader, windows
from lmboost.errors import UserError
from lmboost.run import metrics
from tests import runs
from tests.compare import assert_same, lines


@pytest.fixture(scope="module")
def first(home, recipe, data):
    """A run of 8 steps that has kept all of its checkpoints, each second step."""
    runs.run(recipe, home / "first", data, "--config.checkpoint.keep=10")
    return home / "first"


@pytest.fixture
def read(monkeypatch):
    """The tokens of the training batches that the loop has taken, as they come."""
    taken, batches = [], loader.Loader.batches

    def spy(self, *args):
        with contextlib.closing(batches(self, *args)) as iterator:
            for batch in iterator:
                taken.append(np.array(batch["tokens"]))
                yield batch

    monkeypatch.setattr(loader.Loader, "batches", spy)
    return taken


def rows(data, first, count=8):
    source = loader.Loader(data.partition("=")[2], "train", 32)
    return windows.batch_of([source.rows[i] for i in range(first, first + count)], count, 32)["tokens"]


@pytest.mark.slow
def test_rows_of_a_loss_spike_are_left_out(tmp_path, recipe, data, first, read, capsys):
    again = [f"--config.resume.path={first}", "--config.resume.step=4", "--config.data.skip=5-6"]
    last = runs.run(recipe, tmp_path / "second", data, *again)
    assert "start: resume.path, step 4" in capsys.readouterr().out
    taken = read[:]
    for batch, step in zip(taken, (7, 8, 9, 10), strict=True):  # as the first run would have counted them
        np.testing.assert_array_equal(batch, rows(data, (step - 1) * 8))

    old, new = lines(first), lines(tmp_path / "second")
    assert [x for x in new if x["step"] <= 4] == [x for x in old if x["step"] <= 4], "the whole curve is there"
    assert [x["step"] for x in new if "loss" in x] == list(range(1, 9))
    assert new[-1] != old[-1]

    shutil.rmtree(tmp_path / "second" / "checkpoints" / "8")  # as if it had been killed after step 6
    read.clear()
    same = runs.run(recipe, tmp_path / "second", data, *again)
    assert "start: own checkpoint, step 6" in capsys.readouterr().out
    for batch, before in zip(read, taken[2:], strict=True):
        np.testing.assert_array_equal(batch, before)
    assert_same(same, last)
    assert [x["step"] for x in lines(tmp_path / "second") if "loss" in x] == list(range(1, 9))

    with pytest.raises(UserError, match="holds a run of another config:\n  data.skip: '5-6' -> '5-7'"):
        runs.run(recipe, tmp_path / "second", data, *again[:2], "--config.data.skip=5-7")


def test_rows_that_have_been_read_already_cannot_be_left_out(tmp_path, recipe, data, first):
    with pytest.raises(UserError, match="data.skip='5-6'.* begins at step 5, .*from step 6 .*resume.step of at most 4"):
        runs.run(
            recipe, tmp_path / "late", data, f"--config.resume.path={first}", "--config.resume.step=6",
            "--config.data.skip=5-6",
        )  # fmt: skip
    assert not (tmp_path / "late" / "metrics.jsonl").exists()


def test_a_checkpoint_that_was_not_kept_is_named(tmp_path, recipe, data, first):
    with pytest.raises(UserError, match="resume.path=.*step 5: it has steps 2, 4, 6, 8"):
        runs.run(recipe, tmp_path / "new", data, f"--config.resume.path={first}", "--config.resume.step=5")


def test_numbers_are_taken_over_once(tmp_path):
    run = checkpoint.Run.of(epath.Path(tmp_path / "run" / "checkpoints" / "2")).workdir
    assert run == epath.Path(tmp_path / "run") and checkpoint.Run.of(tmp_path / "elsewhere" / "2") is None
    run.mkdir()
    metrics.take_over(str(tmp_path / "a"), run, 2)
    assert not (tmp_path / "a").exists(), "a run without numbers has none to give"
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    metrics.take_over(str(tmp_path / "a"), run, 2)
    assert lines(tmp_path / "a") == [{"step": 1}, {"step": 2}]
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
    metrics.take_over(str(tmp_path / "a"), run, 3)
    assert lines(tmp_path / "a") == [{"step": 1}], "the run has numbers of its own"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="resume.path: .*metrics.jsonl cannot be copied to .*file"):
        metrics.take_over(str(tmp_path / "file"), run, 2)
