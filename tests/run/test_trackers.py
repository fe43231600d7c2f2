"""Trackers: a run goes on in its run of the tracker, each number is there once, and what fails there ends nothing."""

import json
import struct
import sys
import threading
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost.errors import UserError
from lmboost.run import metrics
from lmboost.run.trackers import table
from lmboost.run.trackers.background import Background
from lmboost.run.trackers.tracker import About, Tracker
from tests import runs
from tests.compare import lines

ABOUT = About("run", "some project", {"config": {"steps": 5, "log": {"every": 1}}, "commit": "c0ffee", "seed": 0})


class Kept(Tracker):
    """A tracker on a list, one for all runs: (id, step, name, value)."""

    numbers: list[tuple[str, int, str, float]] = []
    opened = 0

    def __init__(self, about, directory, start, id=""):
        Kept.opened += not id
        self.id, self.where = id or f"run-{Kept.opened}", "a list"

    def write(self, step, values):
        Kept.numbers += [(self.id, step, *pair) for pair in values.items()]

    def close(self, whole):
        self.whole = whole


@pytest.fixture
def kept(monkeypatch):
    """What MLflow would be, without it."""
    monkeypatch.setattr(table, "find", lambda name: Kept)
    monkeypatch.setattr(Kept, "numbers", [])
    return Kept


def write(directory, values, start=0, names=("mlflow",)):
    """Lines (step, name, value) of one start, which ends without a word."""
    with closing(metrics.Writers(str(directory), start, names, ABOUT)) as writers:
        for step, name, value in values:
            writers.write(step, {name: value, "note": "a text", "kd": None})


def a_run(first=0):
    """A run of five steps, with an evaluation after each second one."""
    for step in range(first + 1, 6):
        yield step, "loss", step / 3
        if step % 2 == 0:
            yield step, "val_loss", step / 2


def test_names_are_those_of_the_table_and_old_recipes_leave_tensorboard_out():
    assert table.names_of(" wandb,tensorboard, wandb,") == ("wandb", "tensorboard")
    assert table.names_of("tensorboard,mlflow", tensorboard=False) == ("mlflow",) and table.names_of("") == ()
    with pytest.raises(UserError, match=r"log.trackers='wanb' is not known \(did you mean 'wandb'\?\)"):
        table.names_of("tensorboard,wanb")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_package_that_is_missing_is_named_before_anything_is_compiled(tmp_path, recipe, data, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"lmboost.run.trackers.{name}", raising=False)
    with pytest.raises(UserError, match=rf'log.trackers: .{name}. needs .*: pip install "lmboost\[{name}\]"'):
        runs.run(recipe, tmp_path / "run", data, f"--config.log.trackers={name}")
    assert not (tmp_path / "run").exists()


@settings(max_examples=30)
@given(killed=st.integers(0, 7), back=st.integers(0, 5))
def test_a_run_that_goes_on_has_each_number_once_in_the_same_run(tmp_path_factory, killed, back):
    directory, whole = tmp_path_factory.mktemp("run"), list(a_run())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "find", lambda name: Kept)
        patch.setattr(Kept, "numbers", [])
        write(directory, whole[:killed])
        done = whole[killed][0] - 1 if killed < len(whole) else 5  # a checkpoint follows all lines of its step
        start = max(done - back, 0)
        write(directory, [line for line in whole if line[0] > start], start)
        assert [number[1:] for number in Kept.numbers] == whole
        assert len({number[0] for number in Kept.numbers}) == 1
    assert {"step": 5, "loss": 5 / 3, "note": "a text", "kd": None} in lines(directory)


def test_a_tracker_that_comes_later_is_given_what_was_before(tmp_path, kept):
    write(tmp_path, a_run(), names=())
    write(tmp_path, a_run(first=3), start=3)
    assert [number[1:] for number in kept.numbers] == list(a_run())


def test_of_several_that_come_later_each_is_given_all_that_was_before(tmp_path, kept, monkeypatch):
    def named(name):
        return lambda about, directory, start, id="": kept(about, directory, start, id or name)

    monkeypatch.setattr(table, "find", named)
    many = [(step, "loss", step / 7) for step in range(1, 2000)]
    write(tmp_path, many, names=())
    write(tmp_path, [], start=1999, names=("mlflow", "trackio", "wandb"))
    for name in ("mlflow", "trackio", "wandb"):
        assert [number[1:] for number in kept.numbers if number[0] == name] == many


def test_a_list_of_ids_that_is_damaged_is_named(tmp_path):
    (tmp_path / table.FILE).write_text('{"mlflow": 3}')
    with pytest.raises(UserError, match="trackers.json: mlflow is 3, expected a text. Mend it, or remove it"):
        metrics.Writers(str(tmp_path))


def test_what_fails_is_told_once_and_counted_at_the_end(capsys):
    class Broken(Kept):
        def write(self, step, values):
            if step in (2, 3, 5):
                raise ConnectionError(f"no answer to {step}")
            super().write(step, values)

        def close(self, whole):
            raise TimeoutError("too late")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kept, "numbers", [])
        tracker = Background("mlflow", lambda: Broken(ABOUT, "", 0), lambda _: None)
        for step in range(1, 6):
            tracker.write(step, {"loss": 1.0})
        table.close_all([tracker], whole=True)
        assert [number[1] for number in Kept.numbers] == [1, 4]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and "has not taken the numbers of step 2 (ConnectionError: no answer to 2)" in told[0]
    assert "could not be closed (TimeoutError: too late)" in told[1]
    assert "3 lines of steps 2 to 5 are not in mlflow" in told[2]


def test_one_that_hangs_holds_up_neither_the_loop_nor_the_end(capsys):
    class Hanging(Kept):
        def write(self, step, values):
            free.wait()

    free = threading.Event()
    tracker = Background("wandb", lambda: Hanging(ABOUT, "", 0), lambda _: None, limit=3)
    for step in range(20):
        tracker.write(step, {"loss": 1.0})  # never returns, where it waits
    table.close_all([tracker], whole=True, patience=0.1)
    told = capsys.readouterr().err
    free.set()
    tracker._thread.join()
    assert "wandb has not taken the numbers of step" in told and "(3 lines wait for it already)" in told
    assert "has not taken everything in time: the run's last lines, about" in told


def test_one_that_cannot_be_opened_or_written_lets_a_run_end(tmp_path, recipe, data, monkeypatch, capsys):
    class Shut(Kept):
        def __init__(self, *_):
            raise PermissionError("who are you?")

    class Broken(Kept):
        def write(self, step, values):
            raise RuntimeError("of the library")

    monkeypatch.setattr(table, "find", {"wandb": Shut, "mlflow": Broken}.get)
    given = (data, "--config.steps=3", "--config.eval.every=0", "--config.log.trackers=wandb,mlflow")
    assert int(runs.run(recipe, tmp_path, *given).step) == 3
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [1, 2, 3]
    told = capsys.readouterr().err
    assert told.count("wandb could not be opened (PermissionError: who are you?)") == 1
    assert told.count("mlflow has not taken the numbers of step 1 (RuntimeError: of the library)") == 1
    assert "4 lines of steps 1 to 3 are not in mlflow" in told and "4 lines of steps 1 to 3 are not in wandb" in told
    assert json.loads((tmp_path / "trackers.json").read_text()).keys() == {"mlflow"}


# ---------------------------------------------------------------------- the libraries themselves


def log_records(content):
    """The records of a file of W&B's, which is a log of LevelDB's behind a head of seven bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.fixture
def wandb_numbers(tmp_path, monkeypatch):
    """What W&B's files hold of a run."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)

    def read(id):
        numbers, config = [], {}
        for path in sorted((tmp_path / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb")):
            for data in log_records(path.read_bytes()):
                record = wandb_internal_pb2.Record.FromString(data)
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                numbers += [(items["_step"], k, v) for k, v in items.items() if k[0] != "_"]
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
                config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        assert config["steps"] == 5 and config["log"] == {"every": 1} and config["manifest"]["commit"] == "c0ffee"
        return numbers

    return read


@pytest.fixture
def mlflow_client(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # to make the tables of a data base takes ten seconds
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    return MlflowClient()


@pytest.fixture
def mlflow_numbers(tmp_path, mlflow_client):
    def read(id):
        client = mlflow_client
        run = client.get_run(id)
        assert run.info.status == "FINISHED" and run.data.params == {"steps": "5", "log.every": "1"}
        assert run.data.tags["mlflow.source.git.commit"] == "c0ffee"
        path = client.download_artifacts(id, "manifest.json", str(tmp_path))
        assert json.loads(open(path).read()) == ABOUT.manifest
        return [(m.step, m.key, m.value) for key in run.data.metrics for m in client.get_metric_history(id, key)]

    return read


@pytest.fixture
def trackio_numbers(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    for module in (sqlite_storage, sys.modules["trackio"]):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)

    def read(id):
        config = sqlite_storage.SQLiteStorage.get_run_config("some project", id)
        assert config["steps"] == 5 and config["manifest"]["commit"] == "c0ffee"
        logs = sqlite_storage.SQLiteStorage.get_logs("some project", id)
        return [(row["step"], k, row[k]) for row in logs for k in ("loss", "val_loss") if k in row]

    return read


@pytest.mark.peers
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_library_has_each_number_of_a_resumed_run_once(tmp_path, request, name):
    numbers = request.getfixturevalue(f"{name}_numbers")
    write(tmp_path, list(a_run())[:4], names=(name,))
    ids = json.loads((tmp_path / "trackers.json").read_text())
    time.sleep(name == "wandb")  # names its directories by the second
    writers = metrics.Writers(str(tmp_path), 2, (name,), ABOUT)
    for step, key, value in a_run(first=2):
        writers.write(step, {key: value})
    writers.close(whole=True)
    assert json.loads((tmp_path / "trackers.json").read_text()) == ids
    assert sorted(numbers(ids[name])) == sorted(a_run())


@pytest.mark.peers
def test_a_run_that_was_killed_goes_on_in_its_run_of_mlflow(tmp_path, recipe, data, mlflow_client):
    given = (
        tmp_path / "run",
        data,
        "--config.log.trackers=mlflow",
        "--config.steps=60",
        "--config.checkpoint.every=20",
    )
    process = runs.start(recipe, *given, "--config.eval.every=0")
    until = time.monotonic() + 300
    while not (tmp_path / "run" / "trackers.json").exists() or not (tmp_path / "run/checkpoints/20").exists():
        assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert int(runs.run(recipe, *given, "--config.eval.every=0").step) == 60
    experiment = mlflow_client.get_experiment_by_name("lmboost")
    (run,) = mlflow_client.search_runs([experiment.experiment_id])
    steps = [metric.step for metric in mlflow_client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(set(steps)) == sorted(steps) and steps[-1] == 60 and run.info.status == "FINISHED"
    assert run.info.run_name == "run" and run.data.params["optimizer.learning_rate"] == "0.01"
