"""One decoder-only transformer, driven by its config.

The layers' parameters are stacked on a leading axis and scanned, so that compile time does not grow
with depth and a list of layers is a slice of an array. The vocabulary projection is not part of the
forward pass: `head` gives its matrix, and the objective projects a block of tokens at a time.

Shape suffixes: B batch, T tokens, D model width, H query heads, K key/value heads, N head size,
F MLP width, L layers, V vocabulary rows.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.errors import UserError, one_of
from lmboost.models import attention, rope

NORMS = ("rmsnorm", "layernorm", "layernorm_nobias")
POSITIONS = ("rope", "learned")
MLPS = ("gelu", "gelu_tanh", "relu", "silu_gated")
QK_NORMS = ("none", "head", "full")
NORM_PLACEMENTS = ("pre", "post")
REMATS = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of a decoder. `validate` raises a UserError on what does not fit together."""

    vocab_size: int = 32000  # rows that stand for a token
    num_layers: int = 12
    d_model: int = 768
    num_heads: int = 12
    num_kv_heads: int = 12  # fewer than num_heads: grouped-query attention
    head_dim: int = 64
    mlp_dim: int = 3072
    max_seq_len: int = 1024  # with learned positions: rows of their table
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"  # of a layer's two norms: on the sublayer's input, or on its output (OLMo-2)
    final_norm: bool = True
    position: str = "rope"
    position_offset: int = 0  # learned positions: unused rows before position 0 (OPT has 2)
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # share of each head that is rotated (Pythia: 0.25)
    rope_scaling_factor: float = 1.0  # above 1: llama-3 scaling, with the three numbers below
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_seq_len: int = 8192
    mlp: str = "silu_gated"
    parallel_residual: bool = False  # x + attn(norm(x)) + mlp(norm(x)), as GPT-NeoX
    sliding_window: int = 0  # tokens that a query sees, itself included (Mistral); 0 is all before it
    qk_norm: str = "none"  # RMSNorm on queries and keys: per "head" or over the "full" projection
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    scale_attn_by_layer: bool = False  # attention logits times 1 / (layer + 1)
    init_std: float = 0.02
    vocab_multiple: int = 1  # rows are padded up to a multiple of this; padded rows are never predicted
    dtype: str = "bfloat16"  # of compute; parameters are float32
    attention: str = "auto"
    remat: str = "none"

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and head matrices: vocab_size rounded up to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated; even."""
        return int(self.head_dim * self.rope_fraction) // 2 * 2

    def validate(self, field: str = "model") -> "ModelConfig":
        for name, known in (("norm", NORMS), ("position", POSITIONS), ("mlp", MLPS), ("qk_norm", QK_NORMS)):
            one_of(f"{field}.{name}", getattr(self, name), known)
        one_of(f"{field}.norm_placement", self.norm_placement, NORM_PLACEMENTS)
        one_of(f"{field}.remat", self.remat, REMATS)
        one_of(f"{field}.dtype", self.dtype, DTYPES)
        one_of(f"{field}.attention", self.attention, attention.IMPLEMENTATIONS)
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{field}.{name}={getattr(self, name)} must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{field}.num_heads={self.num_heads} is not a multiple of {field}.num_kv_heads={self.num_kv_heads}: "
                "every group of query heads shares one key/value head."
            )
        if self.sliding_window < 0:
            raise UserError(f"{field}.sliding_window={self.sliding_window} must be 0 (none) or a number of tokens.")
        if self.parallel_residual and self.norm_placement == "post":
            raise UserError(
                f"{field}.parallel_residual=True needs {field}.norm_placement='pre': attention and MLP then read the "
                "same normalised input."
            )
        return self


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
            return nn.DenseGeneral(
                (heads, c.head_dim), use_bias=c.qkv_bias, dtype=c.dtype, kernel_init=_normal(c), name=name
            )(x_BxTxD)

        q_BxTxHxN, k_BxTxKxN, v_BxTxKxN = (
            project("q", c.num_heads),
            project("k", c.num_kv_heads),
            project("v", c.num_kv_heads),
        )
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
            y_BxTxHxN = attention.attend_cached(q_BxTxHxN, cache, layer, segment_ids, c.sliding_window)
        o = nn.DenseGeneral(
            c.d_model,
            axis=(-2, -1),
            use_bias=c.attn_out_bias,
            dtype=c.dtype,
            kernel_init=_normal(c, residual=True),
            name="o",
        )
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
            return nn.Dense(width, use_bias=c.mlp_bias, dtype=c.dtype, kernel_init=_normal(c, residual), name=name)

        h_BxTxF = dense("up", c.mlp_dim)(x_BxTxD)
        if c.mlp == "silu_gated":
            h_BxTxF = nn.silu(dense("gate", c.mlp_dim)(x_BxTxD)) * h_BxTxF
        elif c.mlp == "relu":
            h_BxTxF = nn.relu(h_BxTxF)
        else:
            h_BxTxF = nn.gelu(h_BxTxF, approximate=c.mlp == "gelu_tanh")
        h_BxTxF = sharding.constrain(h_BxTxF, ("batch", "length", "mlp"))
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
            self.position_embed = nn.Embed(
                c.max_seq_len + c.position_offset, c.d_model, embedding_init=_normal(c), dtype=c.dtype
            )
        self.block = Block(c, parent=None)
        self.layers = self.param("layers", self._init_layers)
        if c.final_norm:
            self.last_norm = Norm(c, name="final_norm")
        if not c.tie_embeddings:
            self.head_kernel = self.param("head", _normal(c), (c.d_model, c.vocab_rows))

    def _init_layers(self, rng):
        x = jnp.zeros((1, 2, self.config.d_model), self.config.dtype)
        ids = jnp.zeros((1, 2), jnp.int32)
        # "xla", whatever the config says: kernels for one platform have no business in an initialiser.
        block = Block(dataclasses.replace(self.config, attention="xla"), parent=None)
        keys = jax.random.split(rng, self.config.num_layers)
        return jax.vmap(lambda key: block.init(key, x, ids, ids, jnp.int32(0))["params"])(keys)

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

        def layer_step(x, layer_and_params):
            layer, params = layer_and_params
            x, _ = self.block.apply({"params": params}, x, segment_ids, positions, layer)
            return x, None

        layer_step = _remat(layer_step, c.remat)
        stops = sorted({0, *capture, *taps, c.num_layers})
        if (stops[0], stops[-1]) != (0, c.num_layers):
            raise UserError(f"states {stops} are asked for; the model has states 0 to {c.num_layers}.")
        captured = {}

        def visit(state, x):
            if state in capture:
                captured[state] = x
            return taps[state](x) if state in taps else x

        x_BxTxD = visit(0, self._embed_tokens(tokens, positions))
        for start, stop in itertools.pairwise(stops):
            layers = self.layers
            if stop - start < c.num_layers:
                layers = jax.tree.map(lambda a, part=slice(start, stop): a[part], layers)
            x_BxTxD, _ = jax.lax.scan(layer_step, x_BxTxD, (jnp.arange(start, stop), layers))
            x_BxTxD = visit(stop, x_BxTxD)
        return self.norm_last(x_BxTxD), captured

    def cached(self, tokens, segment_ids, positions, cache: attention.Cache):
        """The next tokens [B, T] of sequences whose earlier keys and values are in `cache`: (h_BxTxD, cache).

        segment_ids: int32 [B, S], of all slots of the cache.
        """

        def layer_step(carry, layer_and_params):
            x, cache = carry
            layer, params = layer_and_params
            return self.block.apply({"params": params}, x, segment_ids, positions, layer, cache), None

        layers = (jnp.arange(self.config.num_layers), self.layers)
        (x_BxTxD, cache), _ = jax.lax.scan(layer_step, (self._embed_tokens(tokens, positions), cache), layers)
        return self.norm_last(x_BxTxD), cache.advance(tokens.shape[1])

    def _embed_tokens(self, tokens, positions):
        c = self.config
        # The table is gathered over fsdp before it is looked up: otherwise the rows of the batch would be.
        table_VxD = sharding.constrain(self.embed.embedding.astype(c.dtype), ("vocab", None))
        x_BxTxD = jnp.take(table_VxD, tokens, axis=0)
        if c.position == "learned":
            x_BxTxD = x_BxTxD + self.position_embed(positions + c.position_offset)
        return sharding.constrain(x_BxTxD, ("batch", "length", "act_embed"))

    def norm_last(self, x_BxTxD):
        """The final norm, where the config has one."""
        return self.last_norm(x_BxTxD) if self.config.final_norm else x_BxTxD


def _remat(step: Callable, policy: str) -> Callable:
    """Wraps a scan body so that the backward pass recomputes what `policy` does not keep."""
    if policy == "none":
        return step
    keep = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
    }[policy]
    return jax.checkpoint(step, policy=keep, prevent_cse=False)


def head(params: Mapping[str, Any]) -> jax.Array:
    """The vocabulary projection [D, V] of a parameter tree; V counts padded rows."""
    return params["head"] if "head" in params else params["embed"]["embedding"].T


def init(config: ModelConfig, rng: jax.Array) -> Mapping[str, Any]:
    """Random float32 parameters."""
    ids = jnp.zeros((1, 2), jnp.int32)
    return Transformer(dataclasses.replace(config, attention="xla")).init(rng, ids, ids, ids)["params"]


def apply(config: ModelConfig, params, tokens, segment_ids, positions, capture=(), taps=None):
    """`Transformer.__call__` on a parameter tree."""
    return Transformer(config).apply(
        {"params": params}, tokens, segment_ids, positions, capture=tuple(capture), taps=taps
    )


def init_cache(config: ModelConfig, batch_size: int, length: int) -> attention.Cache:
    """An empty cache for `length` tokens of `batch_size` sequences, in the compute dtype."""
    shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_dim)
    return attention.empty_cache(shape, config.dtype)


def apply_cached(config: ModelConfig, params, tokens, segment_ids, positions, cache: attention.Cache):
    """`Transformer.cached` on a parameter tree."""
    return Transformer(config).apply(
        {"params": params}, tokens, segment_ids, positions, cache, method=Transformer.cached
    )


def num_params(config: ModelConfig) -> int:
    """Number of parameters, without padded vocabulary rows."""
    config = dataclasses.replace(config, vocab_multiple=1)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return sum(x.size for x in jax.tree.leaves(shapes))
