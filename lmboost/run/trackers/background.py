"""A tracker in a thread of its own: what it waits for does not hold up the loop, and what it fails at ends no run."""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from lmboost.places import brief
from lmboost.run.processes import say, warn
from lmboost.run.trackers.tracker import Tracker

Line = tuple[int, Mapping[str, float]]  # step, its numbers


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a tracker has of a run already: all steps before one, and of that one the numbers of these names."""

    step: int = -1
    names: frozenset[str] = frozenset()

    def new(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Those numbers that it has not. A run that goes on computes steps again, and comes to the same."""
        if step < self.step:
            return {}
        return {name: v for name, v in values.items() if step > self.step or name not in self.names}


class Background:
    """Hands lines to a tracker, in order, in a thread.

    This is the one place where an error of a library is not passed on: metrics.jsonl has every number, and a run of
    weeks must not end because a server does not answer. The first failure is told, and at the end what is missing.

    Args:
      name: of the tracker.
      make: opens it.
      opened: is told of it, when it is open.
      seen: what it has from earlier starts; that is not written again.
      earlier: lines that it is given first.
      limit: of lines that wait; further ones are left out.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        opened: Callable[[Tracker], None],
        seen: Seen = Seen(),  # noqa: B008
        earlier: Iterable[Line] = (),
        limit: int = 10_000,
    ):
        self._name, self._make, self._opened, self._seen = name, make, opened, seen
        self._earlier, self._limit = earlier, limit
        self._queue: queue.SimpleQueue[Line | bool] = queue.SimpleQueue()
        self._lost: list[int] = []  # steps of lines that it has not taken
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Returns at once."""
        if not (values := self._seen.new(step, values)):
            return
        if self._queue.qsize() < self._limit:
            self._queue.put((step, values))
        else:
            self._lose(step, f"{self._limit:,} lines wait for it already")

    def check(self) -> None:
        """Nothing: a tracker that waits for others sees to its own files."""

    def close(self, whole: bool) -> None:
        """Has what is left sent, and returns at once; see `wait`. whole: whether the run has come to its end."""
        self._queue.put(whole)

    def wait(self, until: float) -> None:
        """Waits until everything is sent, or that time of time.monotonic, and says what is missing."""
        self._thread.join(max(until - time.monotonic(), 0.0))
        if self._thread.is_alive():
            warn(
                f"log.trackers: {self._name} has not taken everything in time: the run's last lines, "
                f"about {self._queue.qsize():,}, are in metrics.jsonl alone."
            )
        if lost := self._lost:
            warn(
                f"log.trackers: {len(lost)} lines of steps {min(lost)} to {max(lost)} are not in {self._name}, but in "
                "metrics.jsonl."
            )

    def _work(self) -> None:
        tracker = self._open()
        while not isinstance(line := self._queue.get(), bool):
            if tracker:
                self._write(tracker, *line)
            else:
                self._lost.append(line[0])
        if tracker:
            try:
                tracker.close(line)
            except Exception as error:  # each library has its own, here and below
                warn(f"log.trackers: {self._name} could not be closed ({brief(error)}): its last lines may be missing.")

    def _open(self) -> Tracker | None:
        try:
            tracker = self._make()
            for line in self._earlier:
                tracker.write(*line)
            self._opened(tracker)
        except Exception as error:
            warn(
                f"log.trackers: {self._name} could not be opened ({brief(error)}). The run goes on without it, "
                "metrics.jsonl has its numbers, and its next start tries again."
            )
            return None
        say(f"{self._name}: {tracker.where}")
        return tracker

    def _write(self, tracker: Tracker, step: int, values: Mapping[str, float]) -> None:
        try:
            tracker.write(step, values)
        except Exception as error:
            self._lose(step, brief(error))

    def _lose(self, step: int, why: str) -> None:
        if not self._lost:
            warn(
                f"log.trackers: {self._name} has not taken the numbers of step {step} ({why}). The run goes on, and "
                "metrics.jsonl has them; what follows like this is counted, and told at the end."
            )
        self._lost.append(step)
