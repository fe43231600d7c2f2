"""Soft labels from disk against those of a teacher in memory, on one and on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost import sharding
from lmboost.data.scored import Parts, SoftLabels
from lmboost.errors import UserError
from lmboost.models.vocabulary import Head, spread
from lmboost.objective import ask, cached
from lmboost.objective.blend import Coefficients, blend
from lmboost.objective.cached import CachedTargets
from lmboost.objective.kd import Distillation, SoftTargets
from tests.objective.test_blend import TOKENS, VOCAB, inputs

BEST = SoftLabels("best", 5, 1.0, VOCAB, 5)
DRAWS = SoftLabels("draws", 50, 1.0, VOCAB, 50)


def labels_of(labels, seed=0):
    """What is kept of the teacher of `inputs`, as a batch has it."""
    x, parts = inputs(), Parts(TOKENS, labels, loss=True)
    uniform = jax.random.uniform(jax.random.key(seed), x["targets"].shape)
    batch = {"targets": x["targets"], "weights": x["weights"]}
    head = Head(jnp.asarray(x["teacher_kernel"]), VOCAB)
    return ask.labels_of(parts, jnp.asarray(x["teacher_h"]), head, batch, uniform, 32)


def targets_of(labels, found, kd):
    found = found | {"teacher_loss": found["teacher_loss"].astype(jnp.float32)}
    names = ("soft_ids", "soft_values", "soft_rest", "teacher_loss")
    return CachedTargets(*(found[name] for name in names), labels, kd)


def loss_of(h, kernel, soft, block_tokens=32):
    x = inputs()
    sums = blend(
        h, Head(kernel, VOCAB), x["targets"], x["weights"], Coefficients(0.4, 0.6), soft, block_tokens=block_tokens
    )
    return sums.loss, sums


def gradients(soft, block_tokens=32):
    """((loss, sums), gradients by hidden states and head)."""
    x = inputs()
    fn = jax.value_and_grad(functools.partial(loss_of, soft=soft, block_tokens=block_tokens), (0, 1), has_aux=True)
    return fn(x["h"], x["kernel"])


def online(kd):
    x = inputs()
    return SoftTargets(x["teacher_h"], x["teacher_kernel"], VOCAB, kd)


KDS = {
    "bucket": Distillation(top_k=5),
    "renormalise": Distillation(top_k=5, tail="renormalise"),
    "reverse": Distillation(top_k=5, divergence="reverse"),
    "hard": Distillation(top_k=5, divergence="hard"),
    "temperature": Distillation(top_k=5, temperature=0.5),
    "both": Distillation(top_k=5, temperature=2.0, temperature_on="both"),
    "all": Distillation(top_k=VOCAB),
}


@pytest.mark.parametrize("name", KDS)
def test_best_tokens_with_the_tail_are_those_of_the_teacher_in_memory(name):
    kd = KDS[name]
    labels = SoftLabels("best", kd.top_k, kd.temperature, VOCAB, kd.top_k)
    (value, sums), found = gradients(targets_of(labels, labels_of(labels), kd))
    (expected, wanted), gradient = gradients(online(kd))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert float(sums.kd) == pytest.approx(float(wanted.kd), rel=2e-6)
    assert float(sums.teacher) == pytest.approx(float(wanted.teacher), rel=1e-3)  # of two bytes
    for a, b in zip(found, gradient, strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("labels", [BEST, DRAWS], ids=lambda labels: labels.kind)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 1, 4), (2, 2, 2)])
def test_under_a_vocabulary_that_is_spread_loss_and_gradient_are_the_same(labels, sizes):
    kd = Distillation(top_k=5 if labels.kind == "best" else 0)
    x, found = inputs(), labels_of(labels)
    (expected, _), gradient = gradients(targets_of(labels, found, kd))
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        rows = sharding.put_batch({"h": x["h"], **{name: np.asarray(value) for name, value in found.items()}}, mesh)
        kernel = jax.device_put(x["kernel"], sharding.tree_sharding({"head": x["kernel"]}, mesh)["head"])

        def loss(h, kernel, rows):
            return loss_of(h, kernel, targets_of(labels, rows, kd), block_tokens=8)[0]

        value, found_gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))(rows.pop("h"), kernel, rows)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(found_gradient, gradient, strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_the_mean_over_many_draws_is_the_teacher_in_memory():
    """Loss and gradient, within four standard errors of the mean, of 100 times all draws."""
    kd = Distillation()

    @jax.jit
    def drawn(seed):
        (_, sums), found = gradients(targets_of(DRAWS, labels_of(DRAWS, seed), kd))
        return sums.kd, found[0]

    terms, found = jax.lax.map(drawn, jnp.arange(100))
    (_, sums), (gradient, _) = gradients(online(kd))
    for several, expected in ((terms, sums.kd), (found, gradient)):
        several = np.asarray(several, np.float64)
        error = several.std(0, ddof=1) / np.sqrt(len(several))
        away = (several.mean(0) - np.asarray(expected)) / np.maximum(error, 1e-6)
        assert np.abs(away).mean() < 1 and np.sqrt(np.mean(away**2)) < 1.3 and np.abs(away).max() < 6
        assert np.linalg.norm(several[0] - expected) > 3 * np.linalg.norm(several.mean(0) - expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 255), st.floats(0.01, 20.0))
def test_draws_are_as_many_as_asked_for_and_within_one_of_their_share(seed, draws, spread_):
    rng = np.random.default_rng(seed)
    p = jax.nn.softmax(jnp.asarray(rng.normal(size=(4, 97)) * spread_, jnp.float32))
    counts = np.asarray(ask.draw_counts(p, jnp.asarray(rng.random(4), jnp.float32), draws))
    assert (counts >= 0).all() and (counts.sum(-1) == draws).all()
    assert (np.abs(counts - draws * np.asarray(p)) < 1 + 1e-3).all()


def test_draws_of_a_certain_token_are_all_of_it():
    p = jnp.zeros((1, 9)).at[0, 4].set(1.0)
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert ask.draw_counts(p, jnp.full(1, uniform, jnp.float32), 50)[0].tolist() == [0, 0, 0, 0, 50, 0, 0, 0, 0]


def test_where_nothing_is_predicted_nothing_is_kept():
    found, nothing = labels_of(DRAWS), inputs()["weights"] == 0
    assert nothing.any() and not found["soft_values"][nothing].any() and not found["teacher_loss"][nothing].any()
    assert (found["soft_values"][~nothing].sum(-1) == 50).all()


def test_spread():
    ids, values = jnp.array([[[0, 2, 9], [1, 9, 9]]]), jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    assert spread(ids, values, 4, -1.0).tolist() == [[[1, -1, 2, -1], [-1, 4, -1, -1]]]


@pytest.mark.parametrize(
    "labels, kd, vocab, message",
    [
        (DRAWS, Distillation(top_k=5), VOCAB, r"made with 0 as objective.kd.top_k, but now it is 5"),
        (BEST, Distillation(), VOCAB, r"made with 5 as objective.kd.top_k, but now it is 0"),
        (BEST, Distillation(top_k=4), VOCAB, r"made with 5 as objective.kd.top_k"),
        (BEST, Distillation(top_k=5, temperature=2.0), VOCAB, r"made with 1.0 as objective.kd.temperature"),
        (BEST, Distillation(top_k=5), 64, r"the vocabulary of student and teacher, but now it is 64"),
        (DRAWS, Distillation(divergence="reverse"), VOCAB, r"divergence='reverse' can be computed"),
        (BEST, Distillation(top_k=5, top_p=0.9), VOCAB, r"no top-p labels"),
    ],
)
def test_labels_that_are_not_what_kd_asks_for_are_refused(labels, kd, vocab, message):
    with pytest.raises(UserError, match=message):
        cached.check(labels, kd, vocab, "teacher.targets='x'")
