"""From hidden states to logits, a block of tokens at a time.

A [batch, tokens, vocabulary] array of a large model does not fit into memory, so whoever needs logits (objective,
selection, generation, harness) projects blocks of tokens and reduces each before the next one is made.

Shape suffixes: S shards of the batch, B rows, T tokens, D width, V vocabulary rows.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.models import transformer
from lmboost.models.linear import factors
from lmboost.models.model_config import ModelConfig

# Of a device, where the size of blocks is not given: logits of one, large enough for a TPU's matrix unit; and what is
# kept of several to be multiplied at once, so that the gradient of the head is read and written seldom.
LOGITS_BYTES, GROUP_BYTES = 128 * 2**20, 256 * 2**20
NEGATIVE = -1e30  # logit of what must never be predicted; finite, so that 0 * NEGATIVE is 0


class Head(NamedTuple):
    """What turns a hidden state into logits."""

    kernel_DxV: jax.Array
    vocab_size: int  # columns from here on are padding
    softcap: float = 0.0  # c: logits are c tanh(h kernel / c); 0 is h kernel

    @classmethod
    def of(cls, model: ModelConfig, params: Mapping[str, Any]) -> "Head":
        """That of a model, from its parameters."""
        return cls(transformer.head(params), model.vocab_size, model.logit_softcap)

    def cap(self, logits):
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits

    def uncap(self, gradient, logits):
        """The gradient of h kernel, from that of the logits; columns of padding, where that is 0, keep 0."""
        # d tanh(x) / dx = 1 - tanh(x)^2, of the logits as they are: those of padding are far beyond the cap.
        return gradient * (1 - jnp.square(jnp.clip(logits / self.softcap, -1, 1))) if self.softcap else gradient

    def laid_out(self, dtype) -> "Head":
        """The same in `dtype`, where every block of tokens finds it: whole but for the vocabulary's axis."""
        return self._replace(kernel_DxV=sharding.constrain(self.kernel_DxV.astype(dtype), (None, "vocab")))


def pick(logits, labels):
    """logits[..., label], as a masked sum: a gather would collect a vocabulary that is spread over devices."""
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(columns == labels[..., None], logits, 0.0), axis=-1)


def project(h, head: Head, vocab_size: int | None = None, rows: int | None = None) -> jax.Array:
    """float32 logits [..., V]; columns from `vocab_size` on are NEGATIVE; cut or filled up to `rows` columns."""
    kernel, rows = head.kernel_DxV.astype(h.dtype), rows or head.kernel_DxV.shape[1]
    if kernel.shape[1] != rows:
        kernel = jnp.pad(kernel[:, :rows], [(0, 0), (0, max(rows - kernel.shape[1], 0))])
    logits = head.cap(jnp.einsum("...d,dv->...v", *factors(h, kernel), preferred_element_type=jnp.float32))
    vocab_size = min(vocab_size or head.vocab_size, head.vocab_size)
    if vocab_size == rows:
        return logits
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(columns < vocab_size, logits, NEGATIVE)


def spread(ids, values, columns: int, fill: float) -> jax.Array:
    """[..., V] of `columns`, `fill` everywhere but at `ids` [..., K], where it has `values` [..., K].

    An id of `columns` or more is nowhere. Each device writes the columns that it has of a vocabulary that is spread.
    """
    axes = ("batch",) + (None,) * (ids.ndim - 1)
    whole = sharding.constrain(jnp.full((*ids.shape[:-1], columns), fill, values.dtype), (*axes[:-1], "vocab"))

    def write(part, ids, values):
        first = jax.lax.axis_index(sharding.RULES["vocab"]) * part.shape[-1] if part.shape[-1] < columns else 0
        own = (ids >= first) & (ids < first + part.shape[-1])
        flat = part.reshape(-1, part.shape[-1])
        rows = jnp.arange(flat.shape[0])[:, None]
        places = jnp.where(own, ids - first, part.shape[-1]).reshape(flat.shape[0], -1)
        return flat.at[rows, places].set(values.reshape(places.shape), mode="drop").reshape(part.shape)

    return sharding.per_device(write, ((*axes[:-1], "vocab"), axes, axes), (*axes[:-1], "vocab"))(whole, ids, values)


def over_blocks(fn: Callable, head: Head, h_BxTxD, rows: Any, block_tokens: int, carry: Any = None) -> tuple[Any, Any]:
    """`carry, out = fn(carry, logits, h, rows)` for each block of tokens, one after the other.

    Args:
      head: laid out, see `Head.laid_out`.
      rows: a tree of arrays [B, T, ...] that are cut as the hidden states are.
      block_tokens: tokens per device and block; 0 is `block_of`.

    In a block arrays are [S, B / S, T / blocks, ...], logits float32 [..., V]. Returns the last carry, and what was
    given out as a tree of [B, T, ...].
    """
    shards = sharding.batch_shards()
    blocks = num_blocks(*h_BxTxD.shape[:2], block_of(block_tokens, head), shards)
    xs = jax.tree.map(lambda x: split_blocks(x, shards, blocks), (h_BxTxD, rows))
    carry, out = jax.lax.scan(_of_logits(fn, head), carry, xs)
    return carry, jax.tree.map(lambda x: join_blocks(x, (*h_BxTxD.shape[:2], *x.shape[4:])), out)


def over_groups(
    fn: Callable, then: Callable, head: Head, h_BxTxD, rows: Any, block_tokens: int, carries: tuple[Any, Any]
) -> tuple[tuple[Any, Any], jax.Array]:
    """As `over_blocks`, but what `fn` gives out of several blocks is taken together, and is of no block's size then.

    `carries[1], out = then(carries[1], h, given)` for each group of blocks, where `given` is what `fn`, which has
    `carries[0]`, gave out of them, and `h` their hidden states [blocks, S, B / S, T / all blocks, D]; `out` is like h.

    A group is as many blocks as have `GROUP_BYTES` in the model's dtype, where block_tokens is 0, or one.
    """
    shards, (batch, tokens) = sharding.batch_shards(), h_BxTxD.shape[:2]
    block = block_of(block_tokens, head)
    size = block_tokens or max(block, GROUP_BYTES // (h_BxTxD.dtype.itemsize * _columns(head)))
    groups = num_blocks(batch, tokens, size, shards)
    blocks = num_blocks(batch, tokens // groups, block, shards)

    def cut(x):  # [S, B / S, T / groups, ...] -> [blocks, S, B / S, T / all blocks, ...]
        x = x.reshape(*x.shape[:2], blocks, x.shape[2] // blocks, *x.shape[3:])
        return sharding.constrain(jnp.moveaxis(x, 2, 0), (None, "batch") + (None,) * (x.ndim - 2))

    def one_group(carries, group):
        h, rows = jax.tree.map(cut, group)
        first, given = jax.lax.scan(_of_logits(fn, head), carries[0], (h, rows))
        second, out = then(carries[1], h, given)
        out = jnp.moveaxis(out, 0, 2)
        return (first, second), out.reshape(*out.shape[:2], -1, out.shape[-1])

    xs = jax.tree.map(lambda x: split_blocks(x, shards, groups), (h_BxTxD, rows))
    carries, out = jax.lax.scan(one_group, carries, xs)
    return carries, join_blocks(out, (batch, tokens, out.shape[-1]))


def _of_logits(fn: Callable, head: Head) -> Callable:
    """A step of a scan over (hidden states, rows) of blocks that calls `fn` with their logits."""

    def step(carry, block):
        h, rows = block
        logits = sharding.constrain(project(h, head), ("batch", None, None, "vocab"))
        return fn(carry, logits, h, rows)

    return step


def block_of(block_tokens: int, head: Head) -> int:
    """Tokens per device and block: what is given, or for 0 as many as have `LOGITS_BYTES` of float32 logits."""
    return block_tokens or max(1, LOGITS_BYTES // (4 * _columns(head)))


def _columns(head: Head) -> int:
    """Of the vocabulary on a device."""
    columns, shards = head.kernel_DxV.shape[1], sharding.shards("vocab")
    return columns // shards if columns % shards == 0 else columns


def num_blocks(rows: int, seq_len: int, block_tokens: int, shards: int) -> int:
    """Blocks that a batch is cut in along its tokens: the fewest that divide seq_len and fit block_tokens."""
    fits = (n for n in range(1, seq_len + 1) if seq_len % n == 0 and rows * (seq_len // n) <= block_tokens * shards)
    return next(fits, seq_len)


def split_blocks(x: jax.Array, shards: int, blocks: int) -> jax.Array:
    """[B, T, ...] -> [blocks, S, B / S, T / blocks, ...]; rows stay on their device."""
    rows, tokens = x.shape[:2]
    x = x.reshape(shards, rows // shards, blocks, tokens // blocks, *x.shape[2:])
    return sharding.constrain(jnp.moveaxis(x, 2, 0), (None, "batch") + (None,) * (x.ndim - 2))


def join_blocks(x: jax.Array, shape) -> jax.Array:
    """Undoes split_blocks."""
    x = jnp.moveaxis(x, 0, 2).reshape(shape)
    return sharding.constrain(x, sharding.row_axes(x.ndim))
