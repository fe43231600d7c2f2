"""Weights & Biases. WANDB_MODE, WANDB_ENTITY and its other variables hold; files lie in WORKDIR/wandb."""

import os
import secrets
from collections.abc import Mapping

import wandb
from wandb import Settings

from lmboost.errors import UserError
from lmboost.run.trackers.tracker import About, Tracker

_FINISH_SECONDS = 45.0  # for what is left at the end; what was not sent by then stays in the files


class Wandb(Tracker):
    """A run of W&B, whose own process does the sending.

    What the run prints is not sent. A later start writes on with the same id; with WANDB_MODE=offline each start has
    a directory of its own, and `wandb sync` puts them together.
    """

    def __init__(self, about: About, directory: str, start: int, id: str = ""):
        self.id = id or secrets.token_hex(8)
        self._run = wandb.init(
            project=about.project,
            name=about.name,
            id=self.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR") or directory,
            settings=Settings(console="off", silent=True, finish_timeout=_FINISH_SECONDS),
        )
        self._run.config.update(about.config, allow_val_change=True)  # log.every and its like may change between starts
        self.where = self._run.dir if self._run.offline else self._run.url

    @staticmethod
    def check_machine() -> None:
        if wandb.setup().settings.mode != "online":
            return
        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                "log.trackers: 'wandb' has no API key. Run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline, "
                "and `wandb sync` later."
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)
