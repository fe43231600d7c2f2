"""Distillation from a teacher of another tokenizer: likelihoods of chunks of text, not distributions over tokens.

A chunk is the text between two places at which tokens of both end. Each side has a log-likelihood of it, the sum over
its own tokens, and the term is how far the student's is from the teacher's, both taken as the probability that this
text comes rather than any other: ALM (arXiv 2503.20083), with the Kullback-Leibler divergence. The paper also leaves
out chunks at whose ends the tokenizers are biased in unequal ways; here every place at which both have an end is one.

Only losses on labels are asked for, in blocks of tokens. As a chunk may lie in several blocks, the student's are
computed once before (`label_losses`); what a token's loss changes in its chunk's divergence then goes into `blend`.

Shape suffixes: B rows, T tokens of the student, U tokens of the teacher, V vocabulary rows.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models.vocabulary import Head, over_blocks, pick
from lmboost.objective.kd import Distillation

# In nats: a chunk that is more likely than this counts as this likely, as float32 does not tell them from certain ones.
_LEAST = 1e-6


def check(kd: Distillation, scatter: bool, field: str = "objective.kd") -> None:
    """Raises a UserError where kd asks for what likelihoods of chunks do not have."""
    for name, value, needed in (
        (f"{field}.divergence", kd.divergence, "forward"), (f"{field}.top_k", kd.top_k, 0),
        (f"{field}.top_p", kd.top_p, 1), (f"{field}.gate", kd.gate, "none"), ("objective.scatter_head", scatter, False),
    ):  # fmt: skip
        if value != needed:
            raise UserError(
                f"{name}={value!r}: the teacher's tokenizer is another one than the data's, so kd compares likelihoods "
                f"of chunks of text, for which it must be {needed!r}."
            )
    if kd.temperature != 1 and kd.temperature_on != "both":
        raise UserError(
            f"{field}.temperature={kd.temperature} with {field}.temperature_on={kd.temperature_on!r}: the teacher's "
            "tokenizer is another one than the data's, and likelihoods of chunks of text have one temperature on both "
            "sides: set it to 'both'."
        )


def label_losses(h_BxTxD, head: Head, targets, block_tokens: int) -> jax.Array:
    """-log p(target), float32 [B, T], without gradient."""

    def one_block(_, logits, h, labels):
        return None, jax.nn.logsumexp(logits, axis=-1) - pick(logits, labels)

    h_BxTxD, kernel = jax.lax.stop_gradient((h_BxTxD, head.kernel_DxV))
    head = head._replace(kernel_DxV=kernel).laid_out(h_BxTxD.dtype)
    return over_blocks(one_block, head, h_BxTxD, targets, block_tokens)[1]


class Chunks(NamedTuple):
    """Of the chunk that each of the student's targets lies in, [B, T]; 0 where that is none.

    student, teacher: float32; the losses of either side, in nats, added up over its own tokens.
    tokens: float32; how many of the student's there are.
    """

    student: jax.Array
    teacher: jax.Array
    tokens: jax.Array

    @classmethod
    def of(cls, student_BxT, chunks_BxT, teacher_BxU, own_chunks_BxU) -> "Chunks":
        """From the losses of both on their targets, and the numbers of these targets' chunks, 0 for none."""

        def of_row(student_T, chunks_T, teacher_U, own_chunks_U):
            add = lambda x, chunks: jax.ops.segment_sum(x, chunks, chunks_T.size + 1).at[0].set(0.0)[chunks_T]  # noqa: E731
            return add(student_T, chunks_T), add(teacher_U, own_chunks_U), add(jnp.ones_like(student_T), chunks_T)

        axes = ("batch", "length")
        return cls(
            *sharding.per_device(jax.vmap(of_row), (axes,) * 4, axes)(
                student_BxT, chunks_BxT, teacher_BxU, own_chunks_BxU
            )
        )

    def per_token(self, sums_BxT) -> jax.Array:
        """A chunk's number in equal parts at its tokens, so that a sum over tokens has it once."""
        return sums_BxT / jnp.maximum(self.tokens, 1.0)


def divergence(student, teacher, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(how far the student is, in nats; its derivative by the student's loss) from the losses on a chunk, [...] each.

    With p = exp(-loss / temperature) of either side it is temperature * KL((p_teacher, 1 - p_teacher) || (p_student,
    1 - p_student)); the factor is not the paper's, and keeps the size of the term: for high temperatures it comes to
    student - teacher + teacher * log(teacher / student), which for a teacher that is sure is the student's loss.
    """
    log_s, log_t = (-jnp.maximum(loss, _LEAST) / temperature for loss in (student, teacher))
    others_s, others_t = -jnp.expm1(log_s), -jnp.expm1(log_t)
    kl = jnp.exp(log_t) * (log_t - log_s) + others_t * (jnp.log(others_t) - jnp.log(others_s))
    return temperature * kl, jnp.exp(log_t) - others_t * jnp.exp(log_s) / others_s


class Block(NamedTuple):
    """A block of `ChunkTargets`, [...] each."""

    labels: jax.Array
    value: jax.Array
    slope: jax.Array
    there: jax.Array
    teacher: jax.Array


class ChunkTargets(flax.struct.PyTreeNode):
    """As `kd.SoftTargets`, from the likelihoods of chunks. A target in no chunk is compared with its label.

    Attributes:
      value, slope: [B, T]; each token's part of its chunk's divergence, and how that changes with the token's loss.
      there: bool [B, T]; whether it is in a chunk.
      teacher: [B, T]; each token's part of the teacher's loss on its chunk.
    """

    value: jax.Array
    slope: jax.Array
    there: jax.Array
    teacher: jax.Array
    kd: Distillation = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, chunks: Chunks, kd: Distillation) -> "ChunkTargets":
        value, slope = divergence(chunks.student, chunks.teacher, kd.temperature)
        return cls(chunks.per_token(value), slope, chunks.tokens > 0, chunks.per_token(chunks.teacher), kd)

    @property
    def per_token(self) -> tuple[jax.Array, ...]:
        return self.value, self.slope, self.there, self.teacher

    @property
    def is_mixture(self) -> bool:
        return False

    def laid_out(self) -> "ChunkTargets":
        return self

    def of_block(self, rows, labels, vocab_size: int, columns: int) -> Block:
        """What is known of a block, see `kd.SoftTargets`."""
        return Block(labels, *rows)

    def divergence(self, logits, block: Block) -> jax.Array:
        """Per token [...], from float32 logits [..., V] of the student: its value, and the right gradient."""
        loss = jax.nn.logsumexp(logits, axis=-1) - pick(logits, block.labels)
        change = block.slope * (loss - jax.lax.stop_gradient(loss))
        return jnp.where(block.there, block.value + change, loss)
