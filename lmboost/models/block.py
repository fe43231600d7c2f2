"""One layer of the decoder: attention and MLP around the residual stream, and their norms.

Shape suffixes: B batch, T tokens, D model width, H query heads, K key/value heads, N head size, F MLP width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.models import attention, rope
from lmboost.models.linear import Dense
from lmboost.models.model_config import ModelConfig


def normal(config: ModelConfig, residual: bool = False) -> nn.initializers.Initializer:
    """Normal(0, init_std); what writes to the residual stream is scaled by 1/sqrt(2L), as in GPT-2."""
    return nn.initializers.normal(config.init_std / ((2 * config.num_layers) ** 0.5 if residual else 1.0))


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32, returned in the input's dtype."""

    config: ModelConfig
    kind: str = ""

    @nn.compact
    def __call__(self, x):
        kind, centred = self.kind or self.config.norm, self.config.zero_centred_norm
        width = x.shape[-1:]
        y = x.astype(jnp.float32)
        if kind != "rmsnorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.config.norm_eps)
        scale = self.param("scale", nn.initializers.zeros if centred else nn.initializers.ones, width)
        y = y * (1.0 + scale if centred else scale)
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
            return Dense((heads, c.head_dim), c.qkv_bias, c.dtype, normal(c), quantize=c.quantize, name=name)(x_BxTxD)

        q_BxTxHxN = project("q", c.num_heads)
        k_BxTxKxN = project("k", c.num_kv_heads)
        v_BxTxKxN = project("v", c.num_kv_heads)
        if c.qk_norm != "none":
            q_BxTxHxN, k_BxTxKxN = self._normalise(q_BxTxHxN, "q_norm"), self._normalise(k_BxTxKxN, "k_norm")
        if c.position == "rope":
            longest = None
            if c.scales_positions and c.rope_scaling in rope.BY_LENGTH:
                # What is generated may fill all slots, and keys are not turned again.
                longest = positions.max(1) + 1 if cache is None else segment_ids.shape[1]
            q_BxTxHxN, k_BxTxKxN = (rope.apply(x, positions, c, longest) for x in (q_BxTxHxN, k_BxTxKxN))
        if c.scale_attn_by_layer:
            q_BxTxHxN = q_BxTxHxN / (layer + 1).astype(q_BxTxHxN.dtype)
        q_BxTxHxN = sharding.constrain(q_BxTxHxN, ("batch", "length", "heads", None))
        k_BxTxKxN, v_BxTxKxN = (
            sharding.constrain(x, ("batch", "length", "kv_heads", None)) for x in (k_BxTxKxN, v_BxTxKxN)
        )
        self.sow("intermediates", "queries_and_keys", (q_BxTxHxN, k_BxTxKxN))  # for surgery/attention_rank.py
        rule = c.attention_rule
        if cache is None:
            y_BxTxHxN = attention.attend(q_BxTxHxN, k_BxTxKxN, v_BxTxKxN, segment_ids, c.attention, rule)
        else:
            cache = cache.write(layer, k_BxTxKxN, v_BxTxKxN)
            y_BxTxHxN = attention.attend_cached(q_BxTxHxN, cache, layer, c.num_kv_heads, segment_ids, rule)
        self.sow("intermediates", "inputs_and_heads", (x_BxTxD, y_BxTxHxN))  # for surgery/importance.py
        last = normal(c, residual=True)
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
            return Dense((width,), c.mlp_bias, c.dtype, normal(c, residual), quantize=c.quantize, name=name)

        h_BxTxF = dense("up", c.mlp_dim)(x_BxTxD)
        if c.mlp == "silu_gated":
            h_BxTxF = nn.silu(dense("gate", c.mlp_dim)(x_BxTxD)) * h_BxTxF
        elif c.mlp == "gelu_tanh_gated":
            h_BxTxF = nn.gelu(dense("gate", c.mlp_dim)(x_BxTxD), approximate=True) * h_BxTxF
        elif c.mlp == "relu":
            h_BxTxF = nn.relu(h_BxTxF)
        else:
            h_BxTxF = nn.gelu(h_BxTxF, approximate=c.mlp == "gelu_tanh")
        h_BxTxF = sharding.constrain(h_BxTxF, ("batch", "length", "mlp"))
        self.sow("intermediates", "inputs_and_units", (x_BxTxD, h_BxTxF))  # for surgery/importance.py
        return dense("down", c.d_model, residual=True)(h_BxTxF)


class Block(nn.Module):
    """One layer: attention and MLP around the residual stream.

    config: of a model whose layers are all like this one, as `transformer.one_layer` gives it.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, segment_ids, positions, layer, cache: attention.Cache | None = None):
        c = self.config
        attn, mlp = Attention(c, name="attn"), Mlp(c, name="mlp")
        attn_norm, mlp_norm = Norm(c, name="attn_norm"), Norm(c, name="mlp_norm")
        if c.norm_placement == "post":
            y_BxTxD, cache = attn(x_BxTxD, segment_ids, positions, layer, cache)
            x_BxTxD = x_BxTxD + self._given(attn_norm(y_BxTxD))
            x_BxTxD = x_BxTxD + self._given(mlp_norm(mlp(x_BxTxD)))
        elif c.norm_placement == "both":
            y_BxTxD, cache = attn(attn_norm(x_BxTxD), segment_ids, positions, layer, cache)
            x_BxTxD = x_BxTxD + self._given(Norm(c, name="attn_post_norm")(y_BxTxD))
            y_BxTxD = mlp(mlp_norm(x_BxTxD))
            x_BxTxD = x_BxTxD + self._given(Norm(c, name="mlp_post_norm")(y_BxTxD))
        else:
            y_BxTxD, cache = attn(attn_norm(x_BxTxD), segment_ids, positions, layer, cache)
            if c.parallel_residual:
                x_BxTxD = x_BxTxD + self._given(y_BxTxD) + self._given(mlp(mlp_norm(x_BxTxD)))
            else:
                x_BxTxD = x_BxTxD + self._given(y_BxTxD)
                x_BxTxD = x_BxTxD + self._given(mlp(mlp_norm(x_BxTxD)))
        return sharding.constrain(x_BxTxD, ("batch", "length", "act_embed")), cache

    def _given(self, y_BxTxD):
        """What is added to the residual stream."""
        return y_BxTxD if self.config.residual_scale == 1.0 else y_BxTxD * self.config.residual_scale
