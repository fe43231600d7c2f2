"""What keeps a run from harm: the notice to stop, and the watch over its progress."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from lmboost.errors import EXIT_HUNG, EXIT_INTERRUPTED, exit_at_once
from lmboost.run import notice


class Preemption:
    """Whether the run has been asked to stop: by SIGTERM, with which clusters also announce that they take a machine,
    SIGINT or SIGHUP.

    Of several processes each may be told at another time; jax agrees with all of them on the boundary to stop at. A
    second SIGINT ends the process at once.
    """

    def __init__(self):
        self._told, self._interrupts = False, 0
        self._alone = jax.process_count() == 1
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            others = [number for number in notice.NUMBERS if self._alone or number != signal.SIGTERM]
            self._before = notice.listen(self._take, others)  # of several, jax itself has taken SIGTERM

    def _take(self, number: int, _: Any) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(EXIT_INTERRUPTED)
        if self._alone:
            self._told = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # of which jax tells the others

    def told(self) -> bool:
        """Whether a process that is alone has been told to stop; several must go on to where `reached` says so."""
        return self._told

    def reached(self, step: int) -> bool:
        """Whether to stop before `step`. All processes must ask, once before each step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Gives the signal back to whoever had it."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


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
