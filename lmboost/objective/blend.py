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
from lmboost.models.vocabulary import Head, over_blocks, pick
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
      block_tokens: tokens per device and block.

    Only `loss` is differentiable; the other sums carry no gradient.
    """
    coefficients = Coefficients(*(jnp.asarray(c, jnp.float32) for c in coefficients or Coefficients()))
    return _blend((head.vocab_size, block_tokens), h_BxTxD, head.kernel_DxV, (targets, weights, coefficients, soft))


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
    vocab_size, block_tokens = static
    targets, weights, coefficients, soft = constants
    head = Head(kernel_DxV, vocab_size).laid_out(h_BxTxD.dtype)
    soft = soft and soft.laid_out()

    def one_block(carry, logits, h_SxBxTxD, rows):
        sums, kernel_gradient_SxDxV = carry
        labels, w, soft_rows = rows
        soft_block = soft and soft.of_block(soft_rows, vocab_size, logits.shape[-1])

        def weigh(logits):
            log_z = jax.nn.logsumexp(logits, axis=-1)
            ce = log_z - pick(logits, labels)
            kd = soft.divergence(logits, soft_block) if soft else jnp.zeros_like(ce)
            teacher = soft.loss(soft_block, labels) if soft else jnp.zeros_like(ce)
            gate = soft and soft.kd.gate_of(ce, teacher)
            blended = coefficients.ce * ce + coefficients.kd * kd
            blended = blended if gate is None else gate * blended + (1 - gate) * ce
            blended, ce, kd, z, teacher = (jnp.sum(w * x) for x in (blended, ce, kd, jnp.square(log_z), teacher))
            loss = blended + coefficients.z * z
            return loss, Sums(loss, ce, kd, z, teacher, jnp.sum(w))

        if not with_gradient:
            return (jax.tree.map(jnp.add, sums, weigh(logits)[1]), None), None
        logits_gradient, block_sums = jax.grad(weigh, has_aux=True)(logits)
        logits_gradient = logits_gradient.astype(h_SxBxTxD.dtype)
        h_gradient = jnp.einsum("sbtv,dv->sbtd", logits_gradient, head.kernel_DxV)
        # One sum per shard: devices add up their own tokens, and exchange once, after the last block.
        kernel_gradient_SxDxV += jnp.einsum(
            "sbtd,sbtv->sdv", *factors(h_SxBxTxD, logits_gradient), preferred_element_type=jnp.float32
        )
        return (jax.tree.map(jnp.add, sums, block_sums), kernel_gradient_SxDxV), h_gradient

    zeros = Sums(*(jnp.zeros((), jnp.float32),) * 6)
    gradient_zeros = None
    if with_gradient:
        gradient_zeros = jnp.zeros((sharding.batch_shards(), *kernel_DxV.shape), jnp.float32)
        gradient_zeros = sharding.constrain(gradient_zeros, ("batch", None, "vocab"))
    rows = (targets, weights, soft and soft.per_token)
    (sums, kernel_gradient_SxDxV), h_gradient = over_blocks(
        one_block, head, h_BxTxD, rows, block_tokens, (zeros, gradient_zeros)
    )
    if not with_gradient:
        return sums, None
    kernel_gradient = sharding.constrain(kernel_gradient_SxDxV.sum(0), ("embed", "vocab")).astype(kernel_DxV.dtype)
    return sums, (h_gradient, kernel_gradient)
