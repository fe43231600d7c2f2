"""Rotary positions: what turning keeps, and how far beyond the length that a model was trained with.

tests/hf compares the scalings with transformers' own.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost.errors import UserError
from lmboost.models import rope, transformer
from lmboost.models.model_config import ModelConfig
from lmboost.models.presets import PRESETS
from tests.models.test_transformer import BASE, apply, batch, cached, close, params_of

# Heads of 64 features turn 32 pairs, by 1 to 10000^(-31/32) a token.
PLAIN = ModelConfig(head_dim=64, max_seq_len=4096)
YARN = dataclasses.replace(
    PLAIN, rope_scaling="yarn", rope_scaling_factor=4.0, rope_original_seq_len=1024, rope_high_freq_factor=32.0
)
SHORT, LONG = (",".join(str(1 + step * i) for i in range(32)) for step in (0.1, 0.5))
LONGROPE = dataclasses.replace(
    PLAIN, rope_scaling="longrope", rope_original_seq_len=1024, rope_short_factors=SHORT, rope_long_factors=LONG
)


def rope_config(**changes):
    return dataclasses.replace(BASE, head_dim=16, **changes)


def test_rope_depends_on_distance_only():
    config = rope_config()
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.normal(size=(1, 1, 1, 16)), (1, 9, 1, 16)).astype(np.float32) for _ in range(2))

    def scores(shift):
        positions = jnp.arange(9)[None] + shift
        q2, k2 = (rope.apply(jnp.asarray(x), positions, config)[0, :, 0] for x in (q, k))
        return q2 @ k2.T

    close(scores(0), scores(100), 1e-4)
    for distance in range(-8, 9):  # the score is constant along each diagonal
        diagonal = np.diagonal(scores(0), distance)
        close(diagonal, np.full_like(diagonal, diagonal[0]), 1e-4)
    assert np.std(scores(0)) > 0.1


def test_rope_keeps_norms_and_position_zero():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))
    y = rope.apply(x, jnp.arange(5)[None].repeat(2, 0), rope_config())
    close(jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y, axis=-1))
    close(x[:, 0], y[:, 0])


def test_rope_against_complex_numbers():
    config, x = rope_config(rope_theta=500.0), np.random.default_rng(0).normal(size=(1, 7, 2, 16))
    turn = np.exp(1j * np.outer(np.arange(7), 500.0 ** (-np.arange(0, 16, 2) / 16)))[None, :, None]
    z = (x[..., :8] + 1j * x[..., 8:]) * turn
    got = rope.apply(jnp.asarray(x, jnp.float32), jnp.arange(7)[None], config)
    close(np.concatenate([z.real, z.imag], -1), got)


def test_a_fraction_of_rope_is_rope_of_the_first_features():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16))
    positions = jnp.arange(5)[None].repeat(2, 0)
    part = rope.apply(x, positions, rope_config(rope_fraction=0.25))
    np.testing.assert_array_equal(part[..., 4:], x[..., 4:])
    close(part[..., :4], rope.apply(x[..., :4], positions, dataclasses.replace(BASE, head_dim=4)))


def llama3_frequencies(dim, theta, factor, low, high, original):
    """Case by case, as in the Llama 3.1 release."""
    out = []
    for i in range(0, dim, 2):
        frequency = theta ** (-i / dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            out.append(frequency)
        elif wavelength > original / low:
            out.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(out)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "smollm2-135m", "pythia-1b"])
def test_rope_frequencies(name):
    c = PRESETS[name]
    expected = llama3_frequencies(
        c.rotary_dim, c.rope_theta, c.rope_scaling_factor,
        c.rope_low_freq_factor, c.rope_high_freq_factor, c.rope_original_seq_len,
    )  # fmt: skip
    np.testing.assert_allclose(rope.frequencies(c), expected, rtol=1e-5)
    if name == "llama-3.2-1b":
        plain = rope.frequencies(dataclasses.replace(c, rope_scaling_factor=1.0))
        ratio = np.asarray(rope.frequencies(c) / plain)
        assert ratio[0] == 1.0 and np.isclose(ratio[-1], 1 / 32) and ((ratio > 1 / 31) & (ratio < 0.99)).any()


# Beyond the original length


def test_linear_stretches_everything():
    linear = dataclasses.replace(PLAIN, rope_scaling="linear", rope_scaling_factor=8.0)
    np.testing.assert_allclose(rope.frequencies(linear), rope.frequencies(PLAIN) / 8, rtol=1e-6)


@pytest.mark.parametrize("longest", [1, 4096, 5000, 16384])
def test_dynamic_has_a_larger_base_in_longer_sequences(longest):
    dynamic = dataclasses.replace(PLAIN, rope_scaling="dynamic", rope_scaling_factor=4.0, rope_original_seq_len=4096)
    base = 10000 * (4 * max(longest, 4096) / 4096 - 3) ** (64 / 62)
    np.testing.assert_allclose(rope.frequencies(dynamic, longest), base ** (-np.arange(32) / 32), rtol=1e-5)
    assert (base == 10000) == (longest <= 4096)


def test_yarn_keeps_what_turns_often_and_stretches_what_turns_seldom():
    ratio = np.asarray(rope.frequencies(YARN) / rope.frequencies(PLAIN))
    turns = 1024 * 10000 ** (-np.arange(32) / 32) / (2 * math.pi)
    assert np.allclose(ratio[turns > 40], 1) and np.allclose(ratio[turns < 0.8], 0.25)
    between = ratio[(turns < 25) & (turns > 1.5)]
    assert len(between) > 5 and (np.diff(between) < 0).all() and ((between > 0.25) & (between < 1)).all()


def test_longrope_has_factors_by_the_longest_sequence_of_each_row():
    freq = np.asarray(rope.frequencies(LONGROPE, np.array([3, 1024, 1025])))
    expected = [np.asarray(rope.frequencies(PLAIN)) / np.array(x.split(","), float) for x in (SHORT, SHORT, LONG)]
    np.testing.assert_allclose(freq, expected, rtol=1e-6)


def test_an_attention_factor_multiplies_what_is_rotated():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 64)).astype(np.float32)
    half = dataclasses.replace(YARN, rope_fraction=0.5)
    one, three = (
        rope.apply(x, np.arange(5)[None], dataclasses.replace(half, rope_attention_factor=factor)) for factor in (1, 3)
    )
    close(three[..., :32], 3 * one[..., :32])
    np.testing.assert_array_equal(three[..., 32:], x[..., 32:])


@pytest.mark.parametrize("scaling", rope.BY_LENGTH)
def test_a_cache_turns_as_the_longest_sequence_that_it_has_room_for(scaling):
    """And rows of other lengths are turned each by its own."""
    factors = {"rope_short_factors": "1.0,1.1,1.2,1.3", "rope_long_factors": "1.0,2.0,4.0,8.0"}
    config = dataclasses.replace(
        BASE, rope_scaling=scaling, rope_scaling_factor=4.0, rope_original_seq_len=8, **factors
    ).validate()
    params, (tokens, segment_ids, positions) = params_of(config), batch()
    whole, _ = apply(config, params, tokens, segment_ids, positions)
    cache, parts = transformer.init_cache(config, 2, 16), []
    for part in np.split(np.arange(16), [7, 15]):
        h, cache = cached(config, params, tokens[:, part], segment_ids, positions[:, part], cache)
        parts.append(h)
    close(whole, np.concatenate(parts, 1))
    plain, _ = apply(dataclasses.replace(config, rope_scaling_factor=1.0, rope_scaling="llama3"), params, *batch())
    assert np.abs(plain - whole).max() > 1e-3
    alone, _ = apply(config, params, *(x[:, :8] for x in batch()))
    mixed, _ = apply(config, params, tokens, segment_ids, np.where(np.arange(2)[:, None], positions % 8, positions))
    close(mixed[0], whole[0])
    close(mixed[1, :8], alone[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": "ntk"}, "model.rope_scaling='ntk' is not known"),
        ({"rope_short_factors": ""}, "model.rope_short_factors='': '' is no number above 0; as in '1.0,1.25,2.5'"),
        ({"rope_long_factors": "1,0"}, "'0' is no number above 0"),
        ({"rope_long_factors": "1,2"}, "model.rope_long_factors has 2 numbers, but heads of 64 features turn 32 pairs"),
        ({"rope_scaling": "dynamic", "rope_scaling_factor": 2.0, "rope_fraction": 0.05}, "here: 2. Choose larger"),
        ({"rope_attention_factor": 0.0}, "model.rope_attention_factor=0.0: expected a finite number above 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(LONGROPE, **change).validate()
