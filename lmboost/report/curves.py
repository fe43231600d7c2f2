"""A run as a report needs it: what it came to at which cost, read from the files in its workdir."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmboost import checkpoint, places
from lmboost.errors import UserError
from lmboost.objective import terms
from lmboost.run import goodput, metrics

SPENT = ("flops", "seconds")  # what a run costs besides tokens; columns of Run
FINAL_FIELDS = ("val_loss", "val_perplexity", "val_bits_per_byte")
# Of training lines, what is shown over the run: the loss and its terms, and what is known of each help.
TRAINING = ("loss", "ce", *(name for help_ in terms.HELPS.values() for name in help_.metrics), "lead")
POINTS = 300  # of a run's training lines, each the mean of a stretch


@dataclasses.dataclass(frozen=True)
class Help:
    """How long a help had weight.

    Attributes:
      tokens, step: of the last line in which it had.
      ended: whether the run went on without it.
    """

    tokens: float
    step: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's evaluations in the order of its tokens. `flops` and `seconds` are cumulative, NaN where not known."""

    name: str
    tokens: np.ndarray
    val_loss: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray  # of steps alone, by the machine's clock
    steps: np.ndarray
    final: dict[str, float | None]  # FINAL_FIELDS over the last evaluations
    trained_tokens: float  # up to its last line
    fingerprint: Any = None
    time: goodput.Goodput | None = None
    answers: tuple[str, float] | None = None  # of helpers before the run: their fingerprint, and FLOPs that they took
    stages: tuple[float, ...] = ()  # tokens at which it went on from another run
    group: str = ""  # the name that it shares with runs of other seeds
    training: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # "tokens" and TRAINING, where known
    helps: Mapping[str, Help] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where a run first reaches a loss; `first` if its first evaluation is already there (an upper bound)."""

    tokens: float
    flops: float | None
    seconds: float | None
    first: bool = False


def load_run(directory: str, last: int = 1, flag: str = "--run") -> Run:
    """Reads DIR/metrics.jsonl and, where there are such files, DIR/manifest.json and DIR/goodput.jsonl.

    Raises a UserError where there is no such run, or it has fewer than `last` evaluations.
    """
    every = _lines(directory, flag)
    lines = [line for line in every if "val_loss" in line and "tokens" in line]
    if len(lines) < last:
        raise UserError(
            f"{flag}={directory}: {len(lines)} evaluations with val_loss and tokens in {metrics.FILE}, "
            f"expected at least {last}. Train with --config.eval.every above 0 and a validation split."
        )
    column = lambda name: np.array([line.get(name, np.nan) for line in lines], np.float64)  # noqa: E731
    tail = {k: [line[k] for line in lines[-last:] if k in line] for k in FINAL_FIELDS}
    manifest = checkpoint.Run(directory).manifest() or {}
    answers = manifest.get("targets")
    trained = [line for line in every if "tokens" in line and _number(line.get("loss")) is not None]
    return Run(
        name=places.name_of(directory),
        tokens=column("tokens"),
        val_loss=column("val_loss"),
        flops=column("flops"),
        seconds=column("seconds"),
        steps=column("step"),
        final={k: float(np.mean(v)) if v else None for k, v in tail.items()},
        trained_tokens=max(line.get("tokens", 0.0) for line in every),
        fingerprint=manifest.get("data", {}).get("fingerprint"),
        time=goodput.read(directory),
        answers=answers and (answers["fingerprint"], answers["flops"]),
        stages=tuple(stage["tokens"] for stage in manifest.get("stages", ())),
        group=places.name_of(directory),
        training=_training(trained),
        helps=_helps(trained),
    )


def _lines(directory: str, flag: str) -> list[dict[str, Any]]:
    """A line a step, of metrics.jsonl, with "seconds" besides; a UserError where there is no run."""
    by_step: dict[int, dict[str, Any]] = {}
    try:
        for line in metrics.read(directory):  # numbers of one step may be on several lines
            by_step.setdefault(line["step"], {}).update({k: v for k, v in line.items() if v is not None})
    except OSError as error:
        raise UserError(
            f"{flag}={directory}: there is no run, as {metrics.FILE} cannot be read ({error.strerror or error}). "
            "Give the --workdir of a run."
        ) from error
    lines = [by_step[step] for step in sorted(by_step)]
    _add_seconds(lines)
    return lines


def _add_seconds(lines: Sequence[dict[str, Any]]) -> None:
    """Adds to lines in their order how long steps have taken up to them, by the tokens a second of each stretch.

    Stretches without that number (the first one, in which the step is compiled) are taken to be as fast as the next.
    """
    told = [line for line in lines if line.get("tokens_per_second") and "tokens" in line]
    at = np.array([line["tokens"] for line in told])  # not a list, which each search would read anew
    seconds, before = 0.0, 0.0
    for line in lines:
        if told and "tokens" in line:
            rate = told[min(np.searchsorted(at, line["tokens"]), len(told) - 1)]["tokens_per_second"]
            seconds, before = seconds + (line["tokens"] - before) / rate, line["tokens"]
            line["seconds"] = seconds


def _training(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The columns of training lines that have numbers, NaN where a line has none; each point the mean of a stretch."""
    found = {}
    for name in ("tokens", *TRAINING):
        column = [_number(line.get(name)) for line in lines]
        if any(value is not None for value in column):
            parts = np.array_split(np.array(column, np.float64), min(len(column), POINTS))
            known = [part[~np.isnan(part)] for part in parts]
            found[name] = np.array([part.mean() if part.size else np.nan for part in known])
    return found


def _helps(lines: Sequence[Mapping[str, Any]]) -> dict[str, Help]:
    """Until when the helps of a run had weight, by their names."""
    found = {}
    for name, help_ in terms.HELPS.items():
        weight = next((metric for metric in help_.metrics if metric.endswith("_weight")), help_.metrics[0])
        if helped := [line for line in lines if (_number(line.get(weight)) or 0.0) > 0]:
            last = helped[-1]
            found[name] = Help(float(last["tokens"]), last["step"], last is not lines[-1])
    return found


def _number(value: Any) -> float | None:
    """A number of a line; None for what others may have written in its place."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if known and math.isfinite(value) else None


def training_cost(directory: str) -> dict[str, float | None]:
    """{"flops", "seconds"} of all steps of a finished run, for what its training cost."""
    cost = {name: [line[name] for line in _lines(directory, "--helper") if name in line] for name in SPENT}
    if not cost["flops"]:
        raise UserError(
            f"--helper={directory}: {metrics.FILE} has no flops, so its cost is not known. Leave --helper out."
        )
    return {name: float(max(values)) if values else None for name, values in cost.items()}


def crossing(run: Run, target: float) -> Crossing | None:
    """Where the run's validation loss first is at most `target`, linearly between evaluations; None if never."""
    below = np.flatnonzero(run.val_loss <= target)
    if not below.size:
        return None
    i = below[0]
    if i == 0:
        return Crossing(float(run.tokens[0]), known(run.flops[0]), known(run.seconds[0]), first=True)
    x = (run.val_loss[i - 1] - target) / (run.val_loss[i - 1] - run.val_loss[i])
    at = lambda a: float(a[i - 1] + x * (a[i] - a[i - 1]))  # noqa: E731
    return Crossing(at(run.tokens), known(at(run.flops)), known(at(run.seconds)))


def loss_at(run: Run, tokens: float) -> float | None:
    """Validation loss after so many tokens, linearly between evaluations; None outside of them."""
    return known(np.interp(tokens, run.tokens, run.val_loss, left=np.nan, right=np.nan))


def known(value: float) -> float | None:
    """A number, None for a NaN."""
    return None if np.isnan(value) else float(value)
