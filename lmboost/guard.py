"""What keeps a run from harm: the notice to stop, the watch over its progress, the lock on its directory."""

import contextlib
import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from lmboost import logdir
from lmboost.errors import EXIT_HUNG, UserError, exit_at_once


class Preemption:
    """Whether the run has been asked to stop: SIGTERM, which is also how clusters announce that they take a machine.

    Of several processes each may be told at another time; jax agrees with all of them on the boundary to stop at.
    """

    def __init__(self):
        self._told = False
        self._alone = jax.process_count() == 1
        self._before = None
        if self._alone and threading.current_thread() is threading.main_thread():  # else jax has taken the signal
            self._before = signal.signal(signal.SIGTERM, self._take)

    def _take(self, *_) -> None:
        self._told = True

    def told(self) -> bool:
        """Whether a process that is alone has been told to stop; several must go on to where `reached` says so."""
        return self._told

    def reached(self, step: int) -> bool:
        """Whether to stop before `step`. All processes must ask, once before each step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Gives the signal back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        self._before = None


class Watchdog:
    """Ends the process with status 76 when nothing has moved for `seconds`, with the stacks of all threads on stderr.

    A collective that waits for a lost host waits for ever; a launcher can only mend what has ended. 0 is no watch.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._last, self._what = time.monotonic(), "starting"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    def beat(self, what: str) -> None:
        """Says that the run goes on, and what it does next."""
        self._last, self._what = time.monotonic(), what

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """No watch over what may take as long as it likes."""
        self._last = float("inf")
        yield
        self.beat(self._what)

    def close(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 10, 10)):
            if time.monotonic() - self._last > self._seconds:
                print(
                    f"HUNG: process {jax.process_index()} has not moved for {self._seconds:g} s (watchdog.seconds) "
                    f"while {self._what}. Every thread stands at:",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                faulthandler.dump_traceback(all_threads=True)
                exit_at_once(EXIT_HUNG)


class Lock:
    """One run per directory: a second one is refused while the first is alive.

    On a file system that has locks the kernel gives them back when a process dies, however it dies. Elsewhere (object
    stores) the file is a lease that is renewed every minute: after a kill, the next start waits for it to run out.
    """

    LEASE = 180.0  # seconds after which a lease that was not renewed is void

    def __init__(self, workdir: str):
        self._path = logdir.find(workdir) / "lock"
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
        if "://" in str(self._path):  # an object is whole or not there
            self._path.write_text(mark)
        else:
            partial = self._path.with_name(f"lock.{os.getpid()}")
            partial.write_text(mark)
            partial.replace(self._path)  # one who reads meanwhile must not take an empty file for a free directory

    def _keep(self) -> None:
        while not self._ended.wait(self.LEASE / 6):
            try:
                self._renew()
            except OSError as error:
                print(
                    f"WARNING: {self._path} could not be renewed ({error}); trying again", file=sys.stderr, flush=True
                )

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
