"""Workdirs in a bucket, over a server that answers as Google Cloud Storage does."""

import importlib.util
import json
import os
import signal
import tempfile
import threading
import time
import types
from contextlib import closing

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lmboost import places
from lmboost.errors import UserError
from lmboost.run import lock, logdir, metrics
from lmboost.run.trackers import table
from tests import gcs, runs

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason='needs pip install -e ".[gcs]"')


@pytest.fixture(scope="module")
def server():
    with gcs.serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", json.loads(server.environment["FSSPEC_GCS"]))
        yield server


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """What a test leaves of a LogDir is removed with its other files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def root(server, request):
    """A directory of the test's own."""
    return places.find(f"gs://bucket/{request.node.name}")


@pytest.fixture
def impatient(monkeypatch):
    """gcsfs tries six times, with half a minute between; here without waiting."""
    import gcsfs.retry

    async def sleep(_):
        pass

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=sleep))


def wait(directory):
    """Until the uploads that have begun are done."""
    if thread := directory._thread:
        thread.join()


def test_what_is_written_is_read_listed_moved_and_removed(root):
    assert not root.exists()
    (root / "a" / "b.txt").write_text("text")
    big = np.random.default_rng(0).bytes(11 << 20)  # is uploaded piece by piece
    (root / "a" / "c").write_bytes(big)
    assert (root / "a" / "b.txt").read_text() == "text" and (root / "a" / "c").read_bytes() == big
    assert root.is_dir() and sorted(p.name for p in (root / "a").iterdir()) == ["b.txt", "c"]
    (root / "a" / "b.txt").rename(root / "a" / "d.txt")
    (root / "a").rename(root / "e")
    assert [p.name for p in root.iterdir()] == ["e"]
    assert sorted(p.name for p in (root / "e").iterdir()) == ["c", "d.txt"]
    (root / "e").rmtree()
    assert not (root / "e").exists()


def test_what_another_process_writes_is_seen(root, server):
    (root / "mine").write_text("")
    assert [p.name for p in root.iterdir()] == ["mine"]
    server.put(f"{root.name}/theirs", b"content", {})
    assert sorted(p.name for p in root.iterdir()) == ["mine", "theirs"] and (root / "theirs").exists()


def test_checkpoints_are_saved_restored_and_thinned_out(root):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=sharding)}
    with ocp.CheckpointManager(root, options=options) as manager:
        for step in (1, 2, 3):
            tree = {"x": jax.device_put(jnp.arange(1000.0) * step, sharding)}
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(tree)))
    assert ocp.utils.checkpoint_steps(root) == [2, 3] and sorted(p.name for p in root.iterdir()) == ["2", "3"]
    (root / "3" / "commit_success.txt").unlink()  # as after a kill in the middle of it
    assert ocp.utils.checkpoint_steps(root) == [2]
    with ocp.CheckpointManager(root, options=options) as manager:
        assert manager.latest_step() == 2
        restored = manager.restore(2, args=ocp.args.Composite(params=ocp.args.StandardRestore(like)))
        assert np.array_equal(restored.params["x"], np.arange(1000.0) * 2)
        assert not (root / "3").exists()
        manager.save(3, args=ocp.args.Composite(params=ocp.args.StandardSave(tree)))
    assert ocp.utils.checkpoint_steps(root) == [2, 3]


def test_small_files_go_to_the_bucket_and_a_restart_goes_on_from_them(root, server):
    with closing(logdir.LogDir(str(root))) as directory:
        with closing(metrics.Writers(directory.path, trackers=["tensorboard"])) as writers:
            for step in (1, 2, 3):
                writers.write(step, {"loss": float(step)})
            directory.sync()
            wait(directory)
            assert [line["step"] for line in metrics.read(str(root))] == [1, 2, 3], "before the end"
            before = len(server.requests)
            directory.sync()
            wait(directory)
            assert len(server.requests) == before, "what has not changed stays as it is"
        with open(os.path.join(directory.path, "trackers.json"), "w") as file:
            file.write('{"mlflow": "a run"}')
        os.makedirs(os.path.join(directory.path, "profile", "host"))
        with open(os.path.join(directory.path, "profile", "host", "trace"), "wb") as file:
            file.write(b"trace")
    assert not os.path.exists(directory.path)
    assert (root / "profile" / "host" / "trace").read_bytes() == b"trace"
    with (
        closing(logdir.LogDir(str(root))) as directory,
        closing(metrics.Writers(directory.path, 2, ["tensorboard"])) as writers,
    ):
        writers.write(3, {"loss": 9.0})
    with closing(logdir.LogDir(str(root))) as directory:
        assert table.Ids(directory.path).get("mlflow") == "a run"
        assert [line["loss"] for line in metrics.read(directory.path)] == [1.0, 2.0, 9.0]
    assert [line["loss"] for line in metrics.read(str(root))] == [1.0, 2.0, 9.0]
    assert len(list((root / "tensorboard").iterdir())) == 2, "a file of each start"


def test_an_upload_that_fails_is_told_once_and_made_good(root, server, impatient, capsys):
    with closing(logdir.LogDir(str(root))) as directory:
        with closing(metrics.Writers(directory.path)) as writers:
            server.stop()
            for step in (1, 2):
                writers.write(step, {})
                directory.sync()
                wait(directory)
            server.start()
            assert capsys.readouterr().err.count("warning: metrics.jsonl could not be uploaded") == 1
            directory.sync()
            wait(directory)
            assert [line["step"] for line in metrics.read(str(root))] == [1, 2]
            assert "can be written again" in capsys.readouterr().err


def test_what_could_not_be_uploaded_at_the_end_stays_and_is_named(root, server, impatient, capsys):
    directory = logdir.LogDir(str(root))
    with closing(metrics.Writers(directory.path)) as writers:
        writers.write(1, {})
    server.stop()
    directory.close()
    server.start()
    assert f"the newest version stays in {directory.path}" in capsys.readouterr().err
    assert [line["step"] for line in metrics.read(directory.path)] == [1] and not root.exists()


def test_a_slow_upload_holds_up_nobody_and_not_the_end_for_ever(root, server, capsys):
    directory = logdir.LogDir(str(root))
    with closing(metrics.Writers(directory.path)) as writers:
        writers.write(1, {})
    with server.lock:  # no answer comes
        begun = time.monotonic()
        directory.sync()
        directory.sync()
        assert time.monotonic() - begun < 5 and sum(t.name == "logdir" for t in threading.enumerate()) == 1
        directory.close(timeout=0.2)
        assert time.monotonic() - begun < 20
    assert "metrics.jsonl could not be uploaded" in capsys.readouterr().err


def test_what_is_written_while_an_upload_runs_is_uploaded_after_it(root, server):
    with (
        closing(logdir.LogDir(str(root))) as directory,
        closing(metrics.Writers(directory.path)) as writers,
    ):
        writers.write(1, {})
        sent = len(server.requests)
        with server.lock:  # no answer comes
            directory.sync()
            while len(server.requests) == sent:
                time.sleep(0.01)
            writers.write(2, {})
            directory.sync()
        wait(directory)
        assert [line["step"] for line in metrics.read(str(root))] == [1, 2]


def test_no_more_often_than_asked_for(root, server):
    with closing(logdir.LogDir(str(root))) as directory:
        with closing(metrics.Writers(directory.path)) as writers:
            writers.write(1, {})
        directory.sync(at_least=60)
        assert directory._thread is None
        directory.sync(at_least=0.0)
        wait(directory)
        assert (root / metrics.FILE).exists()


def test_only_the_first_process_uploads(root, monkeypatch):
    (root / metrics.FILE).write_text('{"step": 1}\n')
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with closing(logdir.LogDir(str(root))) as directory:
        assert os.listdir(directory.path) == []
        with open(os.path.join(directory.path, metrics.FILE), "w") as file:
            file.write("mine")
        directory.sync()
    assert not os.path.exists(directory.path) and (root / metrics.FILE).read_text() == '{"step": 1}\n'


def test_a_bucket_that_cannot_be_read_is_named(server, impatient):
    server.stop()
    try:
        with pytest.raises(UserError, match=r"--workdir='gs://bucket/run' cannot be read \(.*credentials"):
            logdir.LogDir("gs://bucket/run")
    finally:
        server.start()


def test_a_misspelt_bucket_is_named_and_not_made(server):
    with pytest.raises(UserError, match=r"--workdir='gs://bukket/a/run': there is no gs://bukket, or it is empty"):
        logdir.LogDir("gs://bukket/a/run")
    assert "POST /storage/v1/b" not in server.requests


def params(root):
    """The last parameters of a run, by name."""
    from lmboost import checkpoint

    directory = checkpoint.find(str(root))
    tree = ocp.StandardCheckpointHandler().restore(directory / "params")
    return directory.name, {
        jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_and_resumed_ends_as_an_unbroken_local_one(
    root, server, recipe, data, tmp_path, monkeypatch
):
    process = runs.start(recipe, tmp_path / "run", data)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    reached, killed, put = threading.Event(), threading.Event(), server.put

    def put_and_wait(name, content, query):
        about = put(name, content, query)
        if name == f"{root.name}/checkpoints/4/commit_success.txt":
            reached.set()
            killed.wait()
        return about

    monkeypatch.setattr(server, "put", put_and_wait)
    process = runs.start(recipe, root, data)
    while not reached.wait(0.1):
        assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed.set()
    (root / "lock").unlink()  # in place of the three minutes for which it counts
    process = runs.start(recipe, root, data)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "start: own checkpoint, step 4" in out, out
    (step, ended), (expected_step, expected) = params(root), params(tmp_path / "run")
    assert step == expected_step == "8" and ended.keys() == expected.keys()
    assert all(np.array_equal(ended[k], expected[k]) for k in expected)
    assert [line["step"] for line in metrics.read(str(root)) if "loss" in line] == list(range(1, 9))

    for path in (root / "checkpoints" / "8" / "params" / "ocdbt.process_0" / "d").iterdir():
        path.write_bytes(b"")
    process = runs.start(recipe, root, data)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"It is put aside as {root}/damaged-8" in out, out
    assert (root / "damaged-8" / "manifest" / "metadata").exists()
    assert all(np.array_equal(params(root)[1][k], expected[k]) for k in expected)
    assert not (root / "lock").exists()
    assert (root / "manifest.json").exists() and not (runs.ROOT / "gs:").exists(), "nor a local directory of that name"


def test_of_two_that_take_the_lease_of_a_workdir_one_has_it(root, monkeypatch):
    monkeypatch.setattr(lock.Lock, "LEASE", 1.5)
    with closing(lock.Lock(str(root))):
        assert json.loads((root / "lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="is in use by a run that is alive"):
            lock.Lock(str(root))
    assert not (root / "lock").exists()
    (root / "lock").write_text("left by one that was killed")
    with closing(lock.Lock(str(root))) as held:
        assert held._number == 1 and (root / "lock.1").exists()
        with pytest.raises(FileExistsError):
            places.create(root / "lock.1", b"another")
