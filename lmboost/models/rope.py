"""Rotary position embedding.

Shape suffixes: B batch, T tokens, H heads, N head size, R rotated pairs of features.
"""

import math

import jax
import jax.numpy as jnp

from lmboost.models.model_config import ModelConfig, parse_factors

# Scalings whose frequencies depend on how long a sequence is.
BY_LENGTH = ("dynamic", "longrope")


def apply(x_BxTxHxN: jax.Array, positions: jax.Array, config: ModelConfig, longest=None) -> jax.Array:
    """Rotary embedding in the half-split layout (GPT-NeoX, Llama), on the first `rotary_dim` features.

    Source: RoFormer (arXiv 2104.09864); for the scalings see `frequencies`.

    Args:
      positions: int32 [B, T].
      longest: as for `frequencies`.
    """
    dim = config.rotary_dim
    angles = positions.astype(jnp.float32)[:, :, None, None]
    freq = frequencies(config, longest)
    angles = angles * (freq if freq.ndim == 1 else freq[:, None, None, :])
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if config.scales_positions and config.rope_attention_factor != 1.0:
        cos, sin = cos * config.rope_attention_factor, sin * config.rope_attention_factor
    turned, kept = x_BxTxHxN[..., :dim], x_BxTxHxN[..., dim:]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BxTxHxN.dtype), kept], axis=-1)


def frequencies(config: ModelConfig, longest=None) -> jax.Array:
    """Radians per position, float32 [R], or [B, R] where `longest` is [B].

    Scalings, by a factor s beyond an original length:
      llama3    wavelengths beyond that length are stretched by s, short ones kept, blended between (Llama 3.1).
      linear    all are stretched by s (arXiv 2306.15595).
      dynamic   the base grows with the sequence, once that is longer (NTK-aware).
      yarn      stretched from one pair of features on, kept up to another, blended between (arXiv 2309.00071,
                section 3.2; as in transformers by the pairs' numbers, which are rounded outwards).
      longrope  each is divided by a factor of its own, of which longer sequences have others (arXiv 2402.13753).

    Args:
      longest: tokens that the longest of a row's sequences has, or may have once it is generated: int32 [B] or an int.
        Counts for scalings in BY_LENGTH alone.
    """
    dim, s = config.rotary_dim, config.rope_scaling_factor
    exponents = -jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    freq = config.rope_theta**exponents
    if not config.scales_positions:
        return freq
    if config.rope_scaling == "linear":
        return freq / s
    if config.rope_scaling == "dynamic":
        original = config.rope_original_seq_len
        grown = jnp.maximum(jnp.asarray(longest, jnp.float32), original) * (s / original) - (s - 1)
        base = config.rope_theta * grown ** (dim / (dim - 2))
        return base[..., None] ** exponents
    if config.rope_scaling == "longrope":
        short, long = (jnp.array(parse_factors(x)) for x in (config.rope_short_factors, config.rope_long_factors))
        is_long = jnp.asarray(longest)[..., None] > config.rope_original_seq_len
        return freq / jnp.where(is_long, long, short)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if config.rope_scaling == "yarn":
        first, last = (_pair_of_turns(config, turns) for turns in (high, low))
        first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
        ramp = (jnp.arange(dim // 2, dtype=jnp.float32) - first) / (last - first or 0.001)
        keep = 1.0 - jnp.clip(ramp, 0.0, 1.0)
    else:
        turns = config.rope_original_seq_len * freq / (2 * jnp.pi)
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return freq * (keep + (1 - keep) / s)


def _pair_of_turns(config: ModelConfig, turns: float) -> float:
    """Which pair of features turns so often within the original length."""
    wavelength = config.rope_original_seq_len / turns
    return config.rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))
