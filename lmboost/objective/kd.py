"""Distillation: soft labels of a teacher, and how far the student is from them, token by token."""

import dataclasses

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.errors import UserError, one_of
from lmboost.models.vocabulary import NEGATIVE, pick


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
