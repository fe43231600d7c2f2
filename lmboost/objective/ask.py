"""What helpers say of a batch, in the form in which it is kept: `lmboost.score` writes it, `cached` reads it.

Shape suffixes: B rows, T tokens, V vocabulary rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.data.scored import Parts, SoftLabels
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.models.vocabulary import NEGATIVE, Head, over_blocks, pick, spread
from lmboost.objective import select
from lmboost.objective.select import Selection


def make_asker(
    parts: Parts, teacher: ModelConfig | None, scorer: ModelConfig | None, selection: Selection, block_tokens: int
) -> Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]]:
    """Builds `ask(params, bases, batch, key) -> answers`, to be jitted; answers are as in `Parts.like`.

    `params` has those of "teacher" and "scorer", `bases` by layer the directions in which states are kept, `batch`
    also the number of each row, "row" [B], and `key` [2] is of the data and of the draws: what is drawn for a row
    depends on these alone.
    """

    def ask(params, bases, batch, key):
        found = {}
        if parts.labels or parts.loss or parts.states:
            h, states = _teacher(parts, teacher, params["teacher"], batch)
            for layer, state in states.items():
                kept = state.astype(jnp.float32)
                kept = kept @ bases[str(layer)] if str(layer) in bases else kept
                found[f"state_{layer}"], found[f"scale_{layer}"] = _in_bytes(kept)
            if parts.labels or parts.loss:
                head = Head.of(teacher, params["teacher"])
                uniform = jax.vmap(lambda row: _uniform(key, row, parts.seq_len))(batch["row"])
                found |= labels_of(parts, h, head, batch, uniform, block_tokens)
        if parts.selection:
            h, _ = _forward(scorer, params["scorer"], batch)
            head = Head.of(scorer, params["scorer"])
            found["score"] = select.score(h, head, batch["targets"], batch["weights"], selection, block_tokens)
        return found

    return ask


def make_moments(parts: Parts, teacher: ModelConfig) -> Callable[[Any, Mapping[str, jax.Array]], dict[int, jax.Array]]:
    """Builds `moments(params, batch)`: by layer, the sum over tokens of state * state^T, of states of length 1."""

    def moments(params, batch):
        _, states = _teacher(parts, teacher, params["teacher"], batch)
        there = (batch["segment_ids"] > 0).astype(jnp.float32)
        found = {}
        for layer, state in states.items():
            state = state.astype(jnp.float32)
            state = state * jax.lax.rsqrt(jnp.sum(state * state, -1, keepdims=True) + 1e-12) * there[..., None]
            found[layer] = jnp.einsum("btd,bte->de", state, state, precision="highest")
        return found

    return moments


def draw_counts(probabilities, uniform, draws: int) -> jax.Array:
    """How often each token is drawn, int32 [..., V]: in the mean over `uniform` [...] draws * probability.

    One number in [0, 1) at each place decides all of its draws, which lie at equal distances in the distribution
    (systematic sampling): counts differ from draws * probability by less than 1, less than those of independent draws.
    """
    ends = jnp.cumsum(probabilities, axis=-1)
    ends = jnp.floor(ends / ends[..., -1:] * draws + uniform[..., None])
    # The last end is `draws` and a bit, of which rounding must not make one more.
    return jnp.diff(jnp.minimum(ends, draws), axis=-1, prepend=0.0).astype(jnp.int32)


def _forward(model: ModelConfig, params, batch, **kwargs):
    return transformer.apply(model, params, batch["tokens"], batch["segment_ids"], batch["positions"], **kwargs)


def _teacher(parts: Parts, model: ModelConfig, params, batch) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Its last hidden state, and the states that guide the student's, by their layers."""
    wanted = {state.layer for state in parts.states}
    h, captured = _forward(model, params, batch, capture=wanted)
    if model.num_layers in wanted and parts.final_norm:
        captured[model.num_layers] = h
    return h, {layer: captured[layer] for layer in sorted(wanted)}


def _in_bytes(state) -> tuple[jax.Array, jax.Array]:
    """(int8 [B, T, width], float16 [B, T]), whose product is the state."""
    scale = jnp.max(jnp.abs(state), -1) / 127
    scale = jnp.clip(scale, 6e-8, 65504.0).astype(jnp.float16)  # what a float16 can be, above 0
    return jnp.round(jnp.clip(state / scale.astype(jnp.float32)[..., None], -127, 127)).astype(jnp.int8), scale


def _uniform(key, row, tokens: int) -> jax.Array:
    """A number in [0, 1) for each token of a row."""
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(key[1]), key[0]), row), (tokens,))


def labels_of(parts: Parts, h, head: Head, batch, uniform, block_tokens: int) -> dict[str, jax.Array]:
    """The arrays of the group "labels" that are of the teacher."""

    def one_block(_, logits, h, rows):
        labels, weights, uniform = rows
        found = {}
        if parts.loss:
            found["teacher_loss"] = (jax.nn.logsumexp(logits, axis=-1) - pick(logits, labels)) * weights
        if parts.labels:
            found |= _soft(parts.labels, logits, uniform)
        return None, found

    rows = (batch["targets"], batch["weights"], uniform)
    _, found = over_blocks(one_block, head.laid_out(h.dtype), h, rows, block_tokens)
    there = batch["weights"] > 0
    like = parts.like(1, ["labels"])
    return {
        name: jnp.where(there.reshape(*there.shape, *[1] * (value.ndim - 2)), value, 0).astype(like[name].dtype)
        for name, value in found.items()
    }


def _soft(labels: SoftLabels, logits, uniform) -> dict[str, jax.Array]:
    """What is kept of the teacher's distribution in a block of tokens."""
    logits = sharding.constrain(logits, ("batch", None, None, None))  # sorted as a whole
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    logits = jnp.where(columns < labels.vocab_size, logits, NEGATIVE)
    log_p = jax.nn.log_softmax(logits / labels.temperature)
    axes = ("batch",) + (None,) * (logits.ndim - 1)
    top = sharding.per_device(lambda x: jax.lax.top_k(x, labels.slots), (axes,), axes)
    if labels.kind == "draws":
        p = jnp.exp(log_p)
        counts, ids = top(draw_counts(p, uniform, labels.number))
        order = jnp.argsort(jnp.where(counts > 0, ids, logits.shape[-1]), axis=-1)
        values, rest = jnp.take_along_axis(counts, order, -1), -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), -1)
        return {"soft_ids": jnp.take_along_axis(ids, order, -1), "soft_values": values, "soft_rest": rest}
    values, ids = top(log_p)
    others = spread(ids, jnp.full(ids.shape, NEGATIVE), logits.shape[-1], 0.0) + log_p
    rest = jnp.maximum(jax.nn.logsumexp(others, axis=-1), NEGATIVE)
    return {"soft_ids": ids, "soft_values": values, "soft_rest": rest}
