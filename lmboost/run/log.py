"""What a run says of itself: console, metrics.jsonl, TensorBoard, profiler traces, goodput.jsonl."""

import os
import time
from typing import Any

import jax

from lmboost import flops
from lmboost.errors import UserError
from lmboost.plan import Plan
from lmboost.run import goodput, metrics, progress
from lmboost.run.logdir import LogDir

# Fields that every training line of metrics.jsonl has, null where there is no such number.
FIELDS = (
    "loss", "ce", "kd", "align", "kept_fraction", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "goodput",
)  # fmt: skip
SYNC_SECONDS = 60.0  # between uploads of a remote run's numbers, and between lines of goodput.jsonl


class RunLog:
    """Numbers of a run. A step's metrics are fetched while the next step runs: the device never waits for the host.

    Args:
      run: what is trained.
      directory: where files go.
      clock: of the attempt, which has begun.
      start: the step that the run goes on from.
    """

    def __init__(self, run: Plan, directory: LogDir, clock: goodput.Clock, start: int):
        self._run, self._start, self._directory, self._time = run, start, directory, clock
        self._writers = metrics.Writers(directory.path, run.config.log.tensorboard, start)
        self._progress = progress.Progress(run.config.steps, start)
        self._running: tuple[int, metrics.Sums] | None = None  # (steps done after it, metrics) of the newest step
        self._clock = None  # (step, time) when the last logged step was done
        self._profiling = False

    @property
    def busy(self) -> bool:
        """Whether the devices are still at work on the newest step."""
        return self._running is not None and not self._running[1]["loss"][0].is_ready()

    def step(self, step: int, step_metrics: metrics.Sums) -> None:
        """Takes the metrics of `step`, which is running; waits for the step before, and writes its numbers."""
        before, self._running = self._running, (step + 1, step_metrics)
        self._finish(before)

    def flush(self) -> None:
        """Waits for the newest step, and writes its numbers."""
        before, self._running = self._running, None
        self._finish(before)

    def _finish(self, running: tuple[int, metrics.Sums] | None) -> None:
        if running is None:
            return
        done, sums = running
        if done % self._run.config.log.every and done not in (self._start + 1, self._run.config.steps):
            jax.block_until_ready(sums["loss"])  # so that the host is one step ahead, not ten
            return
        values: dict[str, Any] = metrics.mean(jax.device_get(sums))
        c, now = self._run.config, time.monotonic()
        if self._clock:
            steps, seconds = done - self._clock[0], now - self._clock[1]
            values["tokens_per_second"] = steps * c.batch_size * c.seq_len / seconds
            rate = (self._run.flops(done) - self._run.flops(done - steps)) / seconds
            values["mfu"] = flops.mfu(rate, jax.devices()[0].device_kind, jax.device_count())
        self._clock = (done, now)
        values["goodput"] = self._time.share
        self._writers.write(done, {n: values.get(n) for n in FIELDS} | self._progressed(done) | values)
        self._progress.update(done, values)
        self._time.write(done, SYNC_SECONDS)
        self._directory.sync(SYNC_SECONDS)
        if values["skipped_in_a_row"] >= c.max_nonfinite:
            raise UserError(
                f"step {done}: the loss or its gradient was not finite in {values['skipped_in_a_row']:.0f} steps in a "
                f"row (max_nonfinite={c.max_nonfinite}); those steps were skipped and the parameters are as before "
                "them. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or set optimizer.clip_norm."
            )

    def validation(self, done: int, values: dict[str, float]) -> None:
        """Writes the numbers of an evaluation after `done` steps."""
        self.pause()
        self._writers.write(done, self._progressed(done) | values)
        self._progress.evaluation(done, values)

    def saved(self, done: int) -> None:
        """Brings the numbers to where the checkpoint of `done` steps is."""
        self._time.write(done)
        self._directory.sync()

    def profile(self, step: int) -> None:
        """Starts and ends the profiler trace that the config asks for."""
        first, length = self._run.config.log.profile_from, self._run.config.log.profile_steps
        if step == first:
            jax.profiler.start_trace(os.path.join(self._directory.path, "profile"))
            self._profiling = True
        elif self._profiling and step >= first + length:
            self._end_profile()

    def pause(self) -> None:
        """Leaves the time until the next logged step out of tokens per second: evaluation, saving, compiling."""
        self.flush()
        self._clock = None

    def close(self) -> None:
        """Closes the files; what is still pending is not waited for."""
        self._end_profile()
        self._progress.close()
        self._writers.close()

    def _end_profile(self) -> None:
        if self._profiling:
            jax.profiler.stop_trace()
        self._profiling = False

    def _progressed(self, done: int) -> dict[str, float]:
        c = self._run.config
        return {"tokens": done * c.batch_size * c.seq_len, "flops": self._run.flops(done)}
