"""Trackio, on this machine or, by TRACKIO_SPACE_ID or TRACKIO_SERVER_URL, on another one."""

import secrets
from collections.abc import Mapping

from trackio import init

from lmboost.run.trackers.tracker import About, Tracker


class Trackio(Tracker):
    """A run of Trackio, which knows runs by their names: that of the workdir, made distinct."""

    def __init__(self, about: About, directory: str, start: int, id: str = ""):
        self.id = id or f"{about.name}-{secrets.token_hex(4)}"
        self._run = init(
            project=about.project,
            name=self.id,
            config=about.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = f"run {self.id} of project {about.project}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, whole: bool) -> None:
        self._run.finish()
