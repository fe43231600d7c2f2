"""What a run says of itself: console, metrics.jsonl, trackers, profiler traces, goodput.jsonl."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from lmboost import flops
from lmboost.errors import UserError
from lmboost.objective import terms
from lmboost.run import goodput, guard, metrics, processes, progress
from lmboost.run.logdir import LogDir
from lmboost.run.trackers import table
from lmboost.run.trackers.tracker import About

# Fields that every training line of metrics.jsonl has, null where there is no such number.
FIELDS = ("loss", "ce", *terms.MAIN_METRICS, "grad_norm", "learning_rate", "tokens_per_second", "mfu", "goodput")
SYNC_SECONDS = 60.0  # between uploads of a remote run's numbers, and between lines of goodput.jsonl


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run's numbers are computed from, and which are asked for; from `every` on, the config's `log` subtree."""

    steps: int
    tokens: Callable[[int], float]  # of the first so many steps
    flops: Callable[[int], float]  # model FLOPs of them
    max_nonfinite: int  # so many skipped steps in a row end the run
    name: str  # for trackers, as is the manifest
    manifest: Mapping[str, Any]
    every: int
    trackers: str
    tensorboard: bool
    project: str
    profile_from: int
    profile_steps: int


class RunLog:
    """Numbers of a run. A step's metrics are fetched while the next step runs: the device never waits for the host.

    Args:
      asked: what is to be written.
      directory: where files go.
      clock: of the attempt, which has begun; it is closed with the log.
      start: the step that the run goes on from.
    """

    def __init__(self, asked: Settings, directory: LogDir, clock: goodput.Clock, start: int):
        self._asked, self._start = asked, start
        self._directory, self._clock = directory, clock
        about = About(asked.name, asked.project, asked.manifest)
        self._writers = metrics.Writers(directory.path, start, table.names_of(asked.trackers, asked.tensorboard), about)
        self._progress = progress.Progress(asked.steps, start)
        self._running: tuple[int, metrics.Counted] | None = None  # (steps done after it, metrics) of the newest step
        self._since: tuple[int, float] | None = None  # (steps done, time) of the last logged step; None after a pause
        self._profiling = False
        self._done = start  # steps whose numbers are written
        self._skipped = 0.0  # steps, when that was said last

    @property
    def busy(self) -> bool:
        """Whether the devices are still at work on the newest step."""
        return self._running is not None and not self._running[1]["loss"][0].is_ready()

    def step(self, step: int, step_metrics: metrics.Counted) -> None:
        """Takes the metrics of `step`, which is running; waits for the step before, and writes its numbers."""
        before, self._running = self._running, (step + 1, step_metrics)
        self._finish(before)

    def _finish(self, running: tuple[int, metrics.Counted] | None) -> None:
        if running is None:
            return
        (done, counted), asked = running, self._asked
        if done % asked.every and done not in (self._start + 1, asked.steps):
            jax.block_until_ready(counted["loss"])  # so that the host is one step ahead, not ten
            return
        values: dict[str, Any] = metrics.mean(jax.device_get(counted))
        now = time.monotonic()
        if self._since:
            steps, seconds = done - self._since[0], now - self._since[1]
            values["tokens_per_second"] = (asked.tokens(done) - asked.tokens(done - steps)) / seconds
            rate = (asked.flops(done) - asked.flops(done - steps)) / seconds
            values["mfu"] = flops.mfu(rate, jax.devices()[0].device_kind, jax.device_count())
        self._since = (done, now)
        values["goodput"] = self._clock.share
        self._write(done, {n: values.get(n) for n in FIELDS} | self._progressed(done) | values)
        self._progress.update(done, values)
        if values["skipped"] > 2 * self._skipped:  # not at each of them
            self._skipped = values["skipped"]
            processes.warn(
                f"step {done}: {self._skipped:.0f} steps so far had no finite loss or gradient, and changed nothing."
            )
        self._clock.write(done, SYNC_SECONDS)
        self._directory.sync(SYNC_SECONDS)
        if values["skipped_in_a_row"] >= asked.max_nonfinite:
            raise UserError(
                f"step {done}: the loss or its gradient was not finite in {values['skipped_in_a_row']:.0f} steps in a "
                f"row (max_nonfinite={asked.max_nonfinite}); those steps were skipped and the parameters are as before "
                "them. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or set optimizer.clip_norm."
            )

    def validation(self, done: int, values: dict[str, float]) -> None:
        """Writes the numbers of an evaluation after `done` steps."""
        self.pause()
        self._write(done, self._progressed(done) | values)
        self._progress.evaluation(done, values)

    def check(self) -> None:
        """Makes good, and says, where a file was removed or replaced since it was opened."""
        self._writers.check()
        self._clock.check()

    def saved(self, done: int) -> None:
        """Brings the numbers to where the checkpoint of `done` steps is."""
        self._clock.write(done)
        self._directory.sync()

    def profile(self, step: int) -> None:
        """Starts and ends the profiler trace that the config asks for."""
        first, length = self._asked.profile_from, self._asked.profile_steps
        if step == first:
            jax.profiler.start_trace(os.path.join(self._directory.path, "profile"))
            self._profiling = True
        elif self._profiling and step >= first + length:
            self._end_profile()

    def pause(self) -> None:
        """Waits for the newest step; the time until the next logged one is left out of tokens per second."""
        before, self._running = self._running, None
        self._finish(before)
        self._since = None

    def close(self) -> None:
        """Closes the files; what is still pending is not waited for."""
        self._end_profile()
        self._progress.close()
        self._writers.close(whole=self._done >= self._asked.steps)
        self._clock.close()

    def _write(self, done: int, values: Mapping[str, Any]) -> None:
        self._writers.write(done, values)
        self._done = done

    def _end_profile(self) -> None:
        if self._profiling:
            jax.profiler.stop_trace()
        self._profiling = False

    def _progressed(self, done: int) -> dict[str, float]:
        return {"tokens": self._asked.tokens(done), "flops": self._asked.flops(done)}


class Parts(NamedTuple):
    """The parts of a run's loop, as in `with part("saving step 40", "save"):`, told to watchdog, clock and log."""

    watch: guard.Watchdog
    clock: goodput.Clock
    log: RunLog

    @contextlib.contextmanager
    def __call__(
        self, what: str, kind: str, pause: bool = False, patient: bool = False, busy: Callable[[], bool] | None = None
    ) -> Iterator[None]:
        """What the run does, for the watchdog, and the kind of goodput.KINDS to which the time inside is booked.

        Args:
          pause: whether it is left out of tokens per second; then the newest step is waited for before.
          patient: whether it may take as long as it likes.
          busy: see `Clock.measure`.
        """
        self.watch.beat(what)
        if pause:
            self.log.pause()
        with self.clock.measure(kind, busy), self.watch.patient() if patient else contextlib.nullcontext():
            yield
