"""The objective written down densely, as an oracle: whole [B, T, V] arrays, probabilities, sorting, autodiff."""

import jax
import jax.numpy as jnp
import numpy as np

from lmboost.models import transformer


def probabilities(logits, temperature=1.0):
    p = jnp.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return p / p.sum(-1, keepdims=True)


def kept_tokens(logits, p, kd):
    """bool [..., V] by rank."""
    rank = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1)
    kept = rank < (kd.top_k or logits.shape[-1])
    if kd.top_p < 1:
        sorted_p = jnp.take_along_axis(p, jnp.argsort(-logits, axis=-1), axis=-1)
        needed = 1 + jnp.sum(jnp.cumsum(sorted_p, -1) < kd.top_p, axis=-1, keepdims=True)
        kept &= rank < needed
    return kept


def kd_term(student, teacher, kd):
    """[..., V] logits -> [...]."""
    if kd.divergence == "hard":
        label = jnp.argmax(teacher, -1)
        return -jnp.log(jnp.take_along_axis(probabilities(student), label[..., None], -1))[..., 0]
    both = kd.temperature_on == "both"
    q = probabilities(student, kd.temperature if both else 1.0)
    p = probabilities(teacher, kd.temperature)
    if kd.top_k or kd.top_p < 1:
        kept = kept_tokens(teacher, p, kd)
        if kd.tail == "renormalise":
            p = jnp.where(kept, p, 0)
            p = p / p.sum(-1, keepdims=True)
        else:  # one more outcome
            p, q = (
                jnp.concatenate([jnp.where(kept, x, 0), jnp.where(kept, 0, x).sum(-1, keepdims=True)], -1)
                for x in (p, q)
            )
    a, b = (p, q) if kd.divergence == "forward" else (q, p)
    inside = a > 0
    ratio = jnp.where(inside, a, 1) / jnp.where(inside, jnp.where(b > 0, b, 1), 1)
    return jnp.sum(jnp.where(inside, a * jnp.log(ratio), 0), -1) * (kd.temperature**2 if both else 1)


def negative_cosine(h, t, centre, weights, kind):
    def resized(x, width):
        return jax.image.resize(x, (*x.shape[:-1], width), "linear", antialias=False)

    h, t = (h, resized(t, h.shape[-1])) if kind == "teacher_to_student" else (resized(h, t.shape[-1]), t)
    if centre:
        n = jnp.maximum(weights.sum(1), 1)[:, None, None]
        h, t = (x - (x * weights[..., None]).sum(1, keepdims=True) / n for x in (h, t))
    return -(h * t).sum(-1) / (jnp.linalg.norm(h, axis=-1) * jnp.linalg.norm(t, axis=-1))


def forward(config, params, batch, capture=()):
    """(logits over the real vocabulary, last hidden state, captured)."""
    h, captured = transformer.apply(
        config, params, batch["tokens"], batch["segment_ids"], batch["positions"], capture=capture
    )
    logits = (h @ transformer.head(params))[..., : config.vocab_size]
    cap = config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits, h, captured


def loss(params, teacher_params, batch, student, teacher, kd, weight, ce_weight, z_loss, align=None, lam=0.0):
    """Mean over predicted tokens of ce_weight * ce + weight * kd + z_loss * log(Z)^2 (+ lam * alignment)."""
    capture = tuple(s for s, _ in align.pairs) if align else ()
    logits, _, captured = forward(student, params, batch, capture)
    w = batch["weights"]
    log_z = jnp.log(jnp.exp(logits).sum(-1))
    ce = log_z - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    total = ce_weight * ce + z_loss * log_z**2
    if weight:
        teacher_logits = jax.lax.stop_gradient(forward(teacher, teacher_params, batch)[0])
        total += weight * kd_term(logits, teacher_logits, kd)
    if align:
        _, last, seen = forward(teacher, teacher_params, batch, tuple(t for _, t in align.pairs))
        for s, t in align.pairs:
            target = last if align.final_norm and t == teacher.num_layers else seen[t]
            total += lam * negative_cosine(captured[s], target, align.centre, w, align.map)
    return (w * total).sum() / w.sum()


def score(params, batch, config, selection):
    """S_k of each row with numpy's median, float64."""
    logits = np.asarray(forward(config, params, batch)[0], np.float64)
    scores = []
    for row, targets, weights in zip(logits, np.asarray(batch["targets"]), np.asarray(batch["weights"]), strict=True):
        losses = []
        for z, target, w in zip(row, targets, weights, strict=True):
            learnable = target in np.argsort(-z)[: selection.k]
            if w > 0 and (learnable or selection.others == "zero"):
                losses.append(np.log(np.exp(z - z[target]).sum()) if learnable else 0.0)
        scores.append(np.median(losses) if losses else -np.inf)
    return np.array(scores)
