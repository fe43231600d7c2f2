"""The lock on a workdir, and the lease where there are no locks."""

import contextlib
import json
import threading
import time

import pytest

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
    """A file system without locks, and leases of five seconds."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(locks.Lock, "LEASE", 5.0)


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


def test_the_lease_of_a_run_that_was_killed_runs_out(tmp_path, no_locks):
    (tmp_path / "lock").write_text(json.dumps({"host": "gone", "pid": 1, "time": time.time()}))
    began = time.monotonic()
    lock = locks.Lock(str(tmp_path))
    assert 4.5 < time.monotonic() - began < 60
    lock.close()
    (tmp_path / "lock").write_text(json.dumps({"host": "gone", "pid": 1, "time": time.time() - 6}))
    began = time.monotonic()
    locks.Lock(str(tmp_path)).close()
    assert time.monotonic() - began < 4
