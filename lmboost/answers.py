"""Help from what teacher and scorer have said before the run (lmboost.score): whether it is what this run asks for."""

import bisect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import sharding, strict_json
from lmboost.data.loader import DataInfo
from lmboost.data.scored import Parts, Scored, Selection, SoftLabels, State
from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.objective import cached
from lmboost.objective.terms import Objective, groups
from lmboost.teacher import Helper

_HINT = "Score again."


def helpers(scored: Scored, config: ConfigDict) -> tuple[Helper | None, Helper | None]:
    """(teacher, scorer) of known answers: what they were, without their parameters.

    Raises a UserError where the config names a model besides.
    """
    for field, value in (
        ("teacher.path", config.teacher.path), ("objective.select.scorer", config.objective.select.scorer),
        ("teacher.random", config.teacher.random),
    ):  # fmt: skip
        if value:
            raise UserError(
                f"{field}={value!r} and {scored.where}: help comes from the one or the other; leave one out."
            )

    def helper(name: str) -> Helper | None:
        if not (about := scored.manifest[name]):
            return None
        where = f"{scored.where}: its {name}"
        strict_json.check(about, {"model": dict, "fingerprint": str}, where, _HINT)
        return Helper(None, strict_json.make(ModelConfig, about["model"], where, _HINT).validate(where))

    return helper("teacher"), helper("scorer")


def check(
    scored: Scored,
    data: DataInfo,
    seq_len: int,
    seed: int,
    student: ModelConfig,
    teacher: Helper | None,
    objective: Objective,
    stops: Mapping[str, int],
    rows_before: Callable[[int], int],
) -> dict[str, int]:
    """The first step without each help; earlier than in `stops` where help ends by itself and the answers end before.

    Args:
      rows_before: how many rows of the data's order are read before a step.

    Raises a UserError where the answers are of other data, or have not what the objective asks for.
    """
    scored.check_data(data.fingerprints, data.tokenizer_fingerprint, seq_len)
    active = frozenset(name for name, stop in stops.items() if stop)
    parts, kd, align, select = scored.parts, objective.kd, objective.align, objective.select
    there = {"kd": parts.labels, "align": parts.states, "select": parts.selection}
    for name in sorted(active):
        if not there[name]:
            raise UserError(
                f"{scored.where} has nothing for {name}, but objective.{name} is on: score with this config, or set "
                "its weight to 0."
            )
    if "kd" in active and objective.scatter_head:
        raise UserError(
            f"objective.scatter_head=True: with kd from {scored.where} the loss has no such blocks; set it to False."
        )
    if "kd" in active:
        cached.check(parts.labels, kd, min(student.vocab_size, teacher.model.vocab_size), scored.where)
    if "align" in active:
        layers = [state.layer for state in parts.states]
        if missing := sorted({t for _, t in align.pairs} - set(layers)):
            raise UserError(
                f"{scored.where} has the teacher's states {layers}, but objective.align.pairs asks for {missing[0]}: "
                "score with this config."
            )
        if parts.final_norm != align.final_norm:
            raise UserError(
                f"{scored.where} was made with objective.align.final_norm={parts.final_norm}: set it so, or score "
                "again."
            )
    if "select" in active and parts.selection != (asked := Selection(select.k, select.others)):
        raise UserError(f"{scored.where} has scores of {parts.selection}, but objective.select asks for {asked}.")
    if objective.auto and not parts.loss:
        raise UserError(f"{scored.where} has no losses of the teacher, which help that ends by itself asks for.")
    return _within_reach(scored, data, seed, objective, stops, rows_before)


def _within_reach(scored, data, seed, objective, stops, rows_before) -> dict[str, int]:
    ends = dict(stops)
    for name, stop in stops.items():
        for group in groups(objective, frozenset({name})) if stop else ():
            if not (reach := scored.reach[group]):
                continue
            if (reach.fingerprint, reach.seed) != (data.fingerprint, seed):
                raise UserError(
                    f"{scored.where} has the {group} of the rows that come first with seed={reach.seed} in data of "
                    f"fingerprint {reach.fingerprint[:12]}, not with seed={seed} in {data.fingerprint[:12]}: score "
                    "with this config."
                )
            if rows_before(stop) <= reach.rows:
                continue
            last = bisect.bisect_right(range(stop + 1), reach.rows, key=rows_before) - 1
            if not (objective.auto and name in objective.auto.helps):
                raise UserError(
                    f"{scored.where} has the {group} of the first {reach.rows} rows, which are read before step "
                    f"{last + 1}, but objective.{name} is on until step {stop}: score with a larger --until, or end "
                    "it earlier."
                )
            ends[name] = min(ends[name], last)
    return ends


def parts_of(run: Any, draws: int = 50, state_bytes: int = 128) -> Parts:
    """What the helps of a run (a plan.Plan) read, as `lmboost.score` writes it with these flags."""
    on, objective, labels, states = {name for name, stop in run.stops.items() if stop}, run.objective, None, []
    if "kd" in on:
        kd, vocab_size = objective.kd, min(run.student.vocab_size, run.teacher.model.vocab_size)
        if kd.top_p < 1:
            raise UserError(f"objective.kd.top_p={kd.top_p}: take objective.kd.top_k, or 1 for draws.")
        kind, number = ("best", min(kd.top_k, vocab_size)) if kd.top_k else ("draws", draws)
        labels = SoftLabels(kind, number, kd.temperature, vocab_size, min(number, vocab_size))
    if "align" in on:
        width = run.teacher.model.d_model
        kept = min(width, state_bytes - 2) if state_bytes else width
        states = [State(layer, width, kept) for layer in sorted({t for _, t in objective.align.pairs})]
    select = Selection(objective.select.k, objective.select.others) if "select" in on else None
    final_norm = objective.align.final_norm if "align" in on else True
    return Parts(run.seq_len, labels, bool(on & {"kd", "align"}), select, tuple(states), final_norm)


def load(scored: Scored, mesh: Mesh) -> dict[str, Any]:
    """`Scored.bases`, on every device."""
    return jax.device_put(scored.bases(), sharding.replicated(mesh))
