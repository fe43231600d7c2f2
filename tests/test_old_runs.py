"""What an earlier release left behind: data is read, models load, and its runs and searches go on to the same end.

fixtures/old_runs.tar.gz is of lmboost at commit 1b0f7ae, made in /tmp/fixture by the make.py that lies in it (which
says how it is run, and has all the commands), with jax 0.10.2: a prepared data set, a teacher, a run with its help that
stopped after 6 of 12 steps, a search that stopped after 8 candidates. expected.json has what that release came to when
it went on itself.
"""

import contextlib
import json
import pathlib
import tarfile

import numpy as np
import pytest

from lmboost import evaluate
from lmboost.checkpoint import Run, Saved
from lmboost.config import load
from lmboost.data import loader
from lmboost.report import __main__ as report
from lmboost.run import goodput
from lmboost.search import job
from tests import hub, runs

PACKED = pathlib.Path(__file__).parent / "fixtures" / "old_runs.tar.gz"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the old release came to; the files are in the working directory."""
    there = tmp_path_factory.mktemp("old")
    with tarfile.open(PACKED) as packed:
        packed.extractall(there, filter="data")
    about = there / "search" / "search.json"  # knows its parent by an absolute name
    about.write_text(about.read_text().replace("/tmp/fixture", str(there)))
    with contextlib.chdir(there):
        yield json.loads((there / "expected.json").read_text())


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def test_data_and_models_are_read(expected):
    info = loader.info("data", "validation")
    assert info.fingerprint == Run("helped").manifest()["data"]["fingerprint"] and Run("helped").steps() == [3, 6]
    for path, step in (("teacher", 12), ("helped", 6), ("helped", 3)):
        said = {line["step"]: line["val_loss"] for line in lines(f"{path}/metrics.jsonl") if "val_loss" in line}
        found = evaluate.evaluate(path, step=step, batches=2, batch_size=8)
        np.testing.assert_allclose(found["val_loss"], said[step], rtol=1e-5)
    winner = Saved.find("search/winner")
    winner.check_tokenizer(info)
    assert winner.load(hub.one_device())["embed"]["embedding"].shape == (320, winner.model.d_model)
    assert winner.tokenizer().fingerprint == info.tokenizer_fingerprint


def test_a_helped_run_goes_on_to_the_same_end(expected, capsys):
    before = lines("helped/metrics.jsonl")
    runs.run("recipe.py:helped", "helped", "--config.teacher.path=teacher")
    said = capsys.readouterr().out
    assert "start: own checkpoint, step 6" in said and "step 6: training with align, kd, select" in said
    after = lines("helped/metrics.jsonl")
    assert after[: len(before)] == before and after[-1]["step"] == 12
    last = {name: [line[name] for line in after if line.get(name) is not None][-1] for name in ("loss", "val_loss")}
    np.testing.assert_allclose(*([x[name] for name in last] for x in (last, expected["helped"])), rtol=1e-4)
    assert goodput.read("helped").attempts == 2
    report.main("teacher", ["helped"], ["teacher"], "report", last=1)
    (told,) = json.loads(pathlib.Path("report/report.json").read_text())["runs"]
    assert told["final"]["val_loss"] == last["val_loss"] and told["total"]["steps"] == 12


@pytest.mark.slow
def test_a_search_goes_on_from_its_log(expected):
    before = lines("search/candidates.jsonl")
    flags = ["--config=recipe.py:search", "--workdir=search", "--config.init.path=teacher"]
    job.search(*load([*flags, "--config.search.candidates=12"]), say=lambda *_: None)
    after = lines("search/candidates.jsonl")
    assert after[:8] == before and len(after) == 12
    np.testing.assert_allclose([line["loss"] for line in after], expected["search"], rtol=1e-4)
    state = runs.run("search/winner.py", "trained", "--config.steps=2")
    assert int(state.step) == 2
