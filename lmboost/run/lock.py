"""The lock on a run's directory: two runs would overwrite each other."""

import fcntl
import json
import os
import socket
import threading
import time

import jax

from lmboost import places
from lmboost.errors import UserError
from lmboost.run import processes


class Lock:
    """One run per directory: a second one is refused while the first is alive.

    On a file system that has locks the kernel gives them back when a process dies, however it dies. Elsewhere (object
    stores) the file is a lease that is renewed every minute: after a kill, the next start waits for it to run out.
    """

    LEASE = 180.0  # seconds after which a lease that was not renewed is void

    def __init__(self, workdir: str):
        self._path = places.find(workdir) / "lock"
        self._file = self._thread = None
        self._ended = threading.Event()
        self._me = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": os.urandom(8).hex()})
        if jax.process_index():
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if "://" in workdir:
                self._lease()
            else:
                self._lock()
        except OSError as error:
            raise UserError(f"--workdir={workdir}: {self._path} cannot be written ({error}).") from error

    def _lock(self) -> None:
        self._file = open(self._path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read()
            self._file.close()
            raise self._refusal(holder) from error
        except OSError:  # a network file system without locks
            self._file.close()
            self._file = None
            return self._lease()
        self._file.truncate(0)
        self._file.write(self._me)
        self._file.flush()

    def _refusal(self, holder: str) -> UserError:
        return UserError(
            f"--workdir={self._path.parent} is in use by a run that is alive ({holder or 'holder unknown'}): two runs "
            "would overwrite each other. End that one, or choose another workdir."
        )

    def _lease(self) -> None:
        found = self._read()
        while found and (left := json.loads(found).get("time", 0) + self.LEASE - time.time()) > 0:
            print(f"{self._path} is held by {found}; waiting {left:.0f} s for it to run out", flush=True)
            time.sleep(min(left, self.LEASE / 12))
            if (now := self._read()) and now != found:
                raise self._refusal(now)
            found = now
        self._renew()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _read(self) -> str:
        return self._path.read_text() if self._path.exists() else ""

    def _renew(self) -> None:
        mark = self._me[:-1] + f', "time": {time.time():.0f}}}'
        with places.whole_file(self._path) as partial:  # an empty file would be taken for a free directory
            partial.write_text(mark)

    def _keep(self) -> None:
        while not self._ended.wait(self.LEASE / 6):
            try:
                self._renew()
            except OSError as error:
                processes.warn(f"{self._path} could not be renewed ({error}); trying again")

    def close(self) -> None:
        """Gives the directory free."""
        if self._file:
            self._file.truncate(0)  # it stays: to remove it would race with a run that has just opened it
            self._file.close()
        if self._thread:
            self._ended.set()
            self._thread.join()
            self._path.unlink(missing_ok=True)
        self._file = self._thread = None
