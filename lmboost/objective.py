"""Cross-entropy blended with distillation, a block of tokens at a time.

A block of hidden states is projected to the vocabulary for student and teacher, reduced to per-token
numbers and to the gradient of the student's hidden states and head, and thrown away: no array of
B x T x V elements exists in either pass, and no logits are computed twice.

Shape suffixes: S shards of the batch, B rows, T tokens, D width, V vocabulary rows.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.errors import UserError, one_of

NEGATIVE = -1e30  # logit of what must never be predicted; finite, so that 0 * NEGATIVE is 0


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What the kd term is; its weight is a function of the step and comes separately.

    Sources: SALT (arXiv 2410.18779) for the temperature on the teacher alone; Hinton et al.
    (arXiv 1503.02531) for both sides and temperature^2.
    """

    temperature: float = 1.0
    temperature_on: str = "teacher"
    divergence: str = "forward"
    top_k: int = 0
    top_p: float = 1.0
    tail: str = "bucket"

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0

    def validate(self, field: str = "objective.kd") -> "Distillation":
        one_of(f"{field}.temperature_on", self.temperature_on, ("teacher", "both"))
        one_of(f"{field}.divergence", self.divergence, ("forward", "reverse", "hard"))
        one_of(f"{field}.tail", self.tail, ("bucket", "renormalise"))
        if self.temperature <= 0:
            raise UserError(f"{field}.temperature={self.temperature} must be above 0.")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"{field}.top_k={self.top_k} must be at least 0, {field}.top_p={self.top_p} in (0, 1].")
        if self.truncated and self.divergence == "reverse" and self.tail == "renormalise":
            raise UserError(
                f"{field}.divergence='reverse' with a truncated teacher needs {field}.tail='bucket': "
                "the teacher gives no probability to the tokens that were cut off."
            )
        return self


class Coefficients(NamedTuple):
    """Weights of the terms in this step; floats or scalar arrays, no gradient."""

    ce: jax.Array | float = 1.0
    kd: jax.Array | float = 0.0
    z: jax.Array | float = 0.0


class Head(NamedTuple):
    """What turns a hidden state into logits."""

    kernel_DxV: jax.Array
    vocab_size: int  # columns from here on are padding


class Sums(NamedTuple):
    """Weighted sums over tokens, float32 scalars; divide by `count` once, after all of them are added."""

    loss: jax.Array
    ce: jax.Array
    kd: jax.Array
    z: jax.Array
    count: jax.Array


def token_terms(logits, labels, teacher_logits, kd: Distillation | None):
    """Per-token (ce, kd, z) from float32 logits [..., V] whose padded columns are NEGATIVE.

    kd is the divergence between teacher and student, zero where they agree: KL rather than the paper's
    cross-entropy, which is larger by the teacher's entropy and has the same gradient. z is log(Z)^2.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    ce = log_z - pick(logits, labels)
    if kd is None:
        return ce, jnp.zeros_like(ce), jnp.square(log_z)
    return ce, _divergence(logits, teacher_logits, kd), jnp.square(log_z)


def _divergence(logits, teacher_logits, kd: Distillation):
    if kd.divergence == "hard":
        return jax.nn.logsumexp(logits, axis=-1) - pick(logits, jnp.argmax(teacher_logits, axis=-1))
    both = kd.temperature_on == "both"
    log_s = jax.nn.log_softmax(logits / kd.temperature if both else logits)
    log_t = jax.nn.log_softmax(teacher_logits / kd.temperature)
    scale = kd.temperature**2 if both else 1.0
    if not kd.truncated:
        return scale * _kl(log_t, log_s, kd.divergence)
    kept = _best_tokens(teacher_logits, log_t, kd)
    if kd.tail == "renormalise":
        log_t = jax.nn.log_softmax(jnp.where(kept, log_t, NEGATIVE))
        return scale * jnp.where(kept, jnp.exp(log_t) * (log_t - log_s), 0.0).sum(-1)
    # One more outcome, "any other token", holds the rest of the probability on both sides.
    tail_s, tail_t = (jax.nn.logsumexp(jnp.where(kept, NEGATIVE, x), axis=-1, keepdims=True) for x in (log_s, log_t))
    log_s, log_t = (jnp.where(kept, x, NEGATIVE) for x in (log_s, log_t))
    return scale * (_kl(log_t, log_s, kd.divergence) + _kl(tail_t, tail_s, kd.divergence))


def _kl(log_t, log_s, direction: str):
    if direction == "forward":
        return (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
    return (jnp.exp(log_s) * (log_s - log_t)).sum(-1)


def _best_tokens(teacher_logits, log_t, kd: Distillation):
    """bool [..., V]: the teacher's top-k and top-p tokens. Tokens that tie with the last one are in."""
    kept = jnp.ones(teacher_logits.shape, bool)
    if 0 < kd.top_k < teacher_logits.shape[-1]:
        # Per device: left to the partitioner, some backends would collect the tokens of all devices for top_k.
        axes = ("batch",) + (None,) * (teacher_logits.ndim - 1)
        kth_best = sharding.per_device(lambda z: jax.lax.top_k(z, kd.top_k)[0][..., -1:], (axes,), axes)
        kept &= teacher_logits >= kth_best(teacher_logits)
    if kd.top_p < 1:
        falling = -jnp.sort(-jnp.exp(log_t), axis=-1)
        before = jnp.cumsum(falling, axis=-1) - falling
        last = jnp.min(jnp.where(before < kd.top_p, falling, jnp.inf), axis=-1, keepdims=True)
        kept &= jnp.exp(log_t) >= last
    return kept


def pick(logits, labels):
    """logits[..., label], as a masked sum: a gather would collect a vocabulary that is spread over devices."""
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(columns == labels[..., None], logits, 0.0), axis=-1)


def project(h, head: Head, vocab_size: int | None = None, rows: int | None = None) -> jax.Array:
    """float32 logits [..., V]; columns from `vocab_size` on are NEGATIVE; cut or filled up to `rows` columns."""
    kernel, rows = head.kernel_DxV.astype(h.dtype), rows or head.kernel_DxV.shape[1]
    if kernel.shape[1] != rows:
        kernel = jnp.pad(kernel[:, :rows], [(0, 0), (0, max(rows - kernel.shape[1], 0))])
    logits = jnp.einsum("...d,dv->...v", h, kernel, preferred_element_type=jnp.float32)
    vocab_size = min(vocab_size or head.vocab_size, head.vocab_size)
    if vocab_size == rows:
        return logits
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(columns < vocab_size, logits, NEGATIVE)


def blend(
    h_BxTxD,
    head: Head,
    targets,
    weights,
    coefficients=None,
    *,
    block_tokens: int,
    kd=None,
    teacher_h=None,
    teacher=None,
) -> Sums:
    """Sums over tokens of weights * (c.ce * ce + c.kd * kd + c.z * log(Z)^2) and of each term alone.

    Args:
      h_BxTxD: the student's last hidden states; logits are float32 whatever its dtype.
      head: the student's. Gradients of `loss` flow to h_BxTxD and to its kernel, and nowhere else.
      targets, weights: [B, T], int32 labels and float32 weights (0 where there is nothing to predict).
      coefficients: Coefficients of this step; default ce alone.
      block_tokens: tokens per device and block.
      kd: a Distillation, with teacher_h [B, T, D'] and the teacher's Head; or None.
        Teacher and student are compared over the vocabulary that both have.

    Only `loss` is differentiable; the other sums carry no gradient.
    """
    coefficients = Coefficients(*(jnp.asarray(c, jnp.float32) for c in coefficients or Coefficients()))
    constants = (targets, weights, coefficients, teacher_h, teacher.kernel_DxV if teacher else None)
    sizes = (head.vocab_size, teacher.vocab_size if teacher else None)
    return _blend((kd, sizes, block_tokens), h_BxTxD, head.kernel_DxV, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend(static, h_BxTxD, kernel_DxV, constants) -> Sums:
    return _scan_blocks(static, h_BxTxD, kernel_DxV, constants, with_gradient=False)[0]


def _blend_forward(static, h_BxTxD, kernel_DxV, constants):
    # The loss is linear in its cotangent, so its gradient is made here, while the block's logits exist.
    return _scan_blocks(static, h_BxTxD, kernel_DxV, constants, with_gradient=True)


def _blend_backward(static, gradients, cotangents: Sums):
    h_gradient, kernel_gradient = gradients
    scale = cotangents.loss
    return (h_gradient * scale.astype(h_gradient.dtype), kernel_gradient * scale.astype(kernel_gradient.dtype), None)


_blend.defvjp(_blend_forward, _blend_backward)


def _scan_blocks(static, h_BxTxD, kernel_DxV, constants, with_gradient: bool):
    kd, (vocab_size, teacher_vocab), block_tokens = static
    targets, weights, coefficients, teacher_h, teacher_kernel = constants
    shards = sharding.batch_shards()
    blocks = num_blocks(*h_BxTxD.shape[:2], block_tokens, shards)
    head = Head(sharding.constrain(kernel_DxV.astype(h_BxTxD.dtype), (None, "vocab")), vocab_size)
    if kd is not None:
        teacher = Head(sharding.constrain(teacher_kernel.astype(teacher_h.dtype), (None, "vocab")), teacher_vocab)

    def one_block(carry, block):
        sums, kernel_gradient_SxDxV = carry
        h_SxBxTxD, labels, w, teacher_h_SxBxTxD = block
        logits = sharding.constrain(project(h_SxBxTxD, head), ("batch", None, None, "vocab"))
        teacher_logits = None
        if kd is not None:
            teacher_logits = project(teacher_h_SxBxTxD, teacher, vocab_size, logits.shape[-1])
            teacher_logits = sharding.constrain(teacher_logits, ("batch", None, None, "vocab"))

        def weigh(logits):
            ce, divergence, z = (jnp.sum(w * x) for x in token_terms(logits, labels, teacher_logits, kd))
            loss = coefficients.ce * ce + coefficients.kd * divergence + coefficients.z * z
            return loss, Sums(loss, ce, divergence, z, jnp.sum(w))

        if not with_gradient:
            return (jax.tree.map(jnp.add, sums, weigh(logits)[1]), None), None
        logits_gradient, block_sums = jax.grad(weigh, has_aux=True)(logits)
        logits_gradient = logits_gradient.astype(h_SxBxTxD.dtype)
        h_gradient = jnp.einsum("sbtv,dv->sbtd", logits_gradient, head.kernel_DxV)
        # One sum per shard: devices add up their own tokens, and exchange once, after the last block.
        kernel_gradient_SxDxV += jnp.einsum(
            "sbtd,sbtv->sdv", h_SxBxTxD, logits_gradient, preferred_element_type=jnp.float32
        )
        return (jax.tree.map(jnp.add, sums, block_sums), kernel_gradient_SxDxV), h_gradient

    zeros = Sums(*(jnp.zeros((), jnp.float32),) * 5)
    gradient_zeros = None
    if with_gradient:
        gradient_zeros = jnp.zeros((shards, *kernel_DxV.shape), jnp.float32)
        gradient_zeros = sharding.constrain(gradient_zeros, ("batch", None, "vocab"))
    split = functools.partial(split_blocks, shards=shards, blocks=blocks)
    xs = jax.tree.map(split, (h_BxTxD, targets, weights, teacher_h))
    (sums, kernel_gradient_SxDxV), h_gradient = jax.lax.scan(one_block, (zeros, gradient_zeros), xs)
    if not with_gradient:
        return sums, None
    kernel_gradient = sharding.constrain(kernel_gradient_SxDxV.sum(0), ("embed", "vocab")).astype(kernel_DxV.dtype)
    return sums, (join_blocks(h_gradient, h_BxTxD.shape), kernel_gradient)


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
    return sharding.constrain(x, ("batch", "length") + (None,) * (len(shape) - 2))
