"""MLflow. MLFLOW_TRACKING_URI and its other variables hold; without them it is MLflow's default."""

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from lmboost.run.trackers.tracker import About, Tracker

_PARAMS, _LONGEST = 100, 6000  # that MLflow takes in one call; characters of one
_NOT_IN_NAMES = re.compile(r"[^\w .:/-]")


class Mlflow(Tracker):
    """A run of MLflow: the recipe's fields are its parameters, the manifest is a file of it.

    MLflow lets no parameter change, so they are those of the run's first start.
    """

    def __init__(self, about: About, directory: str, start: int, id: str = ""):
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # MLflow asks again for minutes, and each time is told
        self._client = MlflowClient()
        self.id = id or self._begin(about)
        self._client.update_run(self.id, status="RUNNING")
        self._client.log_dict(self.id, dict(about.manifest), "manifest.json")
        self.where = f"run {self.id} in {self._client.tracking_uri}"

    def _begin(self, about: About) -> str:
        found = self._client.get_experiment_by_name(about.project)
        experiment = found.experiment_id if found else self._client.create_experiment(about.project)
        commit = about.manifest.get("commit")
        tags = {"mlflow.source.git.commit": commit} if commit else {}
        run = self._client.create_run(experiment, run_name=about.name, tags=tags).info.run_id
        params = [Param(name, str(value)[:_LONGEST]) for name, value in _flat(about.manifest.get("config", {}))]
        for i in range(0, len(params), _PARAMS):
            self._client.log_batch(run, params=params[i : i + _PARAMS])
        return run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.time_ns() // 10**6  # milliseconds
        numbers = [Metric(_NOT_IN_NAMES.sub("_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=numbers)

    def close(self, whole: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if whole else "KILLED")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """("a.b", value) of every leaf."""
    pairs = []
    for name, value in tree.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return pairs
