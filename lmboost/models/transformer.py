"""One decoder-only transformer, driven by its config.

The layers' parameters are stacked on a leading axis and scanned, so that compile time does not grow
with depth and a list of layers is a slice of an array. Layers of unequal sizes are several such stacks
("layers/0", "layers/1", ...), one for each segment of the config. The vocabulary projection is not part of the
forward pass: `head` gives its matrix, and the objective projects a block of tokens at a time.

Shape suffixes: B batch, T tokens, D model width, H query heads, K key/value heads, N head size,
F MLP width, L layers, V vocabulary rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models import attention, linear, rope
from lmboost.models.linear import Dense, look_up
from lmboost.models.model_config import ModelConfig, Segment


def _normal(config: ModelConfig, residual: bool = False) -> nn.initializers.Initializer:
    """Normal(0, init_std); what writes to the residual stream is scaled by 1/sqrt(2L), as in GPT-2."""
    return nn.initializers.normal(config.init_std / ((2 * config.num_layers) ** 0.5 if residual else 1.0))


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32, returned in the input's dtype."""

    config: ModelConfig
    kind: str = ""

    @nn.compact
    def __call__(self, x):
        kind = self.kind or self.config.norm
        width = x.shape[-1:]
        y = x.astype(jnp.float32)
        if kind != "rmsnorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.config.norm_eps)
        y = y * self.param("scale", nn.initializers.ones, width)
        if kind == "layernorm":
            y = y + self.param("bias", nn.initializers.zeros, width)
        return y.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention within segments; grouped queries. Returns ([B, T, D], cache), cache None without one."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, segment_ids, positions, layer, cache: attention.Cache | None = None):
        c = self.config

        def project(name, heads):
            return Dense((heads, c.head_dim), c.qkv_bias, c.dtype, _normal(c), quantize=c.quantize, name=name)(x_BxTxD)

        q_BxTxHxN = project("q", c.num_heads)
        k_BxTxKxN = project("k", c.num_kv_heads)
        v_BxTxKxN = project("v", c.num_kv_heads)
        if c.qk_norm != "none":
            q_BxTxHxN, k_BxTxKxN = self._normalise(q_BxTxHxN, "q_norm"), self._normalise(k_BxTxKxN, "k_norm")
        if c.position == "rope":
            q_BxTxHxN, k_BxTxKxN = (rope.apply(x, positions, c) for x in (q_BxTxHxN, k_BxTxKxN))
        if c.scale_attn_by_layer:
            q_BxTxHxN = q_BxTxHxN / (layer + 1).astype(q_BxTxHxN.dtype)
        q_BxTxHxN = sharding.constrain(q_BxTxHxN, ("batch", "length", "heads", None))
        k_BxTxKxN, v_BxTxKxN = (
            sharding.constrain(x, ("batch", "length", "kv_heads", None)) for x in (k_BxTxKxN, v_BxTxKxN)
        )
        self.sow("intermediates", "queries_and_keys", (q_BxTxHxN, k_BxTxKxN))  # for surgery/attention_rank.py
        if cache is None:
            y_BxTxHxN = attention.attend(q_BxTxHxN, k_BxTxKxN, v_BxTxKxN, segment_ids, c.attention, c.sliding_window)
        else:
            cache = cache.write(layer, k_BxTxKxN, v_BxTxKxN)
            y_BxTxHxN = attention.attend_cached(q_BxTxHxN, cache, layer, c.num_kv_heads, segment_ids, c.sliding_window)
        self.sow("intermediates", "inputs_and_heads", (x_BxTxD, y_BxTxHxN))  # for surgery/importance.py
        last = _normal(c, residual=True)
        o = Dense((c.d_model,), c.attn_out_bias, c.dtype, last, in_axes=2, quantize=c.quantize, name="o")
        return o(y_BxTxHxN), cache

    def _normalise(self, x_BxTxHxN, name):
        norm = Norm(self.config, kind="rmsnorm", name=name)
        if self.config.qk_norm == "head":
            return norm(x_BxTxHxN)
        return norm(x_BxTxHxN.reshape(*x_BxTxHxN.shape[:2], -1)).reshape(x_BxTxHxN.shape)


class Mlp(nn.Module):
    """Two projections with a nonlinearity, or three with a gate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config

        def dense(name, width, residual=False):
            return Dense((width,), c.mlp_bias, c.dtype, _normal(c, residual), quantize=c.quantize, name=name)

        h_BxTxF = dense("up", c.mlp_dim)(x_BxTxD)
        if c.mlp == "silu_gated":
            h_BxTxF = nn.silu(dense("gate", c.mlp_dim)(x_BxTxD)) * h_BxTxF
        elif c.mlp == "relu":
            h_BxTxF = nn.relu(h_BxTxF)
        else:
            h_BxTxF = nn.gelu(h_BxTxF, approximate=c.mlp == "gelu_tanh")
        h_BxTxF = sharding.constrain(h_BxTxF, ("batch", "length", "mlp"))
        self.sow("intermediates", "inputs_and_units", (x_BxTxD, h_BxTxF))  # for surgery/importance.py
        return dense("down", c.d_model, residual=True)(h_BxTxF)


class Block(nn.Module):
    """One layer: attention and MLP around the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, segment_ids, positions, layer, cache: attention.Cache | None = None):
        c = self.config
        attn, mlp = Attention(c, name="attn"), Mlp(c, name="mlp")
        attn_norm, mlp_norm = Norm(c, name="attn_norm"), Norm(c, name="mlp_norm")
        if c.norm_placement == "post":
            y_BxTxD, cache = attn(x_BxTxD, segment_ids, positions, layer, cache)
            x_BxTxD = x_BxTxD + attn_norm(y_BxTxD)
            x_BxTxD = x_BxTxD + mlp_norm(mlp(x_BxTxD))
        else:
            y_BxTxD, cache = attn(attn_norm(x_BxTxD), segment_ids, positions, layer, cache)
            if c.parallel_residual:
                x_BxTxD = x_BxTxD + y_BxTxD + mlp(mlp_norm(x_BxTxD))
            else:
                x_BxTxD = x_BxTxD + y_BxTxD
                x_BxTxD = x_BxTxD + mlp(mlp_norm(x_BxTxD))
        return sharding.constrain(x_BxTxD, ("batch", "length", "act_embed")), cache


class Transformer(nn.Module):
    """The decoder up to its last hidden state.

    Layers are counted by how many have been passed: state 0 is the embedding, state k the residual
    stream after k layers, state L the last one, before the final norm.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab_rows, c.d_model, embedding_init=_normal(c), dtype=c.dtype)
        if c.position == "learned":
            rows = c.max_seq_len + c.position_offset
            self.position_embed = nn.Embed(rows, c.d_model, embedding_init=_normal(c), dtype=c.dtype)
        self.layers = self.param("layers", self._init_layers)
        if c.final_norm:
            self.last_norm = Norm(c, name="final_norm")
        if not c.tie_embeddings:
            self.head_kernel = self.param("head", _normal(c), (c.d_model, c.vocab_rows))

    def _init_layers(self, rng):
        x = jnp.zeros((1, 2, self.config.d_model), self.config.dtype)
        ids = jnp.zeros((1, 2), jnp.int32)
        # "xla", whatever the config says: kernels for one platform have no business in an initialiser.
        config = dataclasses.replace(self.config, attention="xla")
        keys = jax.random.split(rng, config.num_layers)

        def stack(segment):
            block = Block(segment.config, parent=None)
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
            block = Block(segment.config, parent=None)

            def layer_step(x, layer_and_params, block=block):
                layer, params = layer_and_params
                x, _ = block.apply({"params": params}, x, segment_ids, positions, layer)
                return x, None

            layer_step = _remat(layer_step, c.remat)
            edges = sorted({segment.start, segment.stop, *(s for s in stops if segment.start < s < segment.stop)})
            for start, stop in itertools.pairwise(_unequal(edges)):
                part = layers
                if stop - start < segment.stop - segment.start:
                    part = jax.tree.map(lambda a, s=segment.start, i=start, j=stop: a[i - s : j - s], layers)
                x_BxTxD, _ = jax.lax.scan(layer_step, x_BxTxD, (jnp.arange(start, stop), part))
                x_BxTxD = visit(stop, x_BxTxD)
        return self.norm_last(x_BxTxD), captured

    def cached(self, tokens, segment_ids, positions, cache: attention.Cache):
        """The next tokens [B, T] of sequences whose earlier keys and values are in `cache`: (h_BxTxD, cache).

        segment_ids: int32 [B, S], of all slots of the cache.
        """
        carry = self._embed_tokens(tokens, positions), cache
        for segment, layers in split_layers(self.config, self.layers):
            block = Block(segment.config, parent=None)

            def layer_step(carry, layer_and_params, block=block):
                x, cache = carry
                layer, params = layer_and_params
                return block.apply({"params": params}, x, segment_ids, positions, layer, cache), None

            carry, _ = jax.lax.scan(layer_step, carry, (jnp.arange(segment.start, segment.stop), layers))
        x_BxTxD, cache = carry
        return self.norm_last(x_BxTxD), cache._replace(index=cache.index + tokens.shape[1])

    def _embed_tokens(self, tokens, positions):
        c = self.config
        x_BxTxD = look_up(self.embed.embedding, tokens, "vocab", c.dtype)
        if c.position == "learned":
            x_BxTxD += look_up(self.position_embed.embedding, positions + c.position_offset, None, c.dtype)
        return sharding.constrain(x_BxTxD, ("batch", "length", "act_embed"))

    def norm_last(self, x_BxTxD):
        """The final norm, where the config has one."""
        return self.last_norm(x_BxTxD) if self.config.final_norm else x_BxTxD


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
    """(config with the layer's sizes, its parameters) of one layer, for a `Block`."""
    segment, stack = next(x for x in split_layers(config, params["layers"]) if x[0].start <= layer < x[0].stop)
    return segment.config, jax.tree.map(lambda a: a[layer - segment.start], stack)


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
