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
from lmboost.flops import Forward
from lmboost.models.model_config import ModelConfig
from lmboost.objective import align, auto, chunks, kd, select
from lmboost.objective.auto import Auto
from lmboost.schedules import Weight


@dataclasses.dataclass(frozen=True)
class Objective:
    """The terms of the loss, and the weights of helps as functions of the step, or of their share."""

    kd: kd.Distillation
    align: align.Alignment | None
    select: select.Selection
    weights: Mapping[str, Weight]  # by the name of the help
    auto: Auto | None = None  # the rule by which help ends, where it is not a step that is known beforehand
    ce_weight: float = -1.0  # beside kd; -1 is 1 - w
    z_loss: float = 0.0
    block_tokens: int = 0
    scatter_head: bool = False


class Help(NamedTuple):
    """A help, as everything but the train step knows it."""

    needs: str  # the model whose parameters the step is given: "teacher" or "scorer"
    schedule: Callable[[ConfigDict, int], tuple[Weight, int]]  # subtree, steps -> weight, first step without it
    forward: Callable[[Objective, ModelConfig | None], Forward]  # what that model computes
    metrics: tuple[str, ...]  # names, while it is active; every line of metrics.jsonl has the first one
    group: str  # of `scored.GROUPS`, which has it where the helper has answered before the run


def _align_forward(objective: Objective, model: ModelConfig | None) -> Forward:
    """The layers up to the last state that guides the student's; all, and now and then the loss, for the lead."""
    if objective.auto and "align" in objective.auto.helps:
        return Forward(model, vocabulary=1 / auto.EVERY)
    return Forward(model, max(t for _, t in objective.align.pairs), vocabulary=0.0)


# By the name of the config subtree, in the order in which they are shown.
HELPS = {
    "kd": Help("teacher", kd.schedule, lambda _, model: Forward(model), ("kd", "kd_weight", "teacher_ce"), "labels"),
    "align": Help(
        "teacher", align.schedule, _align_forward,
        ("align", "align_cosine", "align_ratio", "align_weight"), "states",
    ),
    "select": Help(
        "scorer", select.schedule, lambda objective, model: Forward(model, rows=objective.select.candidates),
        ("kept_fraction",), "labels",
    ),
}  # fmt: skip
MAIN_METRICS = tuple(help_.metrics[0] for help_ in HELPS.values())


class Span(NamedTuple):
    """Steps with the same helps: from `first` up to, not including, `end`."""

    first: int
    end: int
    helps: frozenset[str]


def stops(tree: ConfigDict, steps: int) -> dict[str, int]:
    """The first step without each help, from the config's `objective` subtree; at the latest, where it ends itself."""
    return {name: stop for name, (_, stop) in _schedules(tree, steps).items()}


def spans(tree: ConfigDict, steps: int) -> tuple[Span, ...]:
    """The run, cut where a help ends, from the config's `objective` subtree."""
    return cut(stops(tree, steps), steps)


def cut(stops: Mapping[str, int], steps: int) -> tuple[Span, ...]:
    """The run, cut at these first steps without each help.

    All helps begin at step 0, so the sets only ever shrink: once a name is gone, no later step needs it.
    """
    firsts = sorted({0, *(stop for stop in stops.values() if stop < steps)})
    return tuple(
        Span(first, end, frozenset(name for name, stop in stops.items() if first < stop))
        for first, end in itertools.pairwise([*firsts, steps])
    )


def needed(helps: frozenset[str]) -> frozenset[str]:
    """Which models these helps need: of "teacher" and "scorer"."""
    return frozenset(HELPS[name].needs for name in helps)


def groups(objective: Objective, helps: frozenset[str]) -> tuple[str, ...]:
    """Which groups of answers these helps read, where these are known before the run."""
    lead = {"labels"} if objective.auto and helps & objective.auto.helps else set()  # by the teacher's loss
    return tuple(sorted({HELPS[name].group for name in helps} | lead))


def forwards(
    objective: Objective,
    helps: frozenset[str],
    models: Mapping[str, ModelConfig | None],
    own_seq_lens: Mapping[str, int] | None = None,
) -> list[Forward]:
    """What these helps compute, of each model that they need.

    own_seq_lens: tokens of the rows of models that have rows of their own.
    """
    found = []
    for need in sorted(needed(helps)):
        mine = [HELPS[name].forward(objective, models[need]) for name in helps if HELPS[name].needs == need]
        _, layers, rows, vocabulary, _ = zip(*mine, strict=True)
        layers, seq_len = None if None in layers else max(layers), (own_seq_lens or {}).get(need, 0)
        found.append(Forward(models[need], layers, max(rows), max(vocabulary), seq_len))
    return found


def make_objective(
    tree: ConfigDict, steps: int, student: ModelConfig, teacher: ModelConfig | None, by_chunks: bool = False
) -> Objective:
    """The config's `objective` subtree as plain values; `teacher` is None where no help needs one.

    by_chunks: whether the teacher has another tokenizer than the data, so that kd is `chunks`'.

    Raises a UserError where a term is not defined, or not for these two models.
    """
    timed = _schedules(tree, steps)
    on = {name for name, (_, stop) in timed.items() if stop}
    distillation = kd.from_config(tree.kd)
    if "kd" in on and by_chunks:
        chunks.check(distillation, tree.scatter_head)
    if "kd" in on and distillation.divergence == "reverse" and teacher.vocab_size < student.vocab_size:
        raise UserError(
            f"objective.kd.divergence='reverse' needs a teacher with the student's vocabulary: the teacher has "
            f"{teacher.vocab_size} rows, model.vocab_size={student.vocab_size}."
        )
    if "kd" in on and tree.scatter_head and not distillation.is_mixture:
        raise UserError(
            "objective.scatter_head=True needs a kd whose gradient asks for the teacher's distribution alone: "
            "objective.kd.divergence='forward' without top_k and top_p, and the temperature on the teacher. Change "
            "these, or set it to False."
        )
    return Objective(
        kd=distillation,
        align=align.from_config(tree.align, student.num_layers, teacher.num_layers) if "align" in on else None,
        select=select.from_config(tree.select),
        weights={name: weight for name, (weight, _) in timed.items()},
        auto=auto.from_config(tree),
        ce_weight=tree.kd.ce_weight,
        z_loss=tree.z_loss,
        block_tokens=tree.block_tokens,
        scatter_head=tree.scatter_head,
    )


def _schedules(tree: ConfigDict, steps: int) -> dict[str, tuple[Weight, int]]:
    return {name: help_.schedule(tree[name], steps) for name, help_ in HELPS.items()}
