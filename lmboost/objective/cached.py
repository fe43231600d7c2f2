"""Soft labels that a teacher has left on disk: what `blend` compares the student with, where no teacher is in memory.

Of each token there are either draws from the teacher's distribution, with which gradients are those of the whole
distribution in the mean (RS-KD, arXiv 2503.16870), or its best tokens with their log-probabilities and what all others
have together.

Shape suffixes: B rows, T tokens, K tokens of the vocabulary that are known of each, V vocabulary rows.
"""

import flax.struct
import jax
import jax.numpy as jnp

from lmboost.data.scored import SoftLabels
from lmboost.errors import UserError
from lmboost.models.vocabulary import NEGATIVE, pick, spread
from lmboost.objective.kd import Distillation, Known, Mixture, truncated


def check(labels: SoftLabels, kd: Distillation, vocab_size: int, where: str) -> None:
    """Raises a UserError, beginning with `where`, where kd asks for something else than these labels.

    vocab_size: of student and teacher, the smaller one.
    """
    if kd.top_p < 1:
        raise UserError(f"{where} has no top-p labels: set objective.kd.top_p=1, or leave teacher.targets empty.")
    best = labels.number if labels.kind == "best" else 0
    for field, asked, there in (
        ("objective.kd.top_k", kd.top_k, best),
        ("objective.kd.temperature", kd.temperature, labels.temperature),
        ("the vocabulary of student and teacher", vocab_size, labels.vocab_size),
    ):
        if asked != there:
            raise UserError(f"{where} was made with {there} as {field}, but now it is {asked}: score again.")
    if labels.kind == "draws" and kd.divergence != "forward":
        raise UserError(
            f"{where} has draws, of which no objective.kd.divergence={kd.divergence!r} can be computed: take "
            "'forward', or score with objective.kd.top_k above 0."
        )


class CachedTargets(flax.struct.PyTreeNode):
    """As `kd.SoftTargets`, from disk.

    Attributes:
      ids: int [B, T, K]; one beyond the vocabulary is nothing.
      values: how many of the draws each has, or its log-probability, [B, T, K].
      rest: float [B, T]; the entropy of the teacher's distribution, or the log-probability of all other tokens.
      teacher: float [B, T], its cross-entropy on the labels.
    """

    ids: jax.Array
    values: jax.Array
    rest: jax.Array
    teacher: jax.Array
    labels: SoftLabels = flax.struct.field(pytree_node=False)
    kd: Distillation = flax.struct.field(pytree_node=False)

    @property
    def per_token(self) -> tuple[jax.Array, ...]:
        return self.ids, self.values, self.rest, self.teacher

    def laid_out(self) -> "CachedTargets":
        return self

    @property
    def is_mixture(self) -> bool:
        return self.labels.kind == "draws" and self.kd.is_cross_entropy

    def of_block(self, rows, labels, vocab_size: int, columns: int) -> Mixture | Known:
        """What is known of a block in as many columns as the student's logits, see `kd.SoftTargets`."""
        ids, values, rest, teacher = rows
        ids, rest, teacher = ids.astype(jnp.int32), rest.astype(jnp.float32), teacher.astype(jnp.float32)
        if self.labels.kind == "best":
            return Known(spread(ids, values, columns, NEGATIVE), rest, teacher)
        counts = values.astype(jnp.float32)
        drawn = spread(jnp.where(counts > 0, ids, columns), counts, columns, 0.0)
        return Mixture(drawn, jnp.full(rest.shape, 1 / self.labels.number), -rest, teacher)

    def divergence(self, logits, block: Mixture | Known) -> jax.Array:
        """How far the student is from the teacher, per token [...]; of draws in the mean over many."""
        log_s, scale = self.kd.student(logits)
        if self.labels.kind == "draws":
            return scale * (block.negative_entropy - block.scale * jnp.sum(block.weights * log_s, -1))
        if self.kd.divergence == "hard":
            return jax.nn.logsumexp(logits, axis=-1) - pick(logits, jnp.argmax(block.logits, axis=-1))
        return scale * truncated(self.kd, log_s, block.logits, block.logits > NEGATIVE, block.rest)
