"""Rotary position embedding.

Shape suffixes: B batch, T tokens, H heads, N head size.
"""

import jax
import jax.numpy as jnp

from lmboost.models.model_config import ModelConfig


def apply(x_BxTxHxN: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotary embedding in the half-split layout (GPT-NeoX, Llama), on the first `rotary_dim` features.

    Source: RoFormer (arXiv 2104.09864); the optional scaling of low frequencies is Llama 3.1's.
    """
    dim = config.rotary_dim
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies(config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned, kept = x_BxTxHxN[..., :dim], x_BxTxHxN[..., dim:]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BxTxHxN.dtype), kept], axis=-1)


def frequencies(config: ModelConfig) -> jax.Array:
    """Radians per position, float32 [rotary_dim / 2]."""
    dim = config.rotary_dim
    freq = config.rope_theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if config.rope_scaling_factor == 1.0:
        return freq
    # Llama 3.1: wavelengths beyond the original context are stretched, short ones kept, blended between.
    turns = config.rope_original_seq_len * freq / (2 * jnp.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return freq * (keep + (1 - keep) / config.rope_scaling_factor)
