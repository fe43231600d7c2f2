"""Selection: train on the examples that are challenging yet learnable for a small model.

Source: SALT_DS (arXiv 2410.18779): a row's score is the median loss over the tokens that are among the
scorer's k best; the highest scores are kept.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.errors import UserError, one_of
from lmboost.models import vocabulary


@dataclasses.dataclass(frozen=True)
class Selection:
    """How candidates are scored and how many are kept."""

    candidates: int = 1  # candidate rows for each row of the batch
    fraction: float = 1.0  # of the candidates that count; at most 1 / candidates
    k: int = 10
    others: str = "drop"

    def validate(self, field: str = "objective.select") -> "Selection":
        one_of(f"{field}.others", self.others, ("drop", "zero"))
        if self.candidates < 1 or self.k < 1:
            raise UserError(f"{field}.candidates={self.candidates} and {field}.k={self.k} must be at least 1.")
        if not 0 < self.fraction <= 1 / self.candidates + 1e-9:
            raise UserError(
                f"{field}.fraction={self.fraction} must be above 0 and at most 1 / candidates = "
                f"{1 / self.candidates:.4g}: of {self.candidates} candidates per row of the batch, one fits in it."
            )
        return self

    def kept_rows(self, batch_size: int) -> int:
        """Rows of a batch that count; the others are masked."""
        return max(1, round(self.fraction * self.candidates * batch_size))


def score(h_BxTxD, head: vocabulary.Head, targets, weights, selection: Selection, block_tokens: int) -> jax.Array:
    """S_k of each row, float32 [B]: the median of -log p(target) over its learnable tokens.

    A token is learnable if fewer than k logits exceed its own. The others are left out of the median
    ("drop") or count as 0 ("zero"); tokens of weight 0 are left out in any case. A row in which nothing is
    left scores -inf.
    """
    shards = sharding.batch_shards()
    blocks = vocabulary.num_blocks(*h_BxTxD.shape[:2], block_tokens, shards)
    kernel = sharding.constrain(head.kernel_DxV.astype(h_BxTxD.dtype), (None, "vocab"))

    def one_block(_, block):
        h, labels = block
        logits = vocabulary.project(h, vocabulary.Head(kernel, head.vocab_size))
        label_logits = vocabulary.pick(logits, labels)
        better = jnp.sum(logits > label_logits[..., None], axis=-1)
        return None, (jax.nn.logsumexp(logits, axis=-1) - label_logits, better < selection.k)

    xs = tuple(vocabulary.split_blocks(x, shards, blocks) for x in (h_BxTxD, targets))
    _, (loss, learnable) = jax.lax.scan(one_block, None, xs)
    loss, learnable = (vocabulary.join_blocks(x, targets.shape) for x in (loss, learnable))
    counted = weights > 0
    if selection.others == "zero":
        return masked_median(jnp.where(learnable, loss, 0.0), counted)
    return masked_median(loss, counted & learnable)


def masked_median(x_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Median of each row's masked-in values (mean of the middle two for an even number); -inf where none is."""
    rising = jnp.sort(jnp.where(mask_BxT, x_BxT, jnp.inf), axis=1)
    count = mask_BxT.sum(1, keepdims=True)
    low, high = ((count - 1) // 2, count // 2)
    middle = [jnp.take_along_axis(rising, jnp.maximum(i, 0), axis=1) for i in (low, high)]
    return jnp.where(count > 0, (middle[0] + middle[1]) / 2, -jnp.inf)[:, 0]


def choose(scores: jax.Array, batch_size: int, kept_rows: int) -> tuple[jax.Array, jax.Array]:
    """The `batch_size` candidates of highest score, in their own order, and a mask of the best `kept_rows`.

    Returns (indices int32 [B], mask float32 [B]). Ties go to the earlier row.
    """
    _, best = jax.lax.top_k(scores, batch_size)
    order = jnp.argsort(best)
    return best[order], (order < kept_rows).astype(jnp.float32)
