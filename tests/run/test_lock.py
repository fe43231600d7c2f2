"""The lock on a workdir, and the lease where there are no locks."""

import contextlib
import json
import threading
import time

import pytest

from lmboost import places
from lmboost.errors import UserError
from lmboost.run import lock as locks


def test_a_workdir_is_locked_until_it_is_closed(tmp_path):
    first = locks.Lock(str(tmp_path))
    with pytest.raises(UserError, match=r'is in use by a run that is alive \({"host": .*"pid": '):
        locks.Lock(str(tmp_path))
    first.close()
    locks.Lock(str(tmp_path)).close()


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run/lock cannot be written"):
        locks.Lock(str(tmp_path / "file" / "run"))


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, and leases of two seconds."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(locks.Lock, "LEASE", 2.0)


def test_a_lease_that_is_renewed_refuses_a_second_run(tmp_path, no_locks, capsys):
    first = locks.Lock(str(tmp_path))
    with pytest.raises(UserError, match="is in use by a run that is alive"):
        locks.Lock(str(tmp_path))
    assert "waiting" in capsys.readouterr().out
    first.close()
    assert not (tmp_path / "lock").exists()
    locks.Lock(str(tmp_path)).close()


def test_a_lease_is_never_seen_without_its_holder(tmp_path, no_locks):
    with contextlib.closing(locks.Lock(str(tmp_path))) as lock:
        for _ in range(40):
            renewing = threading.Thread(target=lock._renew)
            renewing.start()
            while renewing.is_alive():
                assert json.loads((tmp_path / "lock").read_text())["host"]
            renewing.join()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", ['{"host": "gone", "time": 9e15}', "garbage", "5", "", '{"time": "x"}', "\udcff\0"])
def test_what_a_killed_run_left_is_waited_for_once(tmp_path, no_locks, left):
    (tmp_path / "lock").write_bytes(left.encode(errors="surrogateescape"))
    began = time.monotonic()
    lock = locks.Lock(str(tmp_path))
    assert 1.9 < time.monotonic() - began < 20
    assert [path.name for path in tmp_path.iterdir()] == ["lock.1"]
    lock.close()
    assert not list(tmp_path.iterdir())


def test_of_many_that_start_together_one_holds(tmp_path, no_locks, monkeypatch):
    (tmp_path / "lock").write_text("left by a dead one")
    create = places.create

    def slow(path, content):
        time.sleep(0.2)  # the way to a bucket
        create(path, content)

    monkeypatch.setattr(places, "create", slow)
    held, refused = [], []

    def start():
        try:
            held.append(locks.Lock(str(tmp_path)))
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)
    held[0].check()
    held[0].close()


def test_a_holder_that_stood_still_ends_when_another_has_its_lease(tmp_path, no_locks, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(locks, "exit_at_once", lambda status: (first._ended.set(), ended.set()))
    first = locks.Lock(str(tmp_path))
    (tmp_path / "lock.1").write_text('{"host": "other"}')
    with pytest.raises(UserError, match=r'is in use by a run that is alive \({"host": "other"}\)'):
        first.check()
    assert ended.wait(5)
    assert "is in use" in capsys.readouterr().err
    assert (tmp_path / "lock.1").read_text() == '{"host": "other"}'


def test_a_lock_that_was_removed_is_taken_again_or_refused(tmp_path, capsys):
    first = locks.Lock(str(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved")
    first.check()
    assert "was removed or replaced" in capsys.readouterr().err
    with pytest.raises(UserError, match="is in use"):
        locks.Lock(str(tmp_path / "run"))
    (tmp_path / "run" / "lock").unlink()
    second = locks.Lock(str(tmp_path / "run"))
    with pytest.raises(UserError, match="is in use"):
        first.check()
    second.close()


@pytest.mark.parametrize("name", ["lock", "checkpoints", "metrics.jsonl", "tensorboard"])
def test_a_link_in_a_workdir_leads_nowhere(tmp_path, name):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    run.mkdir()
    (run / name).symlink_to(victim)
    with pytest.raises(UserError, match=rf"{name} is a link to '.*victim'"):
        locks.Lock(str(run))
    assert victim.read_text() == "precious"
    (tmp_path / "link").symlink_to(tmp_path / "free")
    (tmp_path / "free").mkdir()
    locks.Lock(str(tmp_path / "link")).close()  # the directory itself may be one
