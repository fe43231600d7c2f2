"""Alignment: a late layer of the teacher guides an early layer of the student.

Source: LET (arXiv 2602.05393). The term is the negative cosine between the two hidden states of a token,
after one of them has been brought to the other's width.

Its gradient is added to the student's at the aligned state itself, by an identity that changes the
cotangent on its way down (`guide`). There the gradient of the rest of the loss is known, so the weight can
be a share of its norm: the plain weight's meaning changes with depth, width and training time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lmboost import sharding
from lmboost.errors import UserError, number, one_of
from lmboost.objective.auto import AUTO, latest_stop
from lmboost.schedules import Weight


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What is aligned with what; the weight is a function of the step and comes separately."""

    pairs: tuple[tuple[int, int], ...]  # (student state, teacher state), counted in layers passed
    scale: str = "ratio"  # the weight is a share of the gradient's norm, per row; or "plain"
    map: str = "teacher_to_student"
    centre: bool = False
    final_norm: bool = True

    def validate(self, field: str = "objective.align") -> "Alignment":
        one_of(f"{field}.scale", self.scale, ("ratio", "plain"))
        one_of(f"{field}.map", self.map, ("teacher_to_student", "student_to_teacher", "projection"))
        students = [s for s, _ in self.pairs]
        if len(set(students)) != len(students):
            raise UserError(f"{field}.pairs: a student layer is named twice in {self.pairs}; give each one teacher.")
        return self


def from_config(c: ConfigDict, student_layers: int, teacher_layers: int) -> Alignment:
    """The alignment of the `objective.align` subtree; raises a UserError where it is none of these two models."""
    pairs = parse_pairs(c.pairs, student_layers, teacher_layers)
    return Alignment(pairs, c.scale, c.map, c.centre, c.final_norm).validate()


def schedule(c: ConfigDict, steps: int) -> tuple[Weight, int]:
    """weight * max(0, (stop - step) / stop) as a function of the step, and the first step without it at the latest.

    Args:
      c: the `objective.align` subtree; its `stop` is a fraction of the run, or auto: then weight * share.

    Source: LET (arXiv 2602.05393).
    """
    weight = number("objective.align.weight", c.weight)
    stop, ends_itself = latest_stop("objective.align.stop", c.stop, steps), c.stop == AUTO

    def weigh(step, share=1.0):
        return weight * (share if ends_itself else jnp.maximum(stop - step, 0) / max(stop, 1))

    return weigh, stop if weight else 0


def parse_pairs(text: str, student_layers: int, teacher_layers: int, field: str = "objective.align.pairs"):
    """ "3:last,half:6" -> ((3, 12), (6, 6)): (student state, teacher state) pairs, counted in layers passed."""

    def state(word: str, layers: int, side: str) -> int:
        named = {"half": (layers + 1) // 2, "last": layers}
        if word not in named and not word.isdigit():
            raise UserError(f"{field}={text!r}: {word!r} is no layer; give a number, 'half' or 'last'.")
        number = named[word] if word in named else int(word)
        if not 1 <= number <= layers:
            raise UserError(f"{field}={text!r}: the {side} has no layer {number}; it has layers 1 to {layers}.")
        return number

    pairs = []
    for pair in text.replace(" ", "").split(","):
        if pair.count(":") != 1:
            raise UserError(f"{field}={text!r}: expected student:teacher pairs with commas between, as in '3:last'.")
        student, teacher = pair.split(":")
        pairs.append((state(student, student_layers, "student"), state(teacher, teacher_layers, "teacher")))
    return tuple(pairs)


def init_projections(alignment: Alignment, student_width: int, teacher_width: int, rng) -> dict[str, jax.Array]:
    """Learned maps student -> teacher, one [D, D'] per pair; none unless the config asks for them."""
    if alignment.map != "projection":
        return {}
    shape, scale = (student_width, teacher_width), student_width**-0.5
    keys = jax.random.split(rng, len(alignment.pairs))
    return {str(s): jax.random.normal(k, shape) * scale for k, (s, _) in zip(keys, alignment.pairs, strict=True)}


def negative_cosine(h_BxTxD, teacher_BxTxE, weights, alignment: Alignment, projection=None) -> jax.Array:
    """Sum over tokens of weights * -cos(student, teacher), float32.

    Widths are matched by linear interpolation over features, without parameters, or by `projection` [D, E].
    Centring takes off the row's own mean state, so that a row's term does not depend on its batch.
    """
    h, t = h_BxTxD.astype(jnp.float32), jax.lax.stop_gradient(teacher_BxTxE.astype(jnp.float32))
    if alignment.map == "projection":
        h = h @ projection
    elif alignment.map == "student_to_teacher":
        h = jax.image.resize(h, (*h.shape[:2], t.shape[2]), "linear", antialias=False)
    else:
        t = jax.image.resize(t, (*t.shape[:2], h.shape[2]), "linear", antialias=False)
    if alignment.centre:
        share = weights / jnp.maximum(weights.sum(1, keepdims=True), 1.0)
        h, t = (x - jnp.einsum("bt,btd->bd", share, x)[:, None] for x in (h, t))
    cosine = jnp.sum(h * t, -1) * jax.lax.rsqrt(jnp.sum(h * h, -1) * jnp.sum(t * t, -1) + 1e-12)
    return -jnp.sum(weights * cosine)


def at(state_BxUxE, index_BxT) -> jax.Array:
    """A teacher's states of its own tokens at the student's, [B, T, E]; index is int32, where it is -1 any state."""
    axes = ("batch", "length", None)
    return sharding.constrain(jax.vmap(lambda state, index: state[jnp.maximum(index, 0)])(state_BxUxE, index_BxT), axes)


def tap(teacher_BxTxE, weights, alignment: Alignment, weight, probe, projection=None):
    """A function for `Transformer`'s taps that guides the student's state towards the teacher's.

    `probe`, float32 [2], is zero and is used for nothing but its gradient, which comes out as
    (squared norm of the alignment's gradient as added, squared norm of the other gradient).
    """

    def fn(h_BxTxD):
        loss = functools.partial(
            negative_cosine, teacher_BxTxE=teacher_BxTxE, weights=weights, alignment=alignment, projection=projection
        )
        gradient = jax.grad(loss)(jax.lax.stop_gradient(h_BxTxD))
        return guide(alignment.scale, h_BxTxD, jax.lax.stop_gradient(gradient), jnp.asarray(weight, jnp.float32), probe)

    return fn


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def guide(scale: str, h_BxTxD, gradient_BxTxD, weight, probe):
    """The identity on h_BxTxD. In the backward pass `gradient_BxTxD` is added to its cotangent.

    With scale "plain" it is multiplied by `weight`; with "ratio" so that in each row its norm is `weight`
    times the cotangent's.
    """
    return h_BxTxD


def _guide_forward(scale, h_BxTxD, gradient_BxTxD, weight, probe):
    return h_BxTxD, (gradient_BxTxD, weight)


def _guide_backward(scale, residuals, cotangent):
    gradient, weight = residuals
    g, ct = gradient.astype(jnp.float32), cotangent.astype(jnp.float32)
    g_norm, ct_norm = (jnp.sum(x * x, (1, 2), keepdims=True) for x in (g, ct))
    if scale == "ratio":
        weight = weight * jnp.sqrt(ct_norm / jnp.maximum(g_norm, 1e-30))
    added = weight * g
    probe = jnp.stack([jnp.sum(added * added), jnp.sum(ct_norm)])
    return (ct + added).astype(cotangent.dtype), None, None, probe


guide.defvjp(_guide_forward, _guide_backward)
