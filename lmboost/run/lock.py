"""The lock on a directory that a process writes to: two that did would overwrite each other."""

import fcntl
import json
import os
import re
import socket
import sys
import threading
import time

import jax
from etils import epath

from lmboost import places
from lmboost.errors import EXIT_USER_ERROR, UserError, exit_at_once
from lmboost.run import processes

_NAME = re.compile(r"lock(?:\.(\d{1,18}))?")


class Lock:
    """One writer per directory: a second one is refused while the first is alive.

    On a file system that has locks the kernel gives them back when a process dies, however it dies. Elsewhere (object
    stores) it is a lease: a file `lock`, renewed every thirty seconds, that is taken over by making `lock.1`, then
    `lock.2`. The highest number holds. To make a file that is not there yet is the one thing that every store does for
    one of several askers alone, so two never take over the same lease, and a holder that stood still finds a higher
    number than its own, and ends. A lease is void when it has not changed for `LEASE` seconds by the clock of the one
    that waits; the holder's clock plays no part, nor does what is written in it.

    Raises:
      UserError: the directory is held by another, it cannot be written, or an entry of it is a link, see `places`.
    """

    LEASE = 180.0  # seconds after which a lease that was not renewed is void

    def __init__(self, directory: str, field: str = "--workdir"):
        self._directory, self._field = places.find(directory, field), field
        self._file = self._thread = None
        self._number = self._beats = 0  # of the lease
        self._ended = threading.Event()
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "id": os.urandom(8).hex()}
        if jax.process_index():
            return
        places.refuse_links(self._directory, field)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if "://" in directory:
                self._lease()
            else:
                self._lock()
        except OSError as error:
            raise UserError(f"{field}={directory}: {self._path()} cannot be written ({error}).") from error

    def _path(self, number: int = 0) -> epath.Path:
        return self._directory / (f"lock.{number}" if number else "lock")

    def _lock(self) -> None:
        there = os.path.lexists(self._path())
        descriptor = os.open(self._path(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._file = open(descriptor, "r+", errors="replace")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._file.read(500)
            self._file.close()
            raise self._refusal(holder) from error
        except OSError:  # a network file system without locks
            self._file.close()
            self._file = None
            if not there:
                self._path().unlink(missing_ok=True)
            return self._lease()
        self._file.truncate(0)
        self._file.write(json.dumps(self._me))
        self._file.flush()

    def _refusal(self, holder: str) -> UserError:
        return UserError(
            f"{self._field}={self._directory} is in use by a run that is alive ({holder or 'holder unknown'}): two "
            "would overwrite each other. End that one, or choose another directory."
        )

    def check(self) -> None:
        """Raises a UserError where the directory is another's by now; takes it again where the lock was removed."""
        if self._thread:
            self._check_newest()
        if self._file:
            path = self._path()
            try:
                same = os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(self._file.fileno()))
            except OSError:
                same = False
            if not same:
                processes.warn(f"{path} was removed or replaced while the run held it; it is taken again.")
                self._file.close()
                self._directory.mkdir(parents=True, exist_ok=True)
                self._lock()

    # ---------------------------------------------------------------- the lease

    def _lease(self) -> None:
        """Makes the lease, when nobody holds one."""
        seen, since = None, time.monotonic()
        while newest := self._newest():
            if seen and newest != seen:
                raise self._refusal(newest[1])
            seen = newest
            if (left := self.LEASE - (time.monotonic() - since)) <= 0:
                break
            print(f"{self._path(newest[0])} is held by {newest[1]}; waiting up to {left:.0f} s for it", flush=True)
            time.sleep(min(left, self.LEASE / 12))
        self._number = seen[0] + 1 if newest else 0
        try:
            places.create(self._path(self._number), self._mark())
        except FileExistsError as error:  # another was faster
            raise self._refusal("it has just begun") from error
        self._check_newest()
        for number in self._numbers():
            if number < self._number:
                self._path(number).unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _check_newest(self) -> None:
        """Raises a UserError where another's lease is newer than one's own."""
        if (newest := self._newest()) and newest[0] > self._number:
            raise self._refusal(newest[1])

    def _numbers(self) -> list[int]:
        try:
            found = [_NAME.fullmatch(path.name) for path in self._directory.iterdir()]
        except FileNotFoundError:  # in a bucket there is no empty directory
            return []
        return sorted(int(match[1] or 0) for match in found if match)

    def _newest(self) -> tuple[int, str] | None:
        """(number, content) of the newest lease, if there is one."""
        for number in self._numbers()[::-1]:
            try:
                return number, self._path(number).read_bytes()[:500].decode(errors="replace").strip()
            except FileNotFoundError:  # given free meanwhile
                continue
        return None

    def _mark(self) -> bytes:
        self._beats += 1
        return json.dumps(self._me | {"beat": self._beats}).encode()

    def _renew(self) -> None:
        self._check_newest()
        with places.whole_file(self._path(self._number)) as partial:
            partial.write_bytes(self._mark())

    def _keep(self) -> None:
        while not self._ended.wait(self.LEASE / 6):
            try:
                self._renew()
            except UserError as error:  # this process stood still for long, and is taken for dead
                print(f"error: {error}", file=sys.stderr, flush=True)
                exit_at_once(EXIT_USER_ERROR)
            except Exception as error:  # each store has its own
                processes.warn(f"{self._path(self._number)} could not be renewed ({error}); trying again")

    def close(self) -> None:
        """Gives the directory free."""
        if self._file:
            self._file.truncate(0)  # it stays: to remove it would race with a run that has just opened it
            self._file.close()
        if self._thread:
            self._ended.set()
            self._thread.join()
            self._path(self._number).unlink(missing_ok=True)
        self._file = self._thread = None
