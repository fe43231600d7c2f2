"""The train step: one jitted function.

    candidates ─score─> batch ─┬─ teacher forward ──────────────┐
                               └─ student forward (guided) ─ blended loss ─ backward ─ update

Everything is a sum over tokens until the end, and is divided once by the number of tokens: gradients and
metrics of an accumulated batch are those of the whole one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lmboost import sharding
from lmboost.models import transformer, vocabulary
from lmboost.models.model_config import ModelConfig
from lmboost.objective import align, kd
from lmboost.objective import blend as objectives
from lmboost.objective import select as selects

Batch = Mapping[str, jax.Array]  # tokens, targets, segment_ids, positions, weights: each [rows, T]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


class TrainState(flax.struct.PyTreeNode):
    """All that a run changes. params: {"model": ..., "align": learned maps of the alignment, if any}."""

    step: jax.Array  # int32, steps taken or skipped
    params: Any
    opt_state: Any
    skipped: jax.Array  # int32, steps whose gradient or loss was not finite
    skipped_in_a_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """The terms of the loss and their weights as functions of the step."""

    kd: kd.Distillation
    align: align.Alignment | None
    select: selects.Selection
    kd_weight: Callable[[jax.Array], jax.Array]
    align_weight: Callable[[jax.Array], jax.Array]
    ce_weight: float = -1.0  # beside kd; -1 is 1 - w
    z_loss: float = 0.0
    block_tokens: int = 1024


def init_params(student: ModelConfig, objective: Objective, seed: int, teacher: ModelConfig | None = None):
    """Random parameters: {"model": ..., "align": ...}, the latter only if the alignment learns a map."""
    model_key, align_key = jax.random.split(jax.random.key(seed))
    params = {"model": transformer.init(student, model_key)}
    if objective.align:
        maps = align.init_projections(objective.align, student.d_model, teacher.d_model, align_key)
        params |= {"align": maps} if maps else {}
    return params


def init_state(params, tx: optax.GradientTransformation) -> TrainState:
    """Step 0 with a fresh optimizer. Each counter is an array of its own: the step donates them."""
    return TrainState(jnp.int32(0), params, tx.init(params), jnp.int32(0), jnp.int32(0))


def make_train_step(
    student: ModelConfig,
    tx: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    objective: Objective,
    helps: frozenset[str] = frozenset(),
    teacher: ModelConfig | None = None,
    scorer: ModelConfig | None = None,
    accumulation: int = 1,
) -> Callable[[TrainState, Mapping[str, Any], Batch], tuple[TrainState, Metrics]]:
    """Builds `step(state, helpers, batch) -> (state, metrics)`, to be jitted with `state` donated.

    Args:
      helps: which of "kd", "align" and "select" are active; the others leave no trace in the graph.
      teacher, scorer: configs of the helpers whose parameters `helpers["teacher"]` and `helpers["scorer"]`
        are. They get no gradient and are part of no state.
      accumulation: parts that the batch is worked through in.

    `batch` has select.candidates times as many rows if "select" is active.
    """
    guided = objective.align.pairs if "align" in helps else ()

    def help_from_teacher(params, batch):
        """The teacher's last hidden state and the states that guide the student, without gradient."""
        if not helps & {"kd", "align"}:
            return None, {}
        wanted = {layer for _, layer in guided}
        h, captured = _forward(teacher, params, batch, capture=wanted)
        if guided and objective.align.final_norm and teacher.num_layers in wanted:
            captured[teacher.num_layers] = h
        return h, {s: captured[t] for s, t in guided}

    def loss_sums(params, probes, helpers, batch, step):
        """(sum over tokens to differentiate, Sums and alignment sums)."""
        weights = batch["weights"]
        h_teacher, guides = jax.lax.stop_gradient(help_from_teacher(helpers.get("teacher"), batch))
        lam, maps = objective.align_weight(step), params.get("align", {})
        taps = {
            s: align.tap(target, weights, objective.align, lam, probes[str(s)], jax.lax.stop_gradient(maps.get(str(s))))
            for s, target in guides.items()
        }
        h, captured = _forward(student, params["model"], batch, capture=guides, taps=taps)
        kd = {}
        if "kd" in helps:
            teacher_head = vocabulary.Head(transformer.head(helpers["teacher"]), teacher.vocab_size)
            kd = {"kd": objective.kd, "teacher_h": h_teacher, "teacher": teacher_head}
        sums = objectives.blend(
            h, vocabulary.Head(transformer.head(params["model"]), student.vocab_size), batch["targets"], weights,
            _coefficients(objective, helps, step), block_tokens=objective.block_tokens, **kd,
        )  # fmt: skip
        loss, align_sum = sums.loss, jnp.zeros((), jnp.float32)
        for s, target in guides.items():
            state = jax.lax.stop_gradient(captured[s])  # its gradient went in by the tap
            term = align.negative_cosine(state, target, weights, objective.align, maps.get(str(s)))
            align_sum += jax.lax.stop_gradient(term)
            loss += term if str(s) in maps else 0.0
        return loss, (sums, align_sum)

    def gradients(params, helpers, batch, step):
        probes = {str(s): jnp.zeros(2, jnp.float32) for s, _ in guided}
        (_, sums), grads = jax.value_and_grad(loss_sums, argnums=(0, 1), has_aux=True)(
            params, probes, helpers, batch, step
        )
        return grads, sums

    def accumulated(params, helpers, batch, step):
        if accumulation == 1:
            return gradients(params, helpers, batch, step)
        parts = jax.tree.map(lambda x: _split_rows(x, accumulation), batch)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradients(params, helpers, part, step)), None

        shapes = jax.eval_shape(gradients, params, helpers, jax.tree.map(lambda x: x[0], parts), step)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    def step_fn(state: TrainState, helpers: Mapping[str, Any], batch: Batch):
        metrics, helpers = {}, jax.lax.stop_gradient(helpers)
        if "select" in helps:
            batch, metrics["kept_fraction"] = _select(objective, scorer, helpers["scorer"], batch, accumulation)
        (grads, probes), (sums, align_sum) = accumulated(state.params, helpers, batch, state.step)
        tokens = jnp.maximum(sums.count, 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = (~finite).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        one = jnp.ones((), jnp.float32)
        metrics |= {
            "loss": (sums.loss, sums.count),
            "ce": (sums.ce, sums.count),
            "grad_norm": (grad_norm, one),
            "learning_rate": (jnp.asarray(learning_rate(state.step - state.skipped), jnp.float32), one),
            "predicted_tokens": (sums.count, one),
            "skipped": (new_state.skipped.astype(jnp.float32), one),
            "skipped_in_a_row": (new_state.skipped_in_a_row.astype(jnp.float32), one),
        }
        if "kd" in helps:
            metrics["kd"] = (sums.kd, sums.count)
            metrics["kd_weight"] = (jnp.asarray(objective.kd_weight(state.step), jnp.float32), one)
        if "align" in helps:
            added, other = jnp.sum(jnp.stack(list(probes.values())), 0)
            metrics["align"] = (align_sum, sums.count * len(guided))
            metrics["align_cosine"] = (-align_sum, sums.count * len(guided))
            metrics["align_ratio"] = (jnp.sqrt(added / jnp.maximum(other, 1e-30)), one)
            metrics["align_weight"] = (jnp.asarray(objective.align_weight(state.step), jnp.float32), one)
            if objective.align.scale == "plain":
                weighted = objective.align_weight(state.step) * align_sum
                metrics["loss"] = (sums.loss + weighted, sums.count)
        return new_state, metrics

    return step_fn


def jit_train_step(run, tx: optax.GradientTransformation, learning_rate: Callable, helps: frozenset[str], state):
    """The jitted step of a run's phase: the state is donated and comes out laid out as it went in.

    Args:
      run: the `plan.Plan`.
      helps: those of the phase.
      state: a TrainState of arrays, or of ShapeDtypeStructs with shardings to compile for devices that are not here.
    """
    step_fn = make_train_step(
        run.student, tx, learning_rate, run.objective, helps,
        run.teacher.model if run.teacher else None, run.scorer.model if run.scorer else None, run.config.accumulation,
    )  # fmt: skip
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


def make_eval_step(student: ModelConfig, block_tokens: int) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Builds `step(params, batch) -> (sum of cross-entropy, number of predicted tokens)`, to be jitted."""

    def step_fn(params, batch):
        h, _ = _forward(student, params, batch)
        head = vocabulary.Head(transformer.head(params), student.vocab_size)
        sums = objectives.blend(h, head, batch["targets"], batch["weights"], block_tokens=block_tokens)
        return sums.ce, sums.count

    return step_fn


def _forward(config: ModelConfig, params, batch: Batch, **kwargs):
    return transformer.apply(config, params, batch["tokens"], batch["segment_ids"], batch["positions"], **kwargs)


def _coefficients(objective: Objective, helps: frozenset[str], step) -> objectives.Coefficients:
    if "kd" not in helps:
        return objectives.Coefficients(1.0, 0.0, objective.z_loss)
    kd = objective.kd_weight(step)
    ce = 1.0 - kd if objective.ce_weight < 0 else objective.ce_weight
    return objectives.Coefficients(ce, kd, objective.z_loss)


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, T] -> [parts, B / parts, T]. Part i takes every parts-th row, so that no row leaves its device."""
    x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    return sharding.constrain(x, (None, "batch", "length"))


def _select(objective: Objective, scorer: ModelConfig, params, candidates: Batch, accumulation: int):
    """The batch of the best candidates; rows beyond the kept fraction have weight 0. Also (kept, candidates)."""
    selection = objective.select
    rows = candidates["tokens"].shape[0]
    batch_size, parts = rows // selection.candidates, selection.candidates * accumulation
    head = vocabulary.Head(transformer.head(params), scorer.vocab_size)

    def score(part):
        h, _ = _forward(scorer, params, part)
        return selects.score(h, head, part["targets"], part["weights"], selection, objective.block_tokens)

    scores = jax.lax.map(score, jax.tree.map(lambda x: _split_rows(x, parts), dict(candidates)))
    scores = jax.lax.stop_gradient(jnp.swapaxes(scores, 0, 1).reshape(rows))
    index, mask = selects.choose(scores, batch_size, selection.kept_rows(batch_size))
    batch = {k: sharding.constrain(jnp.take(x, index, axis=0), ("batch", "length")) for k, x in candidates.items()}
    batch["weights"] = batch["weights"] * mask[:, None]
    return batch, (mask.sum(), jnp.float32(rows))
