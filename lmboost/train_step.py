"""The train step: one jitted function.

    candidates ─score─> batch ─┬─ teacher forward ──────────────┐
                               └─ student forward (guided) ─ blended loss ─ backward ─ update

Everything is a sum over tokens until the end, and is divided once by the number of tokens: gradients and
metrics of an accumulated batch are those of the whole one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lmboost import sharding
from lmboost.data.scored import Parts
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.models.vocabulary import Head
from lmboost.objective import align, auto, chunks, select
from lmboost.objective.blend import Coefficients, Sums, blend
from lmboost.objective.cached import CachedTargets
from lmboost.objective.chunks import Chunks, ChunkTargets
from lmboost.objective.kd import SoftTargets
from lmboost.objective.terms import Objective, needed
from lmboost.schedules import Schedule

# tokens, targets, segment_ids, positions, weights: each [rows, T]; what helpers have said of the rows before the run,
# see `scored.Parts.like`; and the rows of helpers that read other tokens, see `retokenize.Retokenizer.rows`.
Batch = Mapping[str, jax.Array]
_ROWS = ("tokens", "targets", "segment_ids", "positions", "weights")
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


class TrainState(flax.struct.PyTreeNode):
    """All that a run changes. params: {"model": ..., "align": learned maps of the alignment, if any}."""

    step: jax.Array  # int32, steps taken or skipped
    params: Any
    opt_state: Any
    skipped: jax.Array  # int32, steps whose gradient or loss was not finite
    skipped_in_a_row: jax.Array
    watch: auto.Watch | None = None  # of the teacher, where help ends by itself


@dataclasses.dataclass(frozen=True)
class Program:
    """What a train step is compiled for.

    Attributes:
      helps: which are active, of `terms.HELPS`; the others leave no trace in the graph.
      teacher, scorer: configs of the helpers whose parameters the step is given. They get no gradient and are part of
        no state.
      accumulation: parts that the batch is worked through in.
      known: what batches have of the helpers' answers; then these are not computed, and no parameters are given.
      teacher_rows, scorer_rows: the name of the rows that each reads; "" the student's, or those of other tokens.
    """

    student: ModelConfig
    objective: Objective
    helps: frozenset[str] = frozenset()
    teacher: ModelConfig | None = None
    scorer: ModelConfig | None = None
    accumulation: int = 1
    known: Parts | None = None
    teacher_rows: str = ""
    scorer_rows: str = ""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(student state, teacher state) that are aligned."""
        return self.objective.align.pairs if "align" in self.helps else ()

    @property
    def watches(self) -> bool:
        """Whether the teacher's lead is measured, and ends help."""
        return self.objective.auto is not None and bool(self.helps & self.objective.auto.helps)


class _Compared(NamedTuple):
    """Losses of student and teacher on the same text, where the teacher's is measured: sums in nats."""

    student: jax.Array
    teacher: jax.Array
    count: jax.Array  # of the student's tokens


class _Gathered(NamedTuple):
    """What one pass over the rows adds up beside the gradient."""

    sums: Sums
    align: jax.Array  # of negative cosines
    aligned: jax.Array  # of the weights of tokens that are aligned
    compared: _Compared


def init_params(student: ModelConfig, objective: Objective, seed: int, teacher: ModelConfig | None = None):
    """Random parameters: {"model": ..., "align": ...}, the latter only if the alignment learns a map."""
    model_key, align_key = jax.random.split(jax.random.key(seed))
    params = {"model": transformer.init(student, model_key)}
    if objective.align:
        maps = align.init_projections(objective.align, student.d_model, teacher.d_model, align_key)
        params |= {"align": maps} if maps else {}
    return params


def init_state(params, tx: optax.GradientTransformation, rule: auto.Auto | None = None) -> TrainState:
    """Step 0 with a fresh optimizer. Each counter is an array of its own: the step donates them.

    rule: the objective's, by which help ends.
    """
    watch = auto.begin() if rule else None
    return TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0), jnp.int32(0), watch)


def make_train_step(
    program: Program, tx: optax.GradientTransformation, learning_rate: Schedule
) -> Callable[[TrainState, Mapping[str, Any], Batch], tuple[TrainState, Metrics]]:
    """Builds `step(state, helpers, batch) -> (state, metrics)`, to be jitted with `state` donated.

    `helpers` has the parameters of "teacher" and "scorer" as far as `program.helps` need them, or for known answers
    "targets", the `scored.Scored.bases`. `batch` has select.candidates times as many rows if "select" is active.
    """

    def step_fn(state: TrainState, helpers: Mapping[str, Any], batch: Batch):
        metrics, helpers = {}, jax.lax.stop_gradient(helpers)
        if "select" in program.helps:
            batch, metrics["kept_fraction"] = _select(program, helpers.get("scorer"), batch)
        share = auto.share(program.objective.auto, state.watch) if program.watches else 1.0
        schedules = program.objective.weights
        weights = {name: schedules[name](state.step, share) for name in schedules if name in program.helps}
        (grads, probes), gathered = _accumulated(program, state.params, helpers, batch, state.step, weights)
        tokens = jnp.maximum(gathered.sums.count, 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(gathered.sums.loss) & jnp.isfinite(grad_norm)
        new_state = _update(state, grads, finite, tx)
        metrics |= _metrics(program, weights, gathered, probes)
        if program.watches:
            new_state, measured = _watch(program, new_state, gathered, finite)
            metrics |= measured
        return new_state, metrics | {
            "grad_norm": _one(grad_norm),
            "learning_rate": _one(learning_rate(state.step - state.skipped)),
            "skipped": _one(new_state.skipped),
            "skipped_in_a_row": _one(new_state.skipped_in_a_row),
        }

    return step_fn


def jit_train_step(program: Program, tx: optax.GradientTransformation, learning_rate: Schedule, state: TrainState):
    """The jitted step: the state is donated and comes out laid out as it went in.

    state: of arrays, or of ShapeDtypeStructs with shardings to compile for devices that are not here.
    """
    step_fn = make_train_step(program, tx, learning_rate)
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


def make_eval_step(student: ModelConfig, block_tokens: int) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Builds `step(params, batch) -> (sum of cross-entropy, number of predicted tokens)`, to be jitted."""

    def step_fn(params, batch):
        h, _ = _forward(student, params, batch)
        head = Head.of(student, params)
        sums = blend(h, head, batch["targets"], batch["weights"], block_tokens=block_tokens)
        return sums.ce, sums.count

    return step_fn


# ---------------------------------------------------------------------- the loss and its gradient


def _rows_of(batch: Batch, name: str) -> Batch:
    """The rows of this name, as far as the batch has them."""
    return {key: batch[there] for key in _ROWS if (there := f"{name}_{key}") in batch} if name else batch


def _forward(config: ModelConfig, params, batch: Batch, **kwargs):
    return transformer.apply(config, params, batch["tokens"], batch["segment_ids"], batch["positions"], **kwargs)


def _teacher_states(program: Program, params, batch: Batch) -> tuple[jax.Array | None, dict[int, jax.Array]]:
    """The teacher's last hidden state and the states that guide the student's, without gradient."""
    if "teacher" not in needed(program.helps):
        return None, {}
    wanted = {layer for _, layer in program.pairs}
    if program.known:
        return None, {s: _known_state(program, params, batch, t) for s, t in program.pairs}
    rows = program.teacher_rows
    h, captured = _forward(program.teacher, params, _rows_of(batch, rows), capture=wanted)
    if program.teacher.num_layers in wanted and program.objective.align.final_norm:
        captured[program.teacher.num_layers] = h
    guides = {s: captured[t] for s, t in program.pairs}
    if rows:
        guides = {s: align.at(state, batch[f"{rows}_index"]) for s, state in guides.items()}
    return jax.lax.stop_gradient((h, guides))


def _known_state(program: Program, bases: Mapping[str, jax.Array], batch: Batch, layer: int) -> jax.Array:
    """The teacher's state after a layer [B, T, width], from disk."""
    kept = batch[f"state_{layer}"].astype(jnp.float32) * batch[f"scale_{layer}"].astype(jnp.float32)[..., None]
    state = kept @ bases[str(layer)].T if str(layer) in bases else kept
    return state.astype(program.teacher.dtype)


def _chunks(program: Program, teacher, batch: Batch, h, head: Head, h_teacher) -> Chunks:
    """The losses of student and teacher on the chunks of text that both have ends of tokens around."""
    name, block_tokens = program.teacher_rows, program.objective.block_tokens
    own = chunks.label_losses(h, head, batch["targets"], block_tokens)
    head = Head.of(program.teacher, teacher)
    theirs = chunks.label_losses(h_teacher, head, batch[f"{name}_targets"], block_tokens)
    return Chunks.of(own, batch[f"{name}_chunks"], theirs, batch[f"{name}_own_chunks"])


def _soft_targets(program: Program, helpers: Mapping[str, Any], batch: Batch, h_teacher, common: Chunks | None):
    """What kd compares the student with. common: of chunks, where the teacher reads other tokens."""
    kd = program.objective.kd
    if common:
        return ChunkTargets.of(common, kd)
    if program.known:
        names = ("soft_ids", "soft_values", "soft_rest", "teacher_loss")
        return CachedTargets(*(batch[name] for name in names), program.known.labels, kd)
    return SoftTargets.of(h_teacher, Head.of(program.teacher, helpers["teacher"]), kd)


def _loss_sums(params, probes, program: Program, helpers: Mapping[str, Any], batch: Batch, step, helping):
    """(sum over tokens to differentiate, what is gathered); `helping` are the weights of helps."""
    student, objective = program.student, program.objective
    weights = batch["weights"]
    h_teacher, guides = _teacher_states(program, helpers.get("targets" if program.known else "teacher"), batch)
    rows = program.teacher_rows
    guided = weights * (batch[f"{rows}_index"] >= 0) if rows and guides else weights
    maps, taps = params.get("align", {}), {}
    for s, target in guides.items():
        fixed = jax.lax.stop_gradient(maps.get(str(s)))
        taps[s] = align.tap(target, guided, objective.align, helping["align"], probes[str(s)], fixed)
    h, captured = _forward(student, params["model"], batch, capture=guides, taps=taps)
    head = Head.of(student, params["model"])
    coefficients, soft, common = Coefficients(z=objective.z_loss), None, None
    if "kd" in program.helps:
        kd = helping["kd"]
        coefficients = Coefficients(1.0 - kd if objective.ce_weight < 0 else objective.ce_weight, kd, objective.z_loss)
        common = _chunks(program, helpers["teacher"], batch, h, head, h_teacher) if rows else None
        soft = _soft_targets(program, helpers, batch, h_teacher, common)
    sums = blend(
        h, head, batch["targets"], weights, coefficients, soft,
        block_tokens=objective.block_tokens, scatter=objective.scatter_head,
    )  # fmt: skip
    loss, align_sum = sums.loss, jnp.zeros((), jnp.float32)
    for s, target in guides.items():
        state = jax.lax.stop_gradient(captured[s])  # its gradient went in by the tap
        term = align.negative_cosine(state, target, guided, objective.align, maps.get(str(s)))
        align_sum += jax.lax.stop_gradient(term)
        loss += term if str(s) in maps else 0.0
    compared = _Compared(sums.ce, sums.teacher, sums.count)
    if common:
        compared = _of_chunks(common, weights)
    elif program.watches and program.known:
        compared = compared._replace(teacher=jnp.sum(weights * batch["teacher_loss"].astype(jnp.float32)))
    elif program.watches and "kd" not in program.helps:

        def measure() -> _Compared:
            if rows:
                return _of_chunks(_chunks(program, helpers["teacher"], batch, h, head, h_teacher), weights)
            return compared._replace(teacher=_teacher_loss(program, helpers["teacher"], h_teacher, batch))

        compared = jax.lax.stop_gradient(compared)
        compared = jax.lax.cond(step % auto.EVERY == 0, measure, lambda: compared._replace(teacher=jnp.float32(0)))
    return loss, _Gathered(sums, align_sum, jnp.sum(guided), compared)


def _teacher_loss(program: Program, params, h_teacher, batch: Batch) -> jax.Array:
    """The sum of the teacher's cross-entropy on the labels."""
    head, block_tokens = Head.of(program.teacher, params), program.objective.block_tokens
    return blend(h_teacher, head, batch["targets"], batch["weights"], block_tokens=block_tokens).ce


def _of_chunks(common: Chunks, weights) -> _Compared:
    """What student and teacher lose on the text of all chunks."""
    sums = (common.per_token(common.student), common.per_token(common.teacher), common.tokens > 0)
    return _Compared(*(jnp.sum(weights * x) for x in sums))


def _gradients(program: Program, params, helpers: Mapping[str, Any], batch: Batch, step, helping):
    """((gradient, what the taps' probes saw), what is gathered), all of them sums over the rows."""
    probes = {str(s): jnp.zeros(2, jnp.float32) for s, _ in program.pairs}
    differentiate = jax.value_and_grad(_loss_sums, argnums=(0, 1), has_aux=True)
    (_, gathered), grads = differentiate(params, probes, program, helpers, batch, step, helping)
    return grads, gathered


def _accumulated(program: Program, params, helpers: Mapping[str, Any], batch: Batch, step, helping):
    """As `_gradients`, of the batch in parts, one after the other."""
    if program.accumulation == 1:
        return _gradients(program, params, helpers, batch, step, helping)
    parts = jax.tree.map(lambda x: _split_rows(x, program.accumulation), batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, _gradients(program, params, helpers, part, step, helping)), None

    part = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(lambda *arguments: _gradients(program, *arguments), params, helpers, part, step, helping)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _update(state: TrainState, grads, finite, tx: optax.GradientTransformation) -> TrainState:
    """The next state; parameters and optimizer stay as they are where something is not finite."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    skipped = (~finite).astype(jnp.int32)
    return state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        skipped=state.skipped + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
    )


def _watch(program: Program, state: TrainState, gathered: _Gathered, finite) -> tuple[TrainState, Metrics]:
    """The state after its newest step, with what that says of the teacher's lead; and that as metrics."""
    step, compared = state.step - 1, gathered.compared
    lead = (compared.student - compared.teacher) / jnp.maximum(compared.count, 1.0)
    measured = finite & jnp.isfinite(lead) & (compared.count > 0)
    every = 1 if program.known or "kd" in program.helps else auto.EVERY
    watch = auto.update(program.objective.auto, state.watch, lead, measured & (step % every == 0), step, every)
    return state.replace(watch=watch), {"lead": _one(watch.lead), auto.ENDED: _one(watch.ended)}


def _metrics(program: Program, weights: Mapping[str, jax.Array], gathered: _Gathered, probes: Mapping) -> Metrics:
    """(sum, count) of the terms, in nats per token, and of the helps' weights."""
    sums, align_sum, aligned, compared = gathered
    metrics = {"loss": (sums.loss, sums.count), "ce": (sums.ce, sums.count), "predicted_tokens": _one(sums.count)}
    if "kd" in program.helps:
        metrics["kd"] = (sums.kd, sums.count)
        metrics["kd_weight"] = _one(weights["kd"])
        metrics["teacher_ce"] = (compared.teacher, compared.count)
    if "align" in program.helps:
        added, other = jnp.sum(jnp.stack(list(probes.values())), 0)
        metrics["align"] = (align_sum, aligned * len(program.pairs))
        metrics["align_cosine"] = (-align_sum, aligned * len(program.pairs))
        metrics["align_ratio"] = _one(jnp.sqrt(added / jnp.maximum(other, 1e-30)))
        metrics["align_weight"] = _one(weights["align"])
        if program.objective.align.scale == "plain":
            metrics["loss"] = (sums.loss + weights["align"] * align_sum, sums.count)
    return metrics


def _one(value) -> tuple[jax.Array, jax.Array]:
    """A number of the step as a metric."""
    return jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32)


# ---------------------------------------------------------------------- rows


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]. Part i takes every parts-th row, so that no row leaves its device."""
    x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    return sharding.constrain(x, (None, "batch") + (None,) * (x.ndim - 2))


def _select(program: Program, params, candidates: Batch) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """The batch of the best candidates; rows beyond the kept fraction have weight 0. Also (kept, candidates)."""
    objective, scorer = program.objective, program.scorer
    selection = objective.select
    rows = candidates["tokens"].shape[0]
    batch_size, parts = rows // selection.candidates, selection.candidates * program.accumulation

    def score(part):
        sizes = part[f"{program.scorer_rows}_bytes"] if program.scorer_rows else None
        part = _rows_of(part, program.scorer_rows)
        h, _ = _forward(scorer, params, part)
        head = Head.of(scorer, params)
        return select.score(h, head, part["targets"], part["weights"], selection, objective.block_tokens, sizes)

    if program.known:
        scores = candidates["score"]
    else:
        scores = jax.lax.map(score, jax.tree.map(lambda x: _split_rows(x, parts), dict(candidates)))
        scores = jax.lax.stop_gradient(jnp.swapaxes(scores, 0, 1).reshape(rows))
    index, mask = select.choose(scores, batch_size, selection.kept_rows(batch_size))
    take = lambda x: sharding.constrain(jnp.take(x, index, axis=0), ("batch",) + (None,) * (x.ndim - 1))  # noqa: E731
    batch = {name: take(x) for name, x in candidates.items()}
    batch["weights"] = batch["weights"] * mask[:, None]
    return batch, (mask.sum(), jnp.float32(rows))
