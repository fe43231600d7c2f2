"""Where the wall clock of a run went: to steps, or to starting, restoring, compiling, waiting, evaluating, saving.

WORKDIR/goodput.jsonl is appended to over all attempts (starts of the process) of a run, one JSON object a line:

    {"attempt": 1760000000.0, "step": 200, "start_step": 100, "time": 1760000060.0, "seconds": {"step": 41.5, ...}}

"attempt" is when the process began, "time" when the line was written, "seconds" what the attempt has spent so far.
Two more kinds follow from the attempts together: "lost" are steps that were trained, lost in a crash and trained
again, and "restarting" is the time from the last line of an attempt to the beginning of the next.
"""

import contextlib
import dataclasses
import itertools
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath

from lmboost.run import lines

FILE = "goodput.jsonl"
KINDS = ("start", "restore", "compile", "data", "step", "evaluate", "save")
_SECONDS = {"step": float} | {f"{kind}?": float for kind in KINDS}
_FIELDS = {"attempt": float, "step": int, "start_step": int, "time": float, "seconds": _SECONDS}


def process_start() -> float:
    """Wall-clock time, in seconds, at which this process began; now where the system does not tell."""
    now = time.time()
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # the name before may hold spaces and brackets
            age = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - max(age, 0.0)


class Clock:
    """Books the time of one attempt to kinds and writes it down. Of several processes only the first one writes.

    Until `begin`, time outside of `measure` is "start"; after it, "step". Nothing is written before `begin`, so an
    attempt that fails earlier counts as "restarting".

    Args:
      directory: local directory of goodput.jsonl; made if it is missing.
      started: wall-clock time at which the attempt began, as of `process_start`; None is now.
      clock: for tests.
    """

    def __init__(self, directory: str, started: float | None = None, clock: Callable[[], float] = time.time):
        self._directory, self._clock = directory, clock
        self._since = self._attempt = clock() if started is None else started
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kinds = ["start"]  # the kind outside, and what is measured inside of it
        self._start_step: int | None = None
        self._written = 0.0
        self._lines: lines.Lines | None = None

    def begin(self, start_step: int) -> None:
        """The loop begins, at the step that the run goes on from: what follows are steps, where nothing is measured.

        A file that cannot be opened does not end the run: stderr says so, and where the time goes is not written down.
        """
        self._book()
        self._start_step, self._kinds[0] = start_step, "step"
        path = os.path.join(self._directory, FILE)
        try:
            if jax.process_index() == 0:
                os.makedirs(self._directory, exist_ok=True)
                self._lines = lines.Lines(path)
        except OSError as error:
            lines.tell(f"{path} cannot be written ({error.strerror}): the run goes on, its time is not written down.")
        self.write(start_step)

    @contextlib.contextmanager
    def measure(self, kind: str, busy: Callable[[], bool] | None = None) -> Iterator[None]:
        """Books the time inside to `kind`; what is measured within it counts there alone.

        Args:
          busy: asked at the end: whether the devices were at work all the while. Then nothing was lost by waiting,
            and the time goes to the kind outside.
        """
        self._book()
        self._kinds.append(kind)
        try:
            yield
        finally:
            if busy is None or not busy():
                self._book()
            self._kinds.pop()

    def write(self, step: int, at_least: float = 0.0) -> None:
        """Appends a line, `step` steps being done, if the last one is `at_least` so many seconds old.

        A disk that fills up does not end the run, see `lines.Appender`.
        """
        now = self._book()
        if not self._lines or now - self._written < at_least:
            return
        self._written = now
        spent = {kind: round(seconds, 3) for kind, seconds in self._seconds.items()}
        attempt = {"attempt": self._attempt, "step": step, "start_step": self._start_step}
        self._lines.write(attempt | {"time": now, "seconds": spent})

    def check(self) -> None:
        """See `lines.Appender.check`."""
        if self._lines:
            self._lines.check()

    def close(self) -> None:
        """Closes the file."""
        if self._lines:
            self._lines.close()
        self._lines = None

    @property
    def share(self) -> float:
        """The steps' share of this attempt so far."""
        self._book()
        return self._seconds["step"] / (sum(self._seconds.values()) or 1.0)

    def summary(self) -> str:
        """Where this attempt's time went, in words, largest first."""
        self._book()
        total = sum(self._seconds.values()) or 1.0
        kinds = sorted(self._seconds, key=self._seconds.get, reverse=True)
        parts = [f"{kind} {self._seconds[kind] / total:.0%}" for kind in kinds if self._seconds[kind] >= 0.005 * total]
        return f"{total:.0f} s: {', '.join(parts)}"

    def _book(self) -> float:
        now = self._clock()
        self._seconds[self._kinds[-1]] += max(now - self._since, 0.0)  # clocks are set back at times
        self._since = now
        return now


@dataclasses.dataclass(frozen=True)
class Goodput:
    """What all attempts of a run were spent on.

    Attributes:
      attempts: how often the run was started and came as far as its loop.
      wall: seconds from the first start to the last line.
      seconds: by kind; KINDS, "lost" and "restarting". "step" is without what was lost.
    """

    attempts: int
    wall: float
    seconds: Mapping[str, float]

    def share(self, kind: str) -> float:
        """The share of a kind in all of them."""
        return self.seconds[kind] / (sum(self.seconds.values()) or 1.0)


def read(workdir: str) -> Goodput | None:
    """What WORKDIR/goodput.jsonl says of all attempts; None where there is no such file or no whole line in it.

    `workdir` may be remote (gs://). Lines that a kill or a full disk left half written are passed over: seconds are
    cumulative, so that the next line holds all that they held. What came after an attempt's last line is "restarting".

    Raises a UserError naming the line where one is JSON, but not of this kind.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    written = lines.read(path, "one that training writes", _FIELDS, torn=True)
    attempts = [list(group) for _, group in itertools.groupby(written, key=operator.itemgetter("attempt"))]
    if not attempts:
        return None

    seconds = dict.fromkeys((*KINDS, "lost", "restarting"), 0.0)
    goes_on = math.inf  # the earliest step that a later attempt began with
    for attempt in reversed(attempts):
        last = attempt[-1]
        for kind in KINDS:
            seconds[kind] += last["seconds"].get(kind, 0.0)
        if goes_on < last["step"]:
            at = [line["step"] for line in attempt]
            spent = [line["seconds"]["step"] for line in attempt]
            lost = spent[-1] - float(np.interp(goes_on, at, spent, left=0.0))
            seconds["step"] -= lost
            seconds["lost"] += lost
        goes_on = min(goes_on, last["start_step"])
    for before, after in itertools.pairwise(attempts):
        seconds["restarting"] += max(after[0]["attempt"] - before[-1]["time"], 0.0)
    return Goodput(len(attempts), attempts[-1][-1]["time"] - attempts[0][0]["attempt"], seconds)
