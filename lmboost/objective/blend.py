"""Cross-entropy blended with distillation, a block of tokens at a time.

A block of hidden states is projected to the vocabulary for student and teacher, reduced to per-token
numbers and to the gradient of the student's hidden states and head, and thrown away: no array of
B x T x V elements exists in either pass, and no logits are computed twice.

Shape suffixes: S shards of the batch, B rows, T tokens, D width, V vocabulary rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.models.linear import factors
from lmboost.models.vocabulary import Head, over_blocks, over_groups, pick
from lmboost.objective import scattered
from lmboost.objective.kd import SoftTargets


class Coefficients(NamedTuple):
    """Weights of the terms in this step; floats or scalar arrays, no gradient."""

    ce: jax.Array | float = 1.0
    kd: jax.Array | float = 0.0
    z: jax.Array | float = 0.0


class Sums(NamedTuple):
    """Weighted sums over tokens, float32 scalars; divide by `count` once, after all of them are added."""

    loss: jax.Array
    ce: jax.Array
    kd: jax.Array
    z: jax.Array
    teacher: jax.Array  # its cross-entropy on the labels
    count: jax.Array


def blend(
    h_BxTxD,
    head: Head,
    targets,
    weights,
    coefficients: Coefficients | None = None,
    soft: SoftTargets | None = None,
    *,
    block_tokens: int,
    scatter: bool = False,
) -> Sums:
    """Sums over tokens of weights * (c.ce * ce + c.kd * kd + c.z * log(Z)^2) and of each term alone.

    Where the soft targets gate a token by g < 1, ce takes the place of what is lost: g * (c.ce * ce + c.kd * kd) +
    (1 - g) * ce.

    Args:
      h_BxTxD: the student's last hidden states; logits are float32 whatever its dtype.
      head: the student's. Gradients of `loss` flow to h_BxTxD and to its kernel, and nowhere else.
      targets, weights: [B, T], int32 labels and float32 weights (0 where there is nothing to predict).
      coefficients: of this step; default ce alone.
      soft: what kd compares the student with, over the vocabulary that both have.
      block_tokens: tokens per device and block; 0 chooses, see `vocabulary.over_groups`.
      scatter: in blocks of the vocabulary, too, see `scattered`; with soft targets from memory of which `is_mixture`.

    Only `loss` is differentiable; the other sums carry no gradient.
    """
    coefficients = Coefficients(*(jnp.asarray(c, jnp.float32) for c in coefficients or Coefficients()))
    return _blend(
        (head._replace(kernel_DxV=None), block_tokens, scatter), h_BxTxD, head.kernel_DxV,
        (targets, weights, coefficients, soft),
    )  # fmt: skip


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
    """(Sums, gradients of the loss by the hidden states and the kernel, or None)."""
    head, block_tokens, scatter = static
    head = head._replace(kernel_DxV=kernel_DxV)
    targets, weights, coefficients, soft = constants
    if scatter:
        return _in_two_passes(h_BxTxD, head, constants, with_gradient)
    head = head.laid_out(h_BxTxD.dtype)
    soft = soft and soft.laid_out()

    def one_block(sums, logits, h_SxBxTxD, rows):
        labels, w, soft_rows = rows
        soft_block = soft and soft.of_block(soft_rows, labels, head.vocab_size, logits.shape[-1])
        weigh = _weigh_mixture if soft is None or soft.is_mixture else _weigh
        block_sums, logits_gradient = weigh(logits, labels, w, coefficients, soft, soft_block, with_gradient)
        logits_gradient = head.uncap(logits_gradient, logits).astype(h_SxBxTxD.dtype) if with_gradient else None
        return jax.tree.map(jnp.add, sums, block_sums), logits_gradient

    def gradients(kernel_gradient_SxDxV, h_NxSxBxTxD, logits_gradient):
        h_gradient = jnp.einsum("nsbtv,dv->nsbtd", logits_gradient, head.kernel_DxV)
        # One sum per shard: devices add up their own tokens, and exchange once, after the last block.
        kernel_gradient_SxDxV += jnp.einsum(
            "nsbtd,nsbtv->sdv", *factors(h_NxSxBxTxD, logits_gradient), preferred_element_type=jnp.float32
        )
        return kernel_gradient_SxDxV, h_gradient

    zeros = Sums(*(jnp.zeros((), jnp.float32),) * 6)
    rows = (targets, weights, soft and soft.per_token)
    if not with_gradient:
        return over_blocks(one_block, head, h_BxTxD, rows, block_tokens, zeros)[0], None
    gradient_zeros = jnp.zeros((sharding.batch_shards(), *kernel_DxV.shape), jnp.float32)
    gradient_zeros = sharding.constrain(gradient_zeros, ("batch", None, "vocab"))
    (sums, kernel_gradient_SxDxV), h_gradient = over_groups(
        one_block, gradients, head, h_BxTxD, rows, block_tokens, (zeros, gradient_zeros)
    )
    kernel_gradient = sharding.constrain(kernel_gradient_SxDxV.sum(0), ("embed", "vocab")).astype(kernel_DxV.dtype)
    return sums, (h_gradient, kernel_gradient)


def _weigh_mixture(logits, labels, w, coefficients: Coefficients, soft, block, with_gradient: bool):
    """(Sums of a block, gradient of the loss by its logits), where kd is as far as the student is from a distribution.

    The gradient of cross-entropy with any distribution q is softmax(logits) - q, so each exponential is taken once.
    """
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    shifted = logits - top
    exp = jnp.exp(shifted)
    total = exp.sum(-1)
    log_z, log_total = jnp.log(total) + top[..., 0], jnp.log(total)
    ce = log_total - pick(shifted, labels)
    kd = teacher = jnp.zeros_like(ce)
    if soft:
        kd = log_total + block.negative_entropy - block.scale * jnp.sum(block.weights * shifted, -1)
        teacher = block.teacher
    sums, (own, of_label, of_teacher) = _mix(log_z, ce, kd, teacher, w, coefficients, soft)
    if not with_gradient:
        return sums, None
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    gradient = (own / total)[..., None] * exp - jnp.where(columns == labels[..., None], of_label[..., None], 0.0)
    if soft:
        gradient -= (of_teacher * block.scale)[..., None] * block.weights
    return sums, gradient


def _mix(log_z, ce, kd, teacher, w, coefficients: Coefficients, soft) -> tuple[Sums, tuple[jax.Array, ...]]:
    """(Sums, by what the student's distribution, the label and the teacher's count in the gradient of its logits)."""
    gate = soft and soft.kd.gate_of(ce, teacher)
    of_ce, of_kd = coefficients.ce, coefficients.kd if soft else 0.0
    if gate is not None:
        of_ce, of_kd = gate * of_ce + (1 - gate), gate * of_kd
    z = jnp.square(log_z)
    sums = [jnp.sum(w * x) for x in (of_ce * ce + of_kd * kd + coefficients.z * z, ce, kd, z, teacher)]
    return Sums(*sums, jnp.sum(w)), (w * (of_ce + of_kd + 2 * coefficients.z * log_z), w * of_ce, w * of_kd)


def _in_two_passes(h_BxTxD, head: Head, constants, with_gradient: bool):
    """As `_scan_blocks`, see `scattered`."""
    targets, weights, coefficients, soft = constants

    def weigh(seen: scattered.Seen, w):
        log_z = jnp.log(seen.total) + seen.top
        ce = log_z - seen.label
        kd = teacher = jnp.zeros_like(ce)
        if soft:
            log_tempered, temperature = jnp.log(seen.tempered), soft.kd.temperature
            negative_entropy = (seen.own / seen.tempered - seen.teacher_top) / temperature - log_tempered
            kd = log_z + negative_entropy - seen.others / seen.tempered
            teacher = jnp.log(seen.teacher_total) + seen.teacher_top - seen.teacher_label
        return _mix(log_z, ce, kd, teacher, w, coefficients, soft)

    return scattered.passes(h_BxTxD, head, targets, soft, weigh, weights, with_gradient)


def _weigh(logits, labels, w, coefficients: Coefficients, soft, block, with_gradient: bool):
    """As `_weigh_mixture`, for a kd of any kind."""

    def weigh(logits):
        log_z = jax.nn.logsumexp(logits, axis=-1)
        ce = log_z - pick(logits, labels)
        kd, teacher = soft.divergence(logits, block), block.teacher
        gate = soft.kd.gate_of(ce, teacher)
        blended = coefficients.ce * ce + coefficients.kd * kd
        blended = blended if gate is None else gate * blended + (1 - gate) * ce
        blended, ce, kd, z, teacher = (jnp.sum(w * x) for x in (blended, ce, kd, jnp.square(log_z), teacher))
        loss = blended + coefficients.z * z
        return loss, Sums(loss, ce, kd, z, teacher, jnp.sum(w))

    if not with_gradient:
        return weigh(logits)[1], None
    gradient, sums = jax.grad(weigh, has_aux=True)(logits)
    return sums, gradient
