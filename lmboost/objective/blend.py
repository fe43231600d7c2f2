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
from lmboost.models.vocabulary import Head, join_blocks, num_blocks, project, split_blocks
from lmboost.objective.kd import token_terms


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
    count: jax.Array


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
