"""One decoder-only transformer, driven by its config.

The layers' parameters are stacked on a leading axis and scanned, so that compile time does not grow
with depth and a list of layers is a slice of an array. Layers of unequal sizes are several such stacks
("layers/0", "layers/1", ...), one for each segment of the config; layers of several kinds are one stack, of which
periods are scanned (`layer_kinds`). The vocabulary projection is not part of the forward pass: `head` gives its
matrix, and the objective projects a block of tokens at a time.

Shape suffixes: B batch, T tokens, D model width, L layers, V vocabulary rows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models import attention, layer_kinds, linear
from lmboost.models.block import Block, Norm, normal
from lmboost.models.linear import look_up
from lmboost.models.model_config import ModelConfig, Segment


class Transformer(nn.Module):
    """The decoder up to its last hidden state.

    Layers are counted by how many have been passed: state 0 is the embedding, state k the residual
    stream after k layers, state L the last one, before the final norm.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_rows, c.d_model, embedding_init=normal(c), dtype=c.dtype)
        if c.position == "learned":
            rows = c.max_seq_len + c.position_offset
            self.position_embed = nn.Embed(rows, c.d_model, embedding_init=normal(c), dtype=c.dtype)
        # Elsewhere `param` would trace this initialiser only to compare shapes, which each Block does with its own.
        initialising = self.is_initializing()
        self.layers = self.param("layers", self._init_layers) if initialising else self.get_variable("params", "layers")
        if c.final_norm:
            self.last_norm = Norm(c, name="final_norm")
        if not c.tie_embeddings:
            self.head_kernel = self.param("head", normal(c), (c.d_model, c.vocab_rows))

    def _init_layers(self, rng):
        x = jnp.zeros((1, 2, self.config.d_model), self.config.dtype)
        ids = jnp.zeros((1, 2), jnp.int32)
        # "xla", whatever the config says: kernels for one platform have no business in an initialiser.
        config = dataclasses.replace(self.config, attention="xla")
        keys = jax.random.split(rng, config.num_layers)

        def stack(segment):
            block = Block(segment.config.of_kind(segment.kinds[0]), parent=None)  # kinds change no parameter
            draw = jax.vmap(lambda key: block.init(key, x, ids, ids, jnp.int32(0))["params"])
            return draw(keys[segment.start : segment.stop])

        return join_layers([stack(segment) for segment in config.segments()])

    def __call__(
        self,
        tokens,
        segment_ids,
        positions,
        capture: tuple[int, ...] = (),
        taps: Mapping[int, Callable[[jax.Array], jax.Array]] | None = None,
    ):
        """Runs the decoder.

        Args:
          tokens, segment_ids, positions: int32 [B, T]. Attention stays within equal segment_ids.
          capture: states to return, counted as in the class docstring (static).
          taps: for some states, a function [B, T, D] -> [B, T, D] that the state is passed through on its
            way up (static keys); alignment guides the gradient there.

        Returns:
          (h_BxTxD after the final norm, {state: [B, T, D] before the final norm}), in the compute dtype.
        """
        c, taps = self.config, taps or {}

        stops = {0, *capture, *taps, c.num_layers}
        if (min(stops), max(stops)) != (0, c.num_layers):
            raise UserError(f"states {sorted(stops)} are asked for; the model has states 0 to {c.num_layers}.")
        captured = {}

        def visit(state, x):
            if state in capture:
                captured[state] = x
            return taps[state](x) if state in taps else x

        x_BxTxD = visit(0, self._embed_tokens(tokens, positions))
        for segment, layers in split_layers(c, self.layers):

            @functools.cache  # one trace for all layers of a kind
            def step_of(kind, segment=segment):
                block = Block(segment.config.of_kind(kind), parent=None)

                def layer_step(x, layer_and_params):
                    layer, params = layer_and_params
                    x, _ = block.apply({"params": params}, x, segment_ids, positions, layer)
                    return x, None

                return _remat(layer_step, c.remat)

            edges = sorted({segment.start, segment.stop, *(s for s in stops if segment.start < s < segment.stop)})
            for start, stop in itertools.pairwise(_unequal(edges) if len(set(segment.kinds)) == 1 else edges):
                part, kinds = layers, segment.kinds[start - segment.start : stop - segment.start]
                if stop - start < segment.stop - segment.start:
                    part = jax.tree.map(lambda a, s=segment.start, i=start, j=stop: a[i - s : j - s], layers)
                x_BxTxD, _ = layer_kinds.scan(step_of, x_BxTxD, kinds, jnp.arange(start, stop), part)
                x_BxTxD = visit(stop, x_BxTxD)
        return self.norm_last(x_BxTxD), captured

    def cached(self, tokens, segment_ids, positions, cache: attention.Cache):
        """The next tokens [B, T] of sequences whose earlier keys and values are in `cache`: (h_BxTxD, cache).

        segment_ids: int32 [B, S], of all slots of the cache.
        """
        carry = self._embed_tokens(tokens, positions), cache
        for segment, layers in split_layers(self.config, self.layers):

            @functools.cache  # one trace for all layers of a kind
            def step_of(kind, segment=segment):
                block = Block(segment.config.of_kind(kind), parent=None)

                def layer_step(x_and_cache, layer_and_params):
                    x, cache = x_and_cache
                    layer, params = layer_and_params
                    return block.apply({"params": params}, x, segment_ids, positions, layer, cache), None

                return layer_step

            numbers = jnp.arange(segment.start, segment.stop)
            carry, _ = layer_kinds.scan(step_of, carry, segment.kinds, numbers, layers)
        x_BxTxD, cache = carry
        return self.norm_last(x_BxTxD), cache._replace(index=cache.index + tokens.shape[1])

    def _embed_tokens(self, tokens, positions):
        c = self.config
        x_BxTxD = look_up(self.embed.embedding, tokens, "vocab", c.dtype)
        if c.position == "learned":
            x_BxTxD += look_up(self.position_embed.embedding, positions + c.position_offset, None, c.dtype)
        if c.embed_scale != 1.0:
            x_BxTxD *= c.embed_scale
        return sharding.constrain(x_BxTxD, ("batch", "length", "act_embed"))

    def norm_last(self, x_BxTxD):
        """The final norm, where the config has one; divided by what logits are divided by, which is the same."""
        x_BxTxD = self.last_norm(x_BxTxD) if self.config.final_norm else x_BxTxD
        return x_BxTxD if self.config.logit_divisor == 1.0 else x_BxTxD / self.config.logit_divisor


def _unequal(edges: Sequence[int]) -> list[int]:
    """The same edges, and more of them where parts would be of equal length.

    What the backward pass needs of a part's layers is stacked as they are scanned. The stacks of equal parts begin as
    the same zeros, which XLA for TPUs then writes, and else leaves out: that was 8% of a step's cycles in let_1p4b.
    """
    found, lengths = [edges[0]], set()
    for stop in edges[1:]:
        while (length := stop - found[-1]) > 1 and length in lengths:
            free = next((n for n in range(length - 1, 1, -1) if n not in lengths), 1)
            lengths.add(free)
            found.append(found[-1] + free)
        lengths.add(length)
        found.append(stop)
    return found


def _remat(step: Callable, policy: str) -> Callable:
    """Wraps a scan body so that the backward pass recomputes what `policy` does not keep."""
    if policy == "none":
        return step
    keep = {
        "dots": jax.checkpoint_policies.save_only_these_names(linear.OUTPUT),
        "full": jax.checkpoint_policies.nothing_saveable,
    }[policy]
    return jax.checkpoint(step, policy=keep, prevent_cse=False)


def split_layers(config: ModelConfig, layers: Mapping[str, Any]) -> list[tuple[Segment, Any]]:
    """The segments of a model, each with the stacked parameters of its layers."""
    segments = config.segments()
    return [(s, layers if len(segments) == 1 else layers[str(i)]) for i, s in enumerate(segments)]


def join_layers(stacks: Sequence[Any]) -> Any:
    """The "layers" of a parameter tree from the stacks of its segments; `split_layers` takes them apart."""
    return stacks[0] if len(stacks) == 1 else {str(i): stack for i, stack in enumerate(stacks)}


def one_layer(config: ModelConfig, params: Mapping[str, Any], layer: int) -> tuple[ModelConfig, Any]:
    """(config of a model whose layers are all like this one, its parameters) of one layer, for a `Block`."""
    segment, stack = next(x for x in split_layers(config, params["layers"]) if x[0].start <= layer < x[0].stop)
    return segment.config.of_kind(segment.kinds[layer - segment.start]), jax.tree.map(
        lambda a: a[layer - segment.start], stack
    )


def head(params: Mapping[str, Any]) -> jax.Array:
    """The vocabulary projection [D, V] of a parameter tree; V counts padded rows."""
    return params["head"] if "head" in params else params["embed"]["embedding"].T


def init(config: ModelConfig, rng: jax.Array) -> Mapping[str, Any]:
    """Random float32 parameters."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return Transformer(dataclasses.replace(config, attention="xla")).init(rng, ids, ids, ids)["params"]


def apply(config: ModelConfig, params, tokens, segment_ids, positions, capture=(), taps=None):
    """`Transformer.__call__` on a parameter tree: tokens, segment_ids and positions are int32 [B, T].

    Returns (h_BxTxD after the final norm, {state of `capture`: [B, T, D] before it}), in the compute dtype.
    """
    return Transformer(config).apply(
        {"params": params}, tokens, segment_ids, positions, capture=tuple(capture), taps=taps
    )


def init_cache(config: ModelConfig, batch_size: int, length: int) -> attention.Cache:
    """An empty cache for `length` tokens of `batch_size` sequences, in the compute dtype."""
    shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
    axes = (None, "batch", None, "kv_heads", None)
    k, v = (sharding.constrain(jnp.zeros(shape, config.dtype), axes) for _ in range(2))
    return attention.Cache(k, v, jnp.int32(0))


def apply_cached(config: ModelConfig, params, tokens, segment_ids, positions, cache: attention.Cache):
    """`Transformer.cached` on a parameter tree."""
    return Transformer(config).apply(
        {"params": params}, tokens, segment_ids, positions, cache, method=Transformer.cached
    )
