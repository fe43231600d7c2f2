"""Rank and column mass of attention matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost.models import attention, transformer
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import attention_rank

T = 100
UNIFORM = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
FIRST = np.eye(T)[np.zeros(T, int)]
CONFIG = ModelConfig(
    vocab_size=97, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_seq_len=T,
    dtype="float32", init_std=0.2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("matrix", "k", "m"),
    [(UNIFORM, 5, 30), (FIRST, 1, 1), (np.eye(T), 90, 90)],
    ids=["uniform", "first token", "itself"],
)
def test_known_matrices(matrix, k, m):
    a = jnp.asarray(np.stack([matrix, matrix]), jnp.float32)
    assert attention_rank.rank(a).tolist() == [k, k]
    assert attention_rank.columns(a).tolist() == [m, m]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 7}, {"qk_norm": "head"}, {"scale_attn_by_layer": True}])
def test_the_matrices_are_those_that_the_model_attends_with(changes):
    """Values put through them by hand give what `attend` gives, layer by layer."""
    config = dataclasses.replace(CONFIG, **changes)
    params, tokens = transformer.init(config, jax.random.key(0)), jax.random.randint(jax.random.key(1), (2, 20), 0, 97)
    matrices = attention_rank.attention_matrices(config, params, tokens)
    assert matrices.shape == (3, 2, 4, 20, 20)
    np.testing.assert_allclose(matrices.sum(-1), 1, rtol=1e-5)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 20, h, 8)) for i, h in ((2, 4), (3, 2), (4, 2)))
    ids = jnp.ones((2, 20), jnp.int32)
    by_hand = jnp.einsum("bhts,bshn->bthn", attention.weights(q, k, ids, config.attention_rule), jnp.repeat(v, 2, 2))
    np.testing.assert_allclose(by_hand, attention.attend(q, k, v, ids, "xla", config.attention_rule), atol=1e-5)
    # A model whose queries are zero attends to all that it sees alike.
    params["layers"]["attn"]["q"]["kernel"] = jnp.zeros_like(params["layers"]["attn"]["q"]["kernel"])
    seen = np.tril(np.ones((20, 20))) * (1 if not config.sliding_window else np.triu(np.ones((20, 20)), -6))
    uniform = seen / seen.sum(-1, keepdims=True)
    flat = attention_rank.attention_matrices(config, params, tokens)
    np.testing.assert_allclose(flat, np.broadcast_to(uniform, flat.shape), atol=1e-6)


def test_measure_and_what_it_proposes():
    params = transformer.init(CONFIG, jax.random.key(0))
    params["layers"]["attn"]["q"]["kernel"] *= 0  # uniform attention everywhere
    rows = np.random.default_rng(0).integers(0, 97, (6, T))
    ranks = attention_rank.measure(CONFIG, params, rows, batch_size=4)
    np.testing.assert_array_equal(ranks.rank, np.full((3, 4), 5.0))
    np.testing.assert_array_equal(ranks.columns, np.full((3, 4), 30.0))
    assert ranks.lazy == [] and ranks.proposed_layers() == 3
    one, five = np.ones(4), np.full(4, 5.0)
    ranks = attention_rank.Ranks(np.stack([five, five, five, one, one, one]), np.ones((6, 4)))
    assert ranks.lazy == [3, 4, 5] and ranks.proposed_layers() == 3
    assert attention_rank.Ranks(np.stack([one, one, five, one]), np.ones((4, 4))).proposed_layers() == 3
