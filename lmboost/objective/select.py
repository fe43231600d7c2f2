"""Selection: train on the examples that are challenging yet learnable for a small model.

Source: SALT_DS (arXiv 2410.18779): a row's score is the median loss over the tokens that are among the
scorer's k best; the highest scores are kept. A scorer of other tokens than the data's gives the loss a byte instead:
its tokens are longer in one row than in another, and a row is chosen for what there is to learn in its text.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lmboost.errors import UserError, one_of
from lmboost.models import vocabulary
from lmboost.schedules import Weight, stop_step


@dataclasses.dataclass(frozen=True)
class Selection:
    """How candidates are scored and how many are kept."""

    candidates: int = 1  # candidate rows for each row of the batch
    fraction: float = 1.0  # of the candidates that count; at most 1 / candidates
    k: int = 10
    others: str = "drop"

    def validate(self, field: str = "objective.select") -> "Selection":
        one_of(f"{field}.others", self.others, ("drop", "zero"))
        for name, value in (("candidates", self.candidates), ("k", self.k)):
            if value < 1:
                raise UserError(f"{field}.{name}={value}: expected at least 1.")
        if not 0 < self.fraction <= 1 / self.candidates + 1e-9:
            raise UserError(
                f"{field}.fraction={self.fraction} with {field}.candidates={self.candidates}: expected above 0 and at "
                f"most 1 / candidates = {1 / self.candidates:g}, or -1 for just that."
            )
        return self

    @property
    def everything(self) -> bool:
        """Whether nothing is selected: as many candidates as rows, all of which count."""
        return self.candidates == 1 and self.fraction >= 1

    def kept_rows(self, batch_size: int) -> int:
        """Rows of a batch that count; the others are masked."""
        return max(1, round(self.fraction * self.candidates * batch_size))


def from_config(c: ConfigDict) -> Selection:
    """The selection of the `objective.select` subtree; raises a UserError where it is none."""
    fraction = 1 / max(c.candidates, 1) if c.fraction == -1 else c.fraction
    return Selection(c.candidates, fraction, c.k, c.others).validate()


def schedule(c: ConfigDict, steps: int) -> tuple[Weight, int]:
    """1 while rows are selected, 0 after it; and the first step without it."""
    stop = stop_step("objective.select.stop", c.stop, steps)
    stop = 0 if from_config(c).everything else stop
    return lambda step, share=1.0: jnp.where(step < stop, 1.0, 0.0), stop


def score(
    h_BxTxD, head: vocabulary.Head, targets, weights, selection: Selection, block_tokens: int, bytes_BxT=None
) -> jax.Array:
    """S_k of each row, float32 [B]: the median of -log p(target) over its learnable tokens.

    A token is learnable if fewer than k logits exceed its own. The others are left out of the median
    ("drop") or count as 0 ("zero"); tokens of weight 0 are left out in any case. A row in which nothing is
    left scores -inf.

    bytes_BxT: of the targets; then the score is the sum over the same tokens divided by that of their bytes.
    """

    def one_block(_, logits, h, labels):
        label_logits = vocabulary.pick(logits, labels)
        better = jnp.sum(logits > label_logits[..., None], axis=-1)
        return None, (jax.nn.logsumexp(logits, axis=-1) - label_logits, better < selection.k)

    head = head.laid_out(h_BxTxD.dtype)
    _, (loss, learnable) = vocabulary.over_blocks(one_block, head, h_BxTxD, targets, block_tokens)
    counted = weights > 0
    if bytes_BxT is not None:
        size = jnp.sum(bytes_BxT * (counted & (learnable | (selection.others == "zero"))), axis=1)
        return jnp.where(size > 0, jnp.sum(loss * (counted & learnable), axis=1) / jnp.maximum(size, 1), -jnp.inf)
    if selection.others == "zero":
        return masked_median(jnp.where(learnable, loss, 0.0), counted)
    return masked_median(loss, counted & learnable)


def masked_median(x_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Median of each row's masked-in values (mean of the middle two for an even number); -inf where none is."""
    rising = jnp.sort(jnp.where(mask_BxT, x_BxT, jnp.inf), axis=1)
    count = mask_BxT.sum(1, keepdims=True)
    places = ((count - 1) // 2, count // 2)
    low, high = (jnp.take_along_axis(rising, jnp.maximum(i, 0), axis=1) for i in places)
    return jnp.where(count > 0, (low + high) / 2, -jnp.inf)[:, 0]


def choose(scores: jax.Array, batch_size: int, kept_rows: int) -> tuple[jax.Array, jax.Array]:
    """The `batch_size` candidates of highest score, in their own order, and a mask of the best `kept_rows`.

    Returns (indices int32 [B], mask float32 [B]). Ties go to the earlier row.
    """
    _, best = jax.lax.top_k(scores, batch_size)
    order = jnp.argsort(best)
    return best[order], (order < kept_rows).astype(jnp.float32)
