"""What runs come to against a baseline, as plain numbers: everything that the report shows is in these."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lmboost.errors import UserError
from lmboost.report.curves import SPENT, Crossing, Run, crossing, known, loss_at
from lmboost.run import goodput

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the baseline's tokens


def compare(baseline: Run, runs: Sequence[Run], helper: Mapping[str, float | None] | None = None) -> dict[str, Any]:
    """The report as plain numbers.

    The target is the baseline's final loss, and what it spent on it is its whole run. FLOPs and seconds of a run hold
    its helpers' forward passes; `helper` is what training the helper cost (`training_cost`), added to every run but
    the baseline. What helpers have answered before the runs is shared by those of the runs that read it.

    Raises a UserError where runs were evaluated on different data.
    """
    for run in runs:
        if None not in (run.fingerprint, baseline.fingerprint) and run.fingerprint != baseline.fingerprint:
            raise UserError(
                f"{run.name} and the baseline {baseline.name} were evaluated on different data (fingerprints "
                f"{run.fingerprint} and {baseline.fingerprint} in manifest.json): their losses cannot be compared. "
                "Train both on one data set."
            )
    target, total_tokens = baseline.final["val_loss"], float(baseline.tokens[-1])
    total = {name: known(getattr(baseline, name)[-1]) for name in SPENT}
    served = collections.Counter(run.answers[0] for run in runs if run.answers)

    def before(name: str, run: Run) -> float | None:
        """What was spent before the run on its help."""
        trained = helper["flops"] if helper else 0.0 if run.answers else None
        if name == "flops" and run.answers and trained is not None:
            return trained + run.answers[1] / served[run.answers[0]]
        return None if run.answers else helper and helper[name]

    def spent(name: str, reached: Crossing | None, run: Run) -> dict[str, float | None]:
        cost = reached and getattr(reached, name)
        trained = before(name, run) if run is not baseline else None
        with_helper = cost + trained if run is not baseline and None not in (cost, trained) else None
        return {
            f"{name}_to_target": cost,
            f"{name}_fraction": _ratio(cost, total[name]),
            f"{name}_with_helper": with_helper,
            f"{name}_with_helper_fraction": _ratio(with_helper, total[name]),
        }

    def row(run: Run) -> dict[str, Any]:
        reached = crossing(run, target)
        return {
            "name": run.name,
            "group": run.group,
            "trained_tokens": run.trained_tokens,
            "loss_at": {f"{f:g}": loss_at(run, f * total_tokens) for f in FRACTIONS},
            "final": run.final,
            "total": {"steps": float(run.steps[-1]), "tokens": float(run.tokens[-1]), "flops": known(run.flops[-1])},
            "reached": reached is not None,
            "reached_by_first_evaluation": bool(reached and reached.first),
            "tokens_to_target": reached and reached.tokens,
            "tokens_fraction": _ratio(reached and reached.tokens, total_tokens),
            **spent("flops", reached, run),
            **spent("seconds", reached, run),
            "answers": run.answers and {"flops": run.answers[1], "runs": served[run.answers[0]]},
            "stages": list(run.stages),
            "curve": {name: _listed(getattr(run, name)) for name in ("tokens", *SPENT, "val_loss")},
            "training": {name: _listed(values) for name, values in run.training.items()},
            "helps": {name: dataclasses.asdict(help_) for name, help_ in run.helps.items()},
        } | ({"goodput": _time(run.time)} if run.time else {})

    about = {"target_loss": target} | {f"helper_{name}": helper and helper[name] for name in SPENT}
    rows = [row(run) for run in (baseline, *runs)]
    return about | {"baseline": rows[0], "runs": rows[1:], "groups": _groups(rows)}


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one name together, the baseline's first; none where every name is there once."""
    found = collections.defaultdict(list)
    for row in rows:
        found[row["group"]].append(row)
    if len(found) == len(rows):
        return []
    return [
        {
            "name": name,
            "runs": len(members),
            "final_val_loss": _spread(row["final"]["val_loss"] for row in members),
            "reached": sum(row["reached"] for row in members),
            **{f"{what}_fraction": _spread(row[f"{what}_fraction"] for row in members) for what in ("tokens", *SPENT)},
        }
        for name, members in found.items()
    ]


def _spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean, and standard deviation from two on, of the values that there are."""
    found = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(found)) if found else None,
        "deviation": float(np.std(found, ddof=1)) if len(found) > 1 else None,
    }


def _listed(values: np.ndarray) -> list[float | None]:
    return [known(value) for value in values]


def _time(spent: goodput.Goodput) -> dict[str, Any]:
    shares = {kind: spent.share(kind) for kind in spent.seconds}
    return {"attempts": spent.attempts, "wall_seconds": spent.wall, "seconds": dict(spent.seconds), "shares": shares}


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b
