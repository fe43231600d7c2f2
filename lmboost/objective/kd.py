"""Distillation: soft labels of a teacher, how far the student is from them, and until when that counts.

Shape suffixes: B rows, T tokens, E the teacher's width, V vocabulary rows.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lmboost import sharding
from lmboost.errors import UserError, fraction, number, one_of
from lmboost.models.vocabulary import NEGATIVE, Head, pick, project
from lmboost.objective.auto import AUTO, latest_stop
from lmboost.schedules import Weight

HANDOVERS = ("hard", "linear", "linear_ratio", "constant")
GATES = ("none", "hard", "soft")


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
    gate: str = "none"

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def is_cross_entropy(self) -> bool:
        """Whether the student's own distribution is compared, as on the labels."""
        return self.temperature_on == "teacher" or self.temperature == 1

    @property
    def is_mixture(self) -> bool:
        """Whether the term's gradient asks for nothing of a teacher in memory but its distribution."""
        return self.is_cross_entropy and not self.truncated and self.divergence == "forward"

    def student(self, logits) -> tuple[jax.Array, float]:
        """(log-probabilities of the student that are compared, what the term is multiplied by)."""
        if self.temperature_on == "both":
            return jax.nn.log_softmax(logits / self.temperature), self.temperature**2
        return jax.nn.log_softmax(logits), 1.0

    def gate_of(self, ce, teacher_ce) -> jax.Array | None:
        """How much of a token's kd counts, 0 to 1; ce takes the place of the rest. None where all of it does.

        hard: where the teacher's loss on the label is below the student's; soft: twice the excess over a half of the
        teacher's share in the sum of the two probabilities of the label.
        """
        lead = jax.lax.stop_gradient(ce) - teacher_ce
        gates = {"none": lambda: None, "hard": lambda: (lead > 0).astype(jnp.float32)}
        gates["soft"] = lambda: jnp.maximum(2 * jax.nn.sigmoid(lead) - 1, 0.0)
        return gates[self.gate]()

    def validate(self, field: str = "objective.kd") -> "Distillation":
        one_of(f"{field}.temperature_on", self.temperature_on, ("teacher", "both"))
        one_of(f"{field}.divergence", self.divergence, ("forward", "reverse", "hard"))
        one_of(f"{field}.tail", self.tail, ("bucket", "renormalise"))
        one_of(f"{field}.gate", self.gate, GATES)
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


def from_config(c: ConfigDict) -> Distillation:
    """The term of the `objective.kd` subtree; raises a UserError where it is none."""
    return Distillation(**{field.name: c[field.name] for field in dataclasses.fields(Distillation)}).validate()


def schedule(c: ConfigDict, steps: int) -> tuple[Weight, int]:
    """The weight w of the soft-label term as a function of the step, and the first step without it at the latest.

    With x the share of the hand-over that is still to come, 1 up to `decay_from` and 0 at `stop`, or what is given
    as `share` with stop=auto:
    hard w until `stop`; linear w * x; linear_ratio keeps w' / (1 - w') = x * w / (1 - w), that is
    w' = x w / (1 - w + x w); constant w to the end of the run, whatever `stop` says. Source: SALT (arXiv 2410.18779).

    Args:
      c: the `objective.kd` subtree.

    Raises a UserError where these are not defined; linear_ratio asks for w < 1, as the ratio of 1 is infinite.
    """
    handover = one_of("objective.kd.handover", c.handover, HANDOVERS)
    w = number("objective.kd.weight", c.weight)
    if c.ce_weight == -1 and w > 1:
        raise UserError(
            f"objective.kd.weight={w} leaves ce the weight 1 - {w}: expected at most 1, "
            "or give objective.kd.ce_weight a value of its own."
        )
    if handover == "linear_ratio" and w >= 1:
        raise UserError(
            f"objective.kd.weight={w} with objective.kd.handover='linear_ratio': the ratio w / (1 - w) needs a weight "
            "below 1. Take, say, 0.99, or objective.kd.handover='linear'."
        )
    stop, ends_itself = latest_stop("objective.kd.stop", c.stop, steps), c.stop == AUTO
    start = round(fraction("objective.kd.decay_from", c.decay_from) * steps)
    falls = handover in ("linear", "linear_ratio")
    if ends_itself and w and (handover == "constant" or start):
        raise UserError(
            f"objective.kd.stop=auto with objective.kd.handover={handover!r} and objective.kd.decay_from="
            f"{c.decay_from}: help that ends by itself begins at the first step and follows the teacher's lead. Take "
            "the hand-over hard, linear or linear_ratio, and decay_from=0."
        )
    if w and falls and not ends_itself and c.decay_from >= c.stop:
        raise UserError(
            f"objective.kd.decay_from={c.decay_from} is not before objective.kd.stop={c.stop}: "
            "the hand-over begins at the first and ends at the second, both fractions of the run."
        )
    stop = steps if handover == "constant" else stop

    def weight(step, share=1.0):
        left = jnp.minimum(jnp.maximum(stop - step, 0) / max(stop - start, 1), 1.0)
        left = jnp.asarray(share, jnp.float32) if ends_itself else left
        if not falls:
            left = jnp.where(left > 0, 1.0, 0.0)
        if handover == "linear_ratio":
            return jnp.where(left > 0, w * left / (1 - w + w * left), 0.0)
        return w * left

    return weight, stop if w else 0


class Mixture(flax.struct.PyTreeNode):
    """A distribution over the vocabulary at each token of a block, `scale * weights`, that the student is to have.

    weights: [..., V], of which the sum is 1 / scale; scale: [...].
    negative_entropy: sum of p * log p [...].
    teacher: its cross-entropy on the labels [...].
    """

    weights: jax.Array
    scale: jax.Array
    negative_entropy: jax.Array
    teacher: jax.Array


class Known(flax.struct.PyTreeNode):
    """What a divergence of another kind asks for of a block: the teacher's logits [..., V], or what is known of them.

    rest: for what is known the log-probability of all other tokens [...].
    teacher: its cross-entropy on the labels [...].
    """

    logits: jax.Array
    rest: jax.Array | None
    teacher: jax.Array


class SoftTargets(flax.struct.PyTreeNode):
    """What the student's tokens are compared with, a block of them at a time: the teacher's last hidden states.

    `blend` asks them for `per_token`, arrays [B, T, ...] that are cut into the blocks; `of_block`, what a block's part
    of them says of the vocabulary: a `Mixture` where `is_mixture`, or else what `divergence` of the student's logits
    asks for. `cached.CachedTargets` are the same from disk.
    """

    h_BxTxE: jax.Array
    kernel_ExV: jax.Array  # of the teacher's head
    vocab_size: int = flax.struct.field(pytree_node=False)  # of the same
    kd: Distillation = flax.struct.field(pytree_node=False)
    softcap: float = flax.struct.field(pytree_node=False, default=0.0)  # of the head

    @classmethod
    def of(cls, h_BxTxE, head: Head, kd: Distillation) -> "SoftTargets":
        """From the teacher's last hidden states and its head."""
        return cls(h_BxTxE, head.kernel_DxV, head.vocab_size, kd, head.softcap)

    @property
    def head(self) -> Head:
        """The teacher's."""
        return Head(self.kernel_ExV, self.vocab_size, self.softcap)

    @property
    def per_token(self) -> jax.Array:
        return self.h_BxTxE

    @property
    def is_mixture(self) -> bool:
        return self.kd.is_mixture

    def laid_out(self) -> "SoftTargets":
        """The same with its head where every block finds it."""
        return self.replace(kernel_ExV=self.head.laid_out(self.h_BxTxE.dtype).kernel_DxV)

    def of_block(self, h, labels, vocab_size: int, columns: int) -> Mixture | Known:
        """What the teacher says over the vocabulary that both have, in as many columns as the student's logits."""
        logits = project(h, self.head, vocab_size, columns)
        logits = sharding.constrain(logits, ("batch", None, None, "vocab"))
        if not self.is_mixture:
            return Known(logits, None, jax.nn.logsumexp(logits, axis=-1) - pick(logits, labels))
        shifted = logits - logits.max(-1, keepdims=True)
        tempered = shifted / self.kd.temperature
        exp = jnp.exp(tempered)
        total = exp.sum(-1)
        log_total = jnp.log(total)
        negative_entropy = jnp.sum(exp * tempered, -1) / total - log_total
        if self.kd.temperature != 1:
            log_total = jnp.log(jnp.exp(shifted).sum(-1))
        return Mixture(exp.astype(h.dtype), 1 / total, negative_entropy, log_total - pick(shifted, labels))

    def divergence(self, logits, block: Known) -> jax.Array:
        """How far the student is from the teacher, per token [...], from float32 logits [..., V] of the student.

        Zero where they agree: KL rather than the paper's cross-entropy, which is larger by the teacher's entropy and
        has the same gradient. Columns that are NEGATIVE in both are padding.
        """
        kd = self.kd
        if kd.divergence == "hard":
            return jax.nn.logsumexp(logits, axis=-1) - pick(logits, jnp.argmax(block.logits, axis=-1))
        log_s, scale = kd.student(logits)
        log_t = jax.nn.log_softmax(block.logits / kd.temperature)
        if not kd.truncated:
            return scale * _kl(log_t, log_s, kd.divergence)
        kept = _best_tokens(block.logits, log_t, kd)
        tail_t = jax.nn.logsumexp(jnp.where(kept, NEGATIVE, log_t), -1)
        return scale * truncated(kd, log_s, jnp.where(kept, log_t, NEGATIVE), kept, tail_t)


def truncated(kd: Distillation, log_s, log_t, kept, tail_t) -> jax.Array:
    """The divergence, per token [...], from a teacher of whom only some tokens are known.

    Args:
      log_s: log-probabilities of the student [..., V].
      log_t, kept: those of the teacher's tokens that are known, NEGATIVE elsewhere; and which these are.
      tail_t: log of the probability of all others [...].
    """
    if kd.tail == "renormalise":
        log_t = jax.nn.log_softmax(log_t)
        return jnp.where(kept, jnp.exp(log_t) * (log_t - log_s), 0.0).sum(-1)
    # One more outcome, "any other token", holds the rest of the probability on both sides.
    tail_s = jax.nn.logsumexp(jnp.where(kept, NEGATIVE, log_s), -1, keepdims=True)
    log_s = jnp.where(kept, log_s, NEGATIVE)
    return _kl(log_t, log_s, kd.divergence) + _kl(tail_t[..., None], tail_s, kd.divergence)


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
