"""Causal attention within segments: one function, several kernels.

Shape suffixes: B batch, T tokens, H query heads, K key/value heads, N head size.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models.linear import factors

_UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # a logit of what is not seen; finite, as a row may see nothing
IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash", "splash_interpret")


class Rule(NamedTuple):
    """Which logits attention makes, and of which keys.

    Attributes:
      window: how many tokens a query sees at most, itself included; 0 is no limit.
      scale: what q k is multiplied by; 0 is 1 / sqrt(N).
      softcap: c of the logits c tanh(q k scale / c); 0 is none.
    """

    window: int = 0
    scale: float = 0.0
    softcap: float = 0.0

    def of_head(self, head_dim: int) -> float:
        """What q k is multiplied by in heads of that size."""
        return self.scale or head_dim**-0.5

    def cap(self, logits: jax.Array) -> jax.Array:
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits


PLAIN = Rule()


def resolve(
    implementation: str,
    platform: str,
    seq_len: int,
    head_dims: Collection[int],
    dtype: str,
    field: str = "model",
    softcap: bool = False,
) -> str:
    """Turns "auto" into the fastest kernel for `platform` ("cpu", "gpu", "tpu") that takes these shapes.

    head_dims: the sizes that heads have; a kernel must take those of all layers.
    softcap: whether logits have a soft cap.

    Raises a UserError where a kernel is asked for that the platform does not have, or that does not take the shapes.
    """
    heads_fit = all(size % 8 == 0 and size <= 128 for size in head_dims)
    cudnn = platform == "gpu" and dtype == "bfloat16" and heads_fit and seq_len % 2 == 0 and not softcap
    splash = platform == "tpu" and seq_len % 128 == 0
    if implementation == "auto":
        return "cudnn" if cudnn else "splash" if splash else "xla"
    if (implementation == "cudnn" and not cudnn) or (implementation == "splash" and not splash):
        needs = {
            "cudnn": "a GPU, dtype bfloat16, head_dim a multiple of 8 up to 128, an even seq_len, no attn_softcap",
            "splash": "a TPU and a seq_len that is a multiple of 128",
        }[implementation]
        raise UserError(
            f"{field}.attention={implementation!r} needs {needs}; here: platform {platform}, dtype {dtype}, "
            f"head_dim {', '.join(map(str, sorted(head_dims)))}, seq_len {seq_len}"
            f"{', attn_softcap' if softcap else ''}. Use 'auto'."
        )
    return implementation


def attend(q_BxTxHxN, k_BxTxKxN, v_BxTxKxN, segment_ids, implementation: str, rule: Rule = PLAIN) -> jax.Array:
    """softmax(q k / sqrt(N)) v over earlier tokens of the same segment; or what `rule` has in the place of it.

    Args:
      q_BxTxHxN, k_BxTxKxN, v_BxTxKxN: one float dtype; H is a multiple of K.
      segment_ids: int32 [B, T].
      implementation: one of IMPLEMENTATIONS; "auto" stands for "xla" here (`resolve` knows the platform).
        "splash_interpret" runs the TPU kernel in the interpreter, for tests.

    Returns: [B, T, H, N] in the dtype of q.
    """
    if implementation.startswith("splash"):
        return _splash(q_BxTxHxN, k_BxTxKxN, v_BxTxKxN, segment_ids, implementation == "splash_interpret", rule)
    if rule.softcap:
        weights_BxHxTxT = weights(q_BxTxHxN, k_BxTxKxN, segment_ids, rule)
        return _weighed(weights_BxHxTxT, v_BxTxKxN)
    mask_Bx1xTxT = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BxTxHxN, k_BxTxKxN, v_BxTxKxN, mask=mask_Bx1xTxT, is_causal=True, scale=rule.scale or None,
        local_window_size=(rule.window - 1, 0) if rule.window else None,
        implementation="cudnn" if implementation == "cudnn" else "xla",
    )  # fmt: skip


def weights(q_BxTxHxN, k_BxTxKxN, segment_ids, rule: Rule = PLAIN) -> jax.Array:
    """The matrices that `attend` multiplies values with, float32 [B, H, T, T]."""
    tokens = jnp.arange(q_BxTxHxN.shape[1])
    distance_TxT = tokens[:, None] - tokens
    seen_BxTxT = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (distance_TxT >= 0)
    if rule.window:
        seen_BxTxT &= distance_TxT < rule.window
    return _weights(q_BxTxHxN, k_BxTxKxN, seen_BxTxT, rule)


def _weights(q_BxTxHxN, k_BxSxKxN, seen_BxTxS, rule: Rule) -> jax.Array:
    """float32 [B, H, T, S]; uniform where a query sees nothing, as in padding."""
    (batch, tokens, heads, head_dim), kv_heads = q_BxTxHxN.shape, k_BxSxKxN.shape[2]
    q_BxTxKxGxN = q_BxTxHxN.reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    logits = jnp.einsum("btkgn,bskn->bkgts", *factors(q_BxTxKxGxN, k_BxSxKxN), preferred_element_type=jnp.float32)
    logits_BxHxTxS = rule.cap(logits.reshape(batch, heads, tokens, -1) * rule.of_head(head_dim))
    return jax.nn.softmax(jnp.where(seen_BxTxS[:, None], logits_BxHxTxS, _UNSEEN), axis=-1)


def _weighed(weights_BxHxTxS, v_BxSxKxN) -> jax.Array:
    """Sums of values, [B, T, H, N] in their dtype."""
    batch, heads, tokens, slots = weights_BxHxTxS.shape
    kv_heads, dtype = v_BxSxKxN.shape[2], v_BxSxKxN.dtype
    weights_BxKxGxTxS = weights_BxHxTxS.reshape(batch, kv_heads, heads // kv_heads, tokens, slots).astype(dtype)
    y = jnp.einsum("bkgts,bskn->btkgn", *factors(weights_BxKxGxTxS, v_BxSxKxN), preferred_element_type=jnp.float32)
    return y.reshape(batch, tokens, heads, -1).astype(dtype)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, of every layer.

    Attributes:
      k_LxBxSxKxN, v_LxBxSxKxN: S slots for each sequence, in the compute dtype. Layers with fewer heads or smaller
        ones than others fill the first of them.
      index: int32 scalar, slots that are filled; the same for all sequences (shorter ones are padded on the left).
    """

    k_LxBxSxKxN: jax.Array
    v_LxBxSxKxN: jax.Array
    index: jax.Array

    def write(self, layer, k_BxTxKxN, v_BxTxKxN) -> "Cache":
        """With the next T tokens of one layer; `index` stays until every layer has written."""
        start = (layer, 0, self.index, 0, 0)
        k = jax.lax.dynamic_update_slice(self.k_LxBxSxKxN, k_BxTxKxN[None], start)
        v = jax.lax.dynamic_update_slice(self.v_LxBxSxKxN, v_BxTxKxN[None], start)
        return Cache(k, v, self.index)


def attend_cached(q_BxTxHxN, cache: Cache, layer, kv_heads: int, segment_ids, rule: Rule = PLAIN) -> jax.Array:
    """As `attend`, for T new tokens whose keys and values `cache` holds from slot `cache.index` on.

    segment_ids: int32 [B, S], of all slots; what a slot beyond the new tokens holds does not matter.
    """
    own = (..., slice(kv_heads), slice(q_BxTxHxN.shape[-1]))  # slots are as large as the largest layer needs them
    k_BxSxKxN, v_BxSxKxN = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)[own] for x in cache[:2])
    tokens, slots = q_BxTxHxN.shape[1], jnp.arange(k_BxSxKxN.shape[1])
    queries_T = cache.index + jnp.arange(tokens)
    q_segments = jax.lax.dynamic_slice_in_dim(segment_ids, cache.index, tokens, axis=1)
    mask_BxTxS = (q_segments[:, :, None] == segment_ids[:, None, :]) & (slots <= queries_T[:, None])
    if rule.window:
        mask_BxTxS &= queries_T[:, None] - slots < rule.window
    if rule.softcap:
        return _weighed(_weights(q_BxTxHxN, k_BxSxKxN, mask_BxTxS, rule), v_BxSxKxN)
    return jax.nn.dot_product_attention(
        q_BxTxHxN, k_BxSxKxN, v_BxSxKxN, mask=mask_BxTxS[:, None], scale=rule.scale or None
    )


def _splash(q_BxTxHxN, k_BxTxKxN, v_BxTxKxN, segment_ids, interpret: bool, rule: Rule) -> jax.Array:
    """Splash attention, one call per device on its own rows and heads."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    heads, kv_heads = q_BxTxHxN.shape[2], k_BxTxKxN.shape[2]
    parts = sharding.shards("heads")
    if heads % parts == 0 and kv_heads % parts:
        # Each device needs the key/value heads of its own queries: repeat them until they can be dealt out.
        repeats = parts // math.gcd(kv_heads, parts)
        repeats = repeats if heads % (kv_heads * repeats) == 0 else heads // kv_heads
        k_BxTxKxN, v_BxTxKxN = (jnp.repeat(x, repeats, axis=2) for x in (k_BxTxKxN, v_BxTxKxN))
    groups = heads // k_BxTxKxN.shape[2]
    scale = rule.of_head(q_BxTxHxN.shape[-1])
    # The kernel wants heads before tokens, and queries that are scaled already.
    q_BxHxTxN, k_BxKxTxN, v_BxKxTxN = (jnp.swapaxes(x, 1, 2) for x in (q_BxTxHxN * scale, k_BxTxKxN, v_BxTxKxN))

    def local(q_BxHxTxN, k_BxKxTxN, v_BxKxTxN, segment_ids):
        tokens, head_dim = q_BxHxTxN.shape[2:]
        block = splash_block(tokens, head_dim, rule.window)
        sizes = splash_blocks(block, block)
        kernel = splash_kernel(groups, tokens, interpret, rule.window, sizes, rule.softcap)
        heads = k_BxKxTxN.shape[1]
        q_BxKxGxTxN = q_BxHxTxN.reshape(q_BxHxTxN.shape[0], heads, groups, *q_BxHxTxN.shape[2:])
        per_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        y = jax.vmap(per_head)(q_BxKxGxTxN, k_BxKxTxN, v_BxKxTxN, splash.SegmentIds(q=segment_ids, kv=segment_ids))
        return y.reshape(q_BxHxTxN.shape)

    q_axes, kv_axes = ("batch", "heads", "length", None), ("batch", "kv_heads", "length", None)
    local = sharding.per_device(local, (q_axes, kv_axes, kv_axes, ("batch", "length")), q_axes)
    y_BxHxTxN = local(q_BxHxTxN, k_BxKxTxN, v_BxKxTxN, segment_ids)
    return jnp.swapaxes(y_BxHxTxN, 1, 2).astype(q_BxTxHxN.dtype)


def splash_kernel(groups: int, seq_len: int, interpret: bool, window: int, sizes, softcap: float = 0.0):
    """The kernel for `groups` query heads that share one key/value head, in blocks of `sizes`.

    Built in each trace: its tables are constants of that trace, which may be for devices that are not here.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (seq_len, seq_len)
    one = masks.LocalMask(shape, window_size=(window - 1, 0), offset=0) if window else masks.CausalMask(shape)
    mask = masks.MultiHeadMask([one] * groups)
    return splash.make_splash_mqa_single_device(
        mask=mask, block_sizes=sizes, interpret=interpret, attn_logits_soft_cap=softcap or None
    )


def splash_block(seq_len: int, head_dim: int, window: int) -> int:
    """How many queries, and as many keys, a block of scores has.

    A score of a large block takes fewer cycles, but more of them are of the future, or beyond the window: the compiler
    has schedules of fewer cycles in all from 2,048 keys on (benchmarks/results/splash_blocks.md).
    """
    large = min(seq_len, window or seq_len) >= 2048 and head_dim <= 128
    return math.gcd(seq_len, 1024 if large else 512)


def splash_blocks(queries: int, keys: int):
    """Blocks of so many queries and keys, forward and backward; of the keys at most 512 are multiplied at once."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    part = min(keys, 512)
    return splash.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=part,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=part, block_q_dq=queries, block_kv_dq=keys,
    )  # fmt: skip
