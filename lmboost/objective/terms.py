"""The helps of a run as one table, and the terms of its loss as plain values.

What the train step does with a help is spelled out there, as each enters the graph at a place of its own: kd inside a
block of tokens, align as a tap in the student's layers, select before the batch. All others ask this table: which
model a help needs, until which step, what of that model it reads, which numbers it gives.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.objective import align, kd, select
from lmboost.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Objective:
    """The terms of the loss, and the weights of helps as functions of the step."""

    kd: kd.Distillation
    align: align.Alignment | None
    select: select.Selection
    weights: Mapping[str, Schedule]  # by the name of the help
    ce_weight: float = -1.0  # beside kd; -1 is 1 - w
    z_loss: float = 0.0
    block_tokens: int = 1024


class Help(NamedTuple):
    """A help, as everything but the train step knows it."""

    needs: str  # the model whose parameters the step is given: "teacher" or "scorer"
    schedule: Callable[[ConfigDict, int], tuple[Schedule, int]]  # subtree, steps -> weight, first step without it
    layers: Callable[[Objective], int | None]  # of that model, that are computed; None is all and the vocabulary
    rows: Callable[[Objective], int]  # that it computes for each row of the batch
    metrics: tuple[str, ...]  # names, while it is active; every line of metrics.jsonl has the first one


# By the name of the config subtree, in the order in which they are shown.
HELPS = {
    "kd": Help("teacher", kd.schedule, lambda objective: None, lambda objective: 1, ("kd", "kd_weight")),
    "align": Help(
        "teacher", align.schedule, lambda objective: max(t for _, t in objective.align.pairs), lambda objective: 1,
        ("align", "align_cosine", "align_ratio", "align_weight"),
    ),
    "select": Help(
        "scorer", select.schedule, lambda objective: None, lambda objective: objective.select.candidates,
        ("kept_fraction",),
    ),
}  # fmt: skip
MAIN_METRICS = tuple(help_.metrics[0] for help_ in HELPS.values())


class Span(NamedTuple):
    """Steps with the same helps: from `first` up to, not including, `end`."""

    first: int
    end: int
    helps: frozenset[str]


def spans(tree: ConfigDict, steps: int) -> tuple[Span, ...]:
    """The run, cut where a help ends, from the config's `objective` subtree.

    All helps begin at step 0, so the sets only ever shrink: once a name is gone, no later step needs it.
    """
    stops = {name: stop for name, (_, stop) in _schedules(tree, steps).items()}
    firsts = sorted({0, *(stop for stop in stops.values() if stop < steps)})
    return tuple(
        Span(first, end, frozenset(name for name, stop in stops.items() if first < stop))
        for first, end in itertools.pairwise([*firsts, steps])
    )


def needed(helps: frozenset[str]) -> frozenset[str]:
    """Which models these helps need: of "teacher" and "scorer"."""
    return frozenset(HELPS[name].needs for name in helps)


def forwards(objective: Objective, helps: frozenset[str], models: Mapping[str, ModelConfig | None]) -> list[tuple]:
    """What these helps compute for each row of the batch: (model, layers, rows) of each model that they need.

    layers, rows: as in `flops.step_flops`.
    """
    found = []
    for need in sorted(needed(helps)):
        mine = [HELPS[name] for name in helps if HELPS[name].needs == need]
        layers = [one.layers(objective) for one in mine]
        found.append((models[need], None if None in layers else max(layers), max(one.rows(objective) for one in mine)))
    return found


def make_objective(tree: ConfigDict, steps: int, student: ModelConfig, teacher: ModelConfig | None) -> Objective:
    """The config's `objective` subtree as plain values; `teacher` is None where no help needs one.

    Raises a UserError where a term is not defined, or not for these two models.
    """
    timed = _schedules(tree, steps)
    on = {name for name, (_, stop) in timed.items() if stop}
    distillation = kd.from_config(tree.kd)
    if "kd" in on and distillation.divergence == "reverse" and teacher.vocab_size < student.vocab_size:
        raise UserError(
            f"objective.kd.divergence='reverse' needs a teacher with the student's vocabulary: the teacher has "
            f"{teacher.vocab_size} rows, model.vocab_size={student.vocab_size}."
        )
    return Objective(
        kd=distillation,
        align=align.from_config(tree.align, student.num_layers, teacher.num_layers) if "align" in on else None,
        select=select.from_config(tree.select),
        weights={name: weight for name, (weight, _) in timed.items()},
        ce_weight=tree.kd.ce_weight,
        z_loss=tree.z_loss,
        block_tokens=tree.block_tokens,
    )


def _schedules(tree: ConfigDict, steps: int) -> dict[str, tuple[Schedule, int]]:
    return {name: help_.schedule(tree[name], steps) for name, help_ in HELPS.items()}
