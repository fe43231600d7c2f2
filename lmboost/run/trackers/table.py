"""The trackers by their names, how a run's are opened, and by what they are found again."""

import functools
import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax

from lmboost import places, strict_json
from lmboost.errors import UserError, one_of
from lmboost.run.trackers.background import Background, Line, Seen
from lmboost.run.trackers.tracker import About, Tracker

FILE = "trackers.json"  # of a workdir: the id that each tracker has given the run


class Row(NamedTuple):
    """Where a tracker is, and whether it may keep its callers waiting. Its package comes with the extra of its name."""

    kind: str
    waits: bool = True


TRACKERS = {
    "tensorboard": Row("TensorBoard", waits=False),
    "wandb": Row("Wandb"),
    "mlflow": Row("Mlflow"),
    "trackio": Row("Trackio"),
}


def names_of(given: str, tensorboard: bool = True) -> tuple[str, ...]:
    """The names in log.trackers, each once; with log.tensorboard=False without that one.

    Raises a UserError on one that is not known.
    """
    names = [one_of("log.trackers", name.strip(), TRACKERS) for name in given.split(",") if name.strip()]
    return tuple(name for name in dict.fromkeys(names) if tensorboard or name != "tensorboard")


def check(names: Sequence[str]) -> None:
    """Raises a UserError where one of them cannot be used on this machine."""
    for name in names:
        if TRACKERS[name].waits and jax.process_index() == 0:  # the other processes write nothing
            find(name).check_machine()


def find(name: str) -> type[Tracker]:
    """The class; a UserError where its package is missing."""
    try:
        module = importlib.import_module(f"lmboost.run.trackers.{name}")
    except ImportError as error:
        raise UserError(
            f"log.trackers: {name!r} needs a package, and importing it failed ({error}): "
            f'pip install "lmboost[{name}]", or leave {name!r} out.'
        ) from error
    return getattr(module, TRACKERS[name].kind)


class Ids:
    """DIRECTORY/trackers.json. A UserError where it is damaged."""

    def __init__(self, directory: str):
        self._path, self._lock = os.path.join(directory, FILE), threading.Lock()
        hint = "Mend it, or remove it, and the trackers begin new runs."
        try:
            self._ids = strict_json.read(self._path, {f"{name}?": str for name in TRACKERS}, hint)
        except FileNotFoundError:
            self._ids = {}

    def get(self, name: str) -> str:
        return self._ids.get(name, "")

    def keep(self, name: str, tracker: Tracker) -> None:
        """For the next start of the run; called from the trackers' threads."""
        with self._lock:
            if self.get(name) != tracker.id:
                self._ids[name] = tracker.id
                places.write(self._path, json.dumps(self._ids))


def open_all(
    names: Sequence[str],
    about: About,
    directory: str,
    start: int,
    ids: Ids,
    seen: Seen,
    earlier: Callable[[], Iterable[Line]],
) -> list[Tracker | Background]:
    """The trackers of a run that goes on from the step `start`; see `Tracker` for the other arguments.

    A tracker that an earlier start has opened goes on in the same run, without what it has `seen`; a new one is given
    the `earlier` lines first.

    Raises an OSError where files of TensorBoard's cannot be made.
    """
    opened: list[Tracker | Background] = []
    for name in names:
        id = ids.get(name)
        make = functools.partial(find(name), about, directory, start, id)
        if TRACKERS[name].waits:
            keep = functools.partial(ids.keep, name)
            opened.append(Background(name, make, keep, **({"seen": seen} if id else {"earlier": earlier()})))
        else:
            opened.append(make())
    return opened


def close_all(trackers: Sequence[Tracker | Background], whole: bool, patience: float = 60.0) -> None:
    """Closes them, waiting so many seconds at most for what they have not sent."""
    until = time.monotonic() + patience
    for tracker in trackers:
        tracker.close(whole)
    for tracker in trackers:
        if isinstance(tracker, Background):
            tracker.wait(until)
