"""How much of a model's attention is of rank one: which layers a smaller model can do without.

    python -m lmboost.rank --checkpoint=RUN [--data=DIR] --out=DIR

Inheritune (arXiv 2404.08634), section on attention degeneration. For the [T, T] attention matrix A of a head on one
sequence, with singular values s:

    k*  the least k with sum_{i <= k} s_i^2 >= 0.90 sum_i s_i^2
    m*  the least number of columns whose squares hold 0.90 of the squared Frobenius norm

each averaged over sequences. MaxRank of a layer is the largest k* of its heads; a layer is lazy when that is 1.

Shape suffixes: B sequences, T tokens, L layers, H heads.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmboost.models import attention, transformer
from lmboost.models.block import Block
from lmboost.models.model_config import ModelConfig

SHARE = 0.90  # of the squared norm


def rank(a_TxT: jax.Array) -> jax.Array:
    """k* of each matrix [..., T, T], int32 [...], by singular values in float32."""
    squares = jnp.linalg.svd(a_TxT.astype(jnp.float32), compute_uv=False) ** 2
    return _least(squares)


def columns(a_TxT: jax.Array) -> jax.Array:
    """m* of each matrix [..., T, T], int32 [...]."""
    squares = jnp.sum(a_TxT.astype(jnp.float32) ** 2, axis=-2)
    return _least(-jnp.sort(-squares, axis=-1))


def _least(squares):
    """How many of the largest (they come first) hold SHARE of the sum; rounding of the sum is allowed for."""
    held = jnp.cumsum(squares, axis=-1)
    return 1 + jnp.sum(held < (SHARE - 1e-6) * held[..., -1:], axis=-1, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def attention_matrices(config: ModelConfig, params, tokens_BxT: jax.Array) -> jax.Array:
    """The attention of every layer and head, float32 [L, B, H, T, T]; each row of tokens is one document."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
    segment_ids, layers = jnp.ones_like(tokens_BxT), range(config.num_layers)
    config = dataclasses.replace(config, attention="xla", remat="none")
    _, states = transformer.apply(config, params, tokens_BxT, segment_ids, positions, capture=tuple(layers))

    def one(layer):
        own, weights = transformer.one_layer(config, params, layer)
        _, seen = Block(own, parent=None).apply(
            {"params": weights}, states[layer], segment_ids, positions, jnp.int32(layer), mutable=["intermediates"]
        )
        ((q_BxTxHxN, k_BxTxKxN),) = seen["intermediates"]["attn"]["queries_and_keys"]
        return attention.weights(q_BxTxHxN, k_BxTxKxN, segment_ids, own.attention_rule)

    return jnp.stack([one(layer) for layer in layers])


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Means over sequences, float [L, H]."""

    rank: np.ndarray  # k*
    columns: np.ndarray  # m*

    @property
    def max_rank(self) -> np.ndarray:
        """MaxRank of each layer, float [L]."""
        return self.rank.max(1)

    @property
    def lazy(self) -> list[int]:
        """Layers whose attention is of rank one in every head."""
        return [int(i) for i in np.flatnonzero(self.max_rank <= 1)]

    def proposed_layers(self) -> int:
        """How many of the first layers to inherit: all up to the last one that is not lazy, and half at least."""
        busy = np.flatnonzero(self.max_rank > 1)
        return max(int(busy[-1]) + 1 if busy.size else 0, -(-len(self.rank) // 2))


def measure(config: ModelConfig, params, rows_NxT: np.ndarray, batch_size: int = 4) -> Ranks:
    """k* and m* of every head, over sequences of tokens [N, T] (the paper's: N = 100, T = 100)."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(config, params, tokens_BxT):
        a = attention_matrices(config, params, tokens_BxT)
        return rank(a), columns(a)

    parts = [
        both(config, params, jnp.asarray(rows_NxT[i : i + batch_size], jnp.int32))
        for i in range(0, len(rows_NxT), batch_size)
    ]
    k, m = (np.concatenate([np.asarray(x) for x in xs], axis=1).mean(1) for xs in zip(*parts, strict=True))
    return Ranks(k, m)
