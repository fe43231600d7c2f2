"""The blended loss in blocks of the vocabulary, too: no device ever has the head, or the gradient of it, as a whole.

Two passes over the blocks of columns. The first adds up what is known of a distribution only at its end: the sums of
exponentials, and of what is weighed with them, for each token. In the second the logits are made again, and with these
sums the gradient of a block of columns, which is spread over the devices before the next one is made. That is a third
more FLOPs of the student's head and twice those of the teacher's, where `blend` computes no logits twice.

Shape suffixes: S shards of the batch, B rows, T tokens, D width, V vocabulary rows, C columns of a block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.models import vocabulary
from lmboost.models.linear import factors
from lmboost.models.vocabulary import NEGATIVE, Head
from lmboost.objective.kd import SoftTargets

HEAD_BYTES, LOGITS_BYTES = 64 * 2**20, 64 * 2**20  # of a device: a float32 gradient of a block, its float32 logits


class Seen(NamedTuple):
    """What the columns so far add up to, for each token [...]; `top` is their largest logit.

    Attributes:
      total: sum of exp(logit - top).
      label: the label's logit.
      teacher_top, teacher_total, teacher_label: likewise of the teacher.
      tempered: sum of exp((teacher's logit - teacher_top) / temperature).
      own, others: sum of the same times the teacher's logit, and times the student's.
    """

    top: jax.Array
    total: jax.Array
    label: jax.Array
    teacher_top: jax.Array
    teacher_total: jax.Array
    teacher_label: jax.Array
    tempered: jax.Array
    own: jax.Array
    others: jax.Array


class _Blocks(NamedTuple):
    """How columns are cut: `count` blocks, each of `width` columns of each of `shards` parts of the vocabulary."""

    count: int
    shards: int
    width: int

    @classmethod
    def of(cls, columns: int, model_width: int) -> "_Blocks":
        shards = sharding.shards("vocab") if columns % sharding.shards("vocab") == 0 else 1
        part, most = columns // shards, max(1, HEAD_BYTES // (4 * model_width))
        count = next(n for n in range(1, part + 1) if part % n == 0 and part // n <= most)
        return cls(count, shards, part // count)

    def cut(self, kernel_DxV: jax.Array) -> jax.Array:
        """[count, D, shards, width], of which no device has more than before."""
        x = kernel_DxV.reshape(kernel_DxV.shape[0], self.shards, self.count, self.width)
        return sharding.constrain(jnp.moveaxis(x, 2, 0), (None, "embed", "vocab", None))

    def join(self, blocks: jax.Array) -> jax.Array:
        """Undoes `cut`."""
        x = jnp.moveaxis(blocks, 0, 2).reshape(blocks.shape[1], -1)
        return sharding.constrain(x, ("embed", "vocab"))

    def columns(self, number: jax.Array) -> jax.Array:
        """Which columns the block has, int32 [C]."""
        shard, place = jnp.arange(self.shards)[:, None], jnp.arange(self.width)
        return (shard * (self.count * self.width) + number * self.width + place).reshape(-1)


def whole(block_DxSxW: jax.Array, dtype) -> jax.Array:
    """A block's columns [D, C], as a device needs them."""
    x = block_DxSxW.astype(dtype).reshape(block_DxSxW.shape[0], -1)
    return sharding.constrain(x, (None, "vocab"))


def _logits(h, kernel_DxC, columns, head: Head, vocab_size: int) -> jax.Array:
    logits = head.cap(jnp.einsum("...d,dc->...c", *factors(h, kernel_DxC), preferred_element_type=jnp.float32))
    return jnp.where(columns < vocab_size, logits, NEGATIVE)


def passes(
    h_BxTxD, head: Head, labels, soft: SoftTargets | None, weigh: Callable[[Seen, Any], tuple[Any, Any]], rows: Any,
    with_gradient: bool,
) -> tuple[Any, tuple[jax.Array, jax.Array] | None]:  # fmt: skip
    """(what `weigh` gives first, (gradient of the hidden states, of the kernel)).

    Args:
      weigh: of what all columns add up to and of `rows`, arrays [B, T], gives the loss's sums and for each token the
        weights of its softmax, of its label, and of the teacher's distribution in the gradient of its logits.
    """
    dtype, blocks = h_BxTxD.dtype, _Blocks.of(head.kernel_DxV.shape[1], h_BxTxD.shape[2])
    kernels = [blocks.cut(head.kernel_DxV)]
    if soft:
        taught = jnp.pad(soft.kernel_ExV, [(0, 0), (0, max(0, head.kernel_DxV.shape[1] - soft.kernel_ExV.shape[1]))])
        kernels.append(blocks.cut(taught[:, : head.kernel_DxV.shape[1]]))
    shards = sharding.batch_shards()
    of_block = blocks.width if sharding.shards("vocab") == blocks.shards else blocks.width * blocks.shards
    tokens = max(1, LOGITS_BYTES // (4 * of_block))
    parts = vocabulary.num_blocks(*h_BxTxD.shape[:2], tokens, shards)
    split = lambda tree: jax.tree.map(lambda x: vocabulary.split_blocks(x, shards, parts), tree)  # noqa: E731
    join = lambda x: vocabulary.join_blocks(x, (*h_BxTxD.shape[:2], *x.shape[4:]))  # noqa: E731
    vocab_size = min(head.vocab_size, soft.vocab_size) if soft else 0
    states = split((h_BxTxD, soft.h_BxTxE if soft else None, labels))
    spread = ("batch", None, None, "vocab")

    def both(h, taught, kernels, columns):
        """The logits of student and teacher, [..., C]."""
        mine = sharding.constrain(_logits(h, kernels[0], columns, head, head.vocab_size), spread)
        if not soft:
            return mine, None
        return mine, sharding.constrain(_logits(taught, kernels[1], columns, soft.head, vocab_size), spread)

    def look(seen, block):
        number, *cut = block
        kernels, columns = [whole(x, dtype) for x in cut], blocks.columns(number)

        def some(_, part):
            (h, taught, labels), seen = part
            return None, _see(seen, *both(h, taught, kernels, columns), columns == labels[..., None], soft)

        return jax.lax.scan(some, None, (states, seen))[1], None

    zeros = jnp.zeros(labels.shape, jnp.float32)
    empty = Seen(*(split(zeros + (NEGATIVE if name.endswith("top") else 0.0)) for name in Seen._fields))
    numbers = jnp.arange(blocks.count)
    seen = jax.lax.scan(look, empty, (numbers, *kernels))[0]
    seen = jax.tree.map(join, seen)
    sums, gradient_weights = weigh(seen, rows)
    if not with_gradient:
        return sums, None
    seen, gradient_weights = split((seen, gradient_weights))

    def learn(h_gradient, block):
        number, *cut = block
        kernels, columns = [whole(x, dtype) for x in cut], blocks.columns(number)

        def some(kernel_gradient, part):
            (h, taught, labels), seen, (of_own, of_label, of_teacher), h_gradient = part
            mine, teachers = both(h, taught, kernels, columns)
            gradient = (of_own / seen.total)[..., None] * jnp.exp(mine - seen.top[..., None])
            gradient -= jnp.where(columns == labels[..., None], of_label[..., None], 0.0)
            if soft:
                share = jnp.exp((teachers - seen.teacher_top[..., None]) / soft.kd.temperature)
                gradient -= (of_teacher / seen.tempered)[..., None] * share
            gradient = head.uncap(gradient, mine).astype(dtype)
            h_gradient += jnp.einsum(
                "sbtc,dc->sbtd", *factors(gradient, kernels[0]), preferred_element_type=jnp.float32
            )
            kernel_gradient += jnp.einsum("sbtd,sbtc->sdc", *factors(h, gradient), preferred_element_type=jnp.float32)
            return kernel_gradient, h_gradient

        empty = jnp.zeros((shards, h_BxTxD.shape[2], blocks.shards * blocks.width), jnp.float32)
        empty = sharding.constrain(empty, ("batch", None, "vocab"))
        kernel_gradient, h_gradient = jax.lax.scan(some, empty, (states, seen, gradient_weights, h_gradient))
        kernel_gradient = kernel_gradient.sum(0).reshape(-1, blocks.shards, blocks.width)
        return h_gradient, sharding.constrain(kernel_gradient, ("embed", "vocab", None))

    h_gradient = split(jnp.zeros(h_BxTxD.shape, jnp.float32))
    h_gradient, kernel_gradient = jax.lax.scan(learn, h_gradient, (numbers, *kernels))
    return sums, (join(h_gradient).astype(dtype), blocks.join(kernel_gradient).astype(head.kernel_DxV.dtype))


def _see(seen: Seen, mine, teachers, is_label, soft: SoftTargets | None) -> Seen:
    """What is known after a block of columns."""
    top = jnp.maximum(seen.top, mine.max(-1))
    total = seen.total * jnp.exp(seen.top - top) + jnp.exp(mine - top[..., None]).sum(-1)
    seen = seen._replace(top=top, total=total, label=seen.label + jnp.where(is_label, mine, 0.0).sum(-1))
    if not soft:
        return seen
    temperature = soft.kd.temperature
    top = jnp.maximum(seen.teacher_top, teachers.max(-1))
    shifted, fell = teachers - top[..., None], seen.teacher_top - top
    exp, before = jnp.exp(shifted / temperature), jnp.exp(fell / temperature)
    return seen._replace(
        teacher_top=top,
        teacher_total=seen.teacher_total * jnp.exp(fell) + jnp.exp(shifted).sum(-1),
        teacher_label=seen.teacher_label + jnp.where(is_label, teachers, 0.0).sum(-1),
        tempered=seen.tempered * before + exp.sum(-1),
        own=seen.own * before + (exp * teachers).sum(-1),
        others=seen.others * before + (exp * mine).sum(-1),
    )
