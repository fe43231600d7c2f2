"""A tracker: where a run's numbers can be looked at, besides metrics.jsonl, which has all of them."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class About:
    """What a tracker is told of a run.

    Attributes:
      name: the last part of the workdir.
      project: that the run is one of, see `log.project`.
      manifest: with the resolved recipe as "config", and as "commit" that of the code.
    """

    name: str = ""
    project: str = ""
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The recipe's fields, and the rest of the manifest as one more, for trackers that keep a tree with a run."""
        rest = {name: value for name, value in self.manifest.items() if name != "config"}
        return {**self.manifest.get("config", {}), "manifest": rest}


class Tracker(abc.ABC):
    """One run in a tracker. It may raise whatever its library does; `background` sees to it that no run ends by that.

    Args of all of them:
      about: the run.
      directory: a local one, `LogDir.path` of the run.
      start: the step that the run goes on from.
      id: as a tracker had it that an earlier start of the run has opened; empty where there was none.

    Attributes:
      id: what finds the same run of the tracker again.
      where: to look for it.
    """

    id: str
    where: str

    @staticmethod
    def check_machine() -> None:
        """Raises a UserError where something is missing on this machine; asks no network."""
        return

    @abc.abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers of a step; those of one step may come in several calls, steps never fall."""

    def check(self) -> None:
        """Makes good, and says, where a file was removed or replaced since it was opened."""
        return

    @abc.abstractmethod
    def close(self, whole: bool) -> None:
        """Sends what is left. whole: whether the run has come to its end."""
