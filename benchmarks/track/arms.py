"""The arms of the track: what is changed from a plain run, and which other runs it needs."""

import pathlib
from typing import Any, NamedTuple


class Arm(NamedTuple):
    """A way to train the student, or one of its helpers.

    Attributes:
      changes: fields of the config, by their dotted names.
      model: of `Tier.helpers`; empty is the student.
      teacher: the arm whose run, of the same seed, is teacher.path; empty is none.
    """

    changes: dict[str, Any] = {}
    model: str = ""
    teacher: str = ""


ADAMW = {"optimizer.name": "adamw"}
MUON = {"optimizer.name": "muon"}


def _kd(weight: float = 0.5, stop: float = 0.2, handover: str = "linear") -> dict[str, Any]:
    return {f"objective.kd.{k}": v for k, v in {"weight": weight, "stop": stop, "handover": handover}.items()}


def _align(weight: float = 2.0, stop: float = 0.15) -> dict[str, Any]:
    return {"objective.align.weight": weight, "objective.align.stop": stop}


def _rates(name: str, rates: tuple[float, ...]) -> dict[str, Arm]:
    return {f"{name}-lr{r:g}": Arm({"optimizer.name": name, "optimizer.learning_rate": r}) for r in rates}


def _tuned(name: str) -> dict[str, Arm]:
    """One field of the optimizer at a time, at the rate 8e-3."""
    at = {"optimizer.name": name, "optimizer.learning_rate": 8e-3}
    one = {
        "beta0.95": {"b1": 0.95}, "beta0.98": {"b1": 0.98}, "beta2-0.95": {"b2": 0.95}, "beta2-0.99": {"b2": 0.99},
        "decay0": {"weight_decay": 0.0}, "decay0.3": {"weight_decay": 0.3}, "final0": {"final_fraction": 0.0},
        "linear0": {"schedule": "linear", "final_fraction": 0.0}, "warmup2": {"warmup_steps": 53},
        "warmup10": {"warmup_steps": 266}, "clip0": {"clip_norm": 0.0},
    }  # fmt: skip
    one |= {
        f"linear0-decay{decay:g}-lr{rate:g}": {
            "schedule": "linear", "final_fraction": 0.0, "weight_decay": decay, "learning_rate": rate
        }
        for decay, rate in ((0.0, 8e-3), (0.0, 1.2e-2), (0.03, 1.2e-2), (0.03, 8e-3))
    }  # fmt: skip
    return {f"{name}-{k}": Arm(at | {f"optimizer.{f}": x for f, x in v.items()}) for k, v in one.items()}


def _stops(size: str, stops: tuple[float, ...]) -> dict[str, Arm]:
    """Each help alone and both, by a teacher of this size, until each of these fractions of the run."""
    helps = {"salt": lambda stop: _kd(stop=stop), "let": lambda stop: _align(stop=stop)}
    helps["both"] = lambda stop: _kd(stop=stop) | _align(stop=stop)
    return {
        f"{name}-{size}-{stop:g}": Arm(MUON | changes(stop), teacher=f"teacher-{size}")
        for name, changes in helps.items()
        for stop in stops
    }


ARMS = {
    **{f"teacher-{size}": Arm(ADAMW, size) for size in ("tenth", "fifth", "half")},
    "adamw": Arm(ADAMW),
    "plain": Arm(MUON),
    "adamw-salt": Arm(ADAMW | _kd(), teacher="teacher-fifth"),
    "adamw-let": Arm(ADAMW | _align(), teacher="teacher-fifth"),
    "adamw-both": Arm(ADAMW | _kd() | _align(), teacher="teacher-fifth"),
    "salt": Arm(MUON | _kd(), teacher="teacher-fifth"),
    "let": Arm(MUON | _align(), teacher="teacher-fifth"),
    "both": Arm(MUON | _kd() | _align(), teacher="teacher-fifth"),
    **_stops("tenth", (0.02, 0.05, 0.1)),
    **_stops("fifth", (0.05, 0.1, 0.2, 0.4)),
    **_stops("half", (0.1, 0.2, 0.4)),
    **_rates("adamw", (2e-3, 8e-3, 1.6e-2)),
    **_rates("muon", (2e-3, 8e-3, 1.6e-2, 3.2e-2)),
    **_tuned("adamw"),
    **_tuned("muon"),
}

LINE = "line.json"  # in the workdir of a run that is finished: what came out of it


def workdir_of(out: pathlib.Path, tier: str, arm: str, seed: int) -> pathlib.Path:
    """Where a run of an arm is."""
    return out / tier / arm / str(seed)
