"""Metrics on the host: (sum, count) pairs, the run's metrics.jsonl, and its trackers."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from lmboost import places
from lmboost.errors import UserError
from lmboost.run import lines
from lmboost.run.trackers import table
from lmboost.run.trackers.background import Line, Seen
from lmboost.run.trackers.tracker import About

FILE = "metrics.jsonl"
# Of its lines, what is read again; NaN and infinities were written as null.
_READ = ("tokens", "flops", "val_loss", "val_perplexity", "val_bits_per_byte")
_EXPECTED = {"step": int} | {f"{name}?": float | None for name in _READ}
Counted = Mapping[str, tuple[Any, Any]]  # name -> (sum, count)


def mean(metrics: Counted) -> dict[str, float | None]:
    """{name: (sum, count)} as {name: sum / count}; None where nothing was counted."""
    return {k: float(total) / float(count) if float(count) else None for k, (total, count) in metrics.items()}


class Writers:
    """Writes a run's numbers: one strict JSON object per line to DIRECTORY/metrics.jsonl, and to the trackers.

    Of several processes only the first one writes. A disk that fills up does not end the run, see `lines.Appender`.

    Args:
      directory: a local one, `LogDir.path` of the run; made if it is missing.
      resume_step: the step that the run goes on from. Lines of later steps are dropped (they are about to be
        computed again), as is a last line that a kill left half written; 0 starts afresh and drops all.
      trackers: names in `table.TRACKERS`.
      about: what they are told of the run.

    Raises:
      UserError: a metrics.jsonl that holds something else than one JSON object per line, a directory that
        cannot be written to, a trackers.json that is damaged.
    """

    def __init__(
        self,
        directory: str,
        resume_step: int = 0,
        trackers: Sequence[str] = (),
        about: About = About(),  # noqa: B008, it is frozen
    ):
        self._lines, self._trackers = None, []
        if jax.process_index():
            return
        path = os.path.join(directory, FILE)
        try:
            os.makedirs(directory, exist_ok=True)
            ids, seen, count = table.Ids(directory), Seen(), 0
            if os.path.exists(path):
                seen = _newest(directory) if any(map(ids.get, trackers)) else seen
                kept = read(directory) if resume_step else ()
                count = lines.rewrite(path, (line for line in kept if line["step"] <= resume_step))
            self._lines = lines.Lines(path)

            def earlier() -> Iterator[Line]:  # each tracker reads for itself, in its thread
                return ((line["step"], _numbers(line)) for line in itertools.islice(read(directory), count))

            self._trackers = table.open_all(trackers, about, directory, resume_step, ids, seen, earlier)
        except OSError as error:
            path = error.filename or path
            raise UserError(f"--workdir={directory}: {path} cannot be written ({error.strerror}).") from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the numbers of one step; None, NaN and infinities become null in the JSON line."""
        values = {k: getattr(v, "item", lambda v=v: v)() for k, v in values.items()}  # numpy and jax scalars
        if self._lines:
            self._lines.write({"step": int(step)} | values)
        numbers = _numbers(values)
        for tracker in self._trackers:
            tracker.write(int(step), numbers)

    def check(self) -> None:
        """See `lines.Appender.check`."""
        for writer in (self._lines, *self._trackers):
            if writer:
                writer.check()

    def close(self, whole: bool = False) -> None:
        """Closes the files and the trackers. whole: whether the run has come to its end."""
        if self._lines:
            self._lines.close()
        table.close_all(self._trackers, whole)
        self._lines, self._trackers = None, []


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}


def _newest(directory: str) -> Seen:
    """The last step of DIRECTORY/metrics.jsonl, and which of its numbers are there."""
    step, names = -1, frozenset()
    for line in read(directory):
        names = frozenset(line) | (names if line["step"] == step else frozenset())
        step = line["step"]
    return Seen(step, names)


def read(workdir: str) -> Iterator[dict[str, Any]]:
    """The lines of WORKDIR/metrics.jsonl in order; a last line that is half written is left out. Reads gs://, too.

    Raises a UserError naming the line where another one is not a JSON object with a step.
    """
    return lines.read(places.find(workdir) / FILE, "a JSON object with a step", _EXPECTED)


def take_over(directory: str, run: epath.Path, step: int) -> None:
    """Begins DIRECTORY/metrics.jsonl with what a run in another workdir wrote up to the step that is gone on from.

    Nothing is done where the file exists, or where the other `run` wrote none.

    Raises a UserError where the old file cannot be read or the new one not be written.
    """
    path = os.path.join(directory, FILE)
    if jax.process_index() or os.path.exists(path) or not (run / FILE).exists():
        return
    try:
        os.makedirs(directory, exist_ok=True)
        lines.rewrite(path, (line for line in read(os.fspath(run)) if line["step"] <= step))
    except OSError as error:
        raise UserError(f"resume.path: {run / FILE} cannot be copied to {path} ({error.strerror or error}).") from error
