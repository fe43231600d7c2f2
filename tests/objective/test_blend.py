"""The blocked objective against the dense oracle, for every option, on one and on eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models.vocabulary import Head, num_blocks
from lmboost.objective import scattered
from lmboost.objective.blend import Coefficients, blend
from lmboost.objective.kd import Distillation, SoftTargets
from tests import dense

ROWS, TOKENS, WIDTH, TEACHER_WIDTH, VOCAB, STUDENT_ROWS, TEACHER_ROWS = 16, 12, 16, 24, 61, 64, 72

KDS = {
    "forward": Distillation(),
    "temperature": Distillation(temperature=0.5),
    "both": Distillation(temperature=2.0, temperature_on="both"),
    "reverse": Distillation(divergence="reverse", temperature=0.9, temperature_on="both"),
    "hard": Distillation(divergence="hard"),
    "top_k_bucket": Distillation(top_k=5),
    "top_k_bucket_both": Distillation(top_k=5, temperature=2.0, temperature_on="both"),
    "top_k_bucket_reverse": Distillation(top_k=5, divergence="reverse"),
    "top_k_renormalise": Distillation(top_k=5, tail="renormalise"),
    "top_k_all": Distillation(top_k=61),
    "top_p_bucket": Distillation(top_p=0.7, temperature=0.7),
    "top_p_renormalise": Distillation(top_p=0.7, tail="renormalise"),
    "top_k_and_p": Distillation(top_k=8, top_p=0.8),
    "gate_hard": Distillation(gate="hard"),
    "gate_soft": Distillation(gate="soft", temperature=0.7),
}


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    weights = (rng.random((ROWS, TOKENS)) < 0.8).astype(np.float32)
    weights[3] = 0.0  # a row of padding
    arrays = {
        "h": rng.normal(size=(ROWS, TOKENS, WIDTH)),
        "kernel": rng.normal(size=(WIDTH, STUDENT_ROWS)) * 0.5,
        "teacher_h": rng.normal(size=(ROWS, TOKENS, TEACHER_WIDTH)),
        "teacher_kernel": rng.normal(size=(TEACHER_WIDTH, TEACHER_ROWS)) * 0.5,
    }
    arrays = {k: x.astype(np.float32) for k, x in arrays.items()}
    return arrays | {"targets": rng.integers(0, VOCAB, (ROWS, TOKENS)), "weights": weights}


def dense_loss(h, kernel, coefficients, kd, softcaps=(0, 0)):
    x = inputs()
    cap = lambda logits, c: c * jnp.tanh(logits / c) if c else logits  # noqa: E731
    logits = cap((h @ kernel)[..., :VOCAB], softcaps[0])
    teacher = cap((x["teacher_h"] @ x["teacher_kernel"])[..., :VOCAB], softcaps[1])
    log_z = jnp.log(jnp.exp(logits).sum(-1))
    ce = log_z - jnp.take_along_axis(logits, x["targets"][..., None], -1)[..., 0]
    kd_term = dense.kd_term(logits, teacher, kd) if kd else 0.0
    total = coefficients.ce * ce + coefficients.kd * kd_term
    if kd and kd.gate != "none":
        label = lambda z: jnp.take_along_axis(jax.nn.softmax(z), x["targets"][..., None], -1)[..., 0]  # noqa: E731
        p, q = jax.lax.stop_gradient(label(logits)), label(teacher)
        gate = jnp.where(q > p, 1.0 if kd.gate == "hard" else 2 * q / (p + q) - 1, 0.0)
        total = gate * total + (1 - gate) * ce
    total += coefficients.z * log_z**2
    return (x["weights"] * total).sum()


def blocked_loss(h, kernel, coefficients, kd, block_tokens, scatter=False, softcaps=(0, 0)):
    x = inputs()
    soft = SoftTargets.of(x["teacher_h"], Head(x["teacher_kernel"], VOCAB, softcaps[1]), kd) if kd else None
    head = Head(kernel, VOCAB, softcaps[0])
    sums = blend(
        h, head, x["targets"], x["weights"], coefficients, soft, block_tokens=block_tokens, scatter=scatter
    )  # fmt: skip
    return sums.loss


def compare(kd, coefficients, block_tokens, mesh=None, scatter=False, softcaps=(0, 0)):
    x, terms = inputs(), {"coefficients": coefficients, "kd": kd, "softcaps": softcaps}
    blocked = functools.partial(blocked_loss, block_tokens=block_tokens, scatter=scatter, **terms)
    expected = jax.value_and_grad(functools.partial(dense_loss, **terms), (0, 1))
    value, gradient = expected(x["h"], x["kernel"])
    if mesh is None:
        found, found_gradient = jax.jit(jax.value_and_grad(blocked, (0, 1)))(x["h"], x["kernel"])
    else:
        with jax.set_mesh(mesh):
            h = sharding.put_batch({"h": x["h"]}, mesh)["h"]
            kernel = jax.device_put(x["kernel"], sharding.tree_sharding({"head": x["kernel"]}, mesh)["head"])
            found, found_gradient = jax.jit(jax.value_and_grad(blocked, (0, 1)))(h, kernel)
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(found_gradient, gradient, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("name", KDS)
def test_kd_equals_the_dense_oracle(name):
    compare(KDS[name], Coefficients(0.4, 0.6, 1e-3), block_tokens=32)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 1, 4), (2, 2, 2)])
@pytest.mark.parametrize("name", ["forward", "top_k_bucket", "top_p_renormalise"])
def test_kd_on_eight_devices_equals_the_dense_oracle(name, mesh):
    compare(KDS[name], Coefficients(0.4, 0.6, 1e-3), block_tokens=8, mesh=sharding.make_mesh(*mesh))


@pytest.mark.parametrize("mesh", [None, (8, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", ["alone", "forward", "temperature", "gate_soft"])
def test_in_blocks_of_the_vocabulary_it_equals_the_dense_oracle(name, mesh, monkeypatch):
    """Eight columns and eight tokens of a device at a time."""
    monkeypatch.setattr(scattered, "HEAD_BYTES", 8 * 4 * WIDTH)
    monkeypatch.setattr(scattered, "LOGITS_BYTES", 8 * 8 * 4)
    terms = Coefficients(0.4, 0.6, 1e-3) if name != "alone" else Coefficients(1.0, 0.0, 1e-3)
    compare(KDS.get(name), terms, 0, mesh and sharding.make_mesh(*mesh), scatter=True)


@pytest.mark.parametrize(
    ("name", "softcaps", "scatter"),
    [("forward", (2.0, 3.0), False), ("forward", (2.0, 3.0), True), ("top_k_bucket", (1.5, 0), False)],
)
def test_with_soft_caps_of_logits_it_equals_the_dense_oracle(name, softcaps, scatter):
    """Of the student and of the teacher; padded columns, too, which are far beyond a cap."""
    compare(KDS[name], Coefficients(0.4, 0.6, 1e-3), 0 if scatter else 32, scatter=scatter, softcaps=softcaps)


@pytest.mark.parametrize("block_tokens", [1, 16, 48, 10_000])
def test_cross_entropy_alone_in_blocks_of_any_size(block_tokens):
    compare(None, Coefficients(1.0, 0.0, 0.0), block_tokens)


def test_kd_is_zero_and_flat_where_student_and_teacher_agree():
    x = inputs()
    for kd in KDS.values():
        if (
            kd.tail == "renormalise"
            or "hard" in (kd.divergence, kd.gate)
            or kd.gate == "soft"
            or kd.temperature_on != "both"
            and kd.temperature != 1
        ):
            continue  # these pull the student towards something else than the teacher

        def loss(h, kd=kd):
            head, soft = Head(x["kernel"], VOCAB), SoftTargets(x["h"], x["kernel"], VOCAB, kd)
            return blend(h, head, x["targets"], x["weights"], Coefficients(0.0, 1.0), soft, block_tokens=32).loss

        value, gradient = jax.value_and_grad(loss)(x["h"])
        assert abs(float(value)) < 1e-3 and np.abs(gradient).max() < 1e-5, kd


def test_only_the_loss_carries_a_gradient():
    x = inputs()

    def others(h):
        sums = blend(h, Head(x["kernel"], VOCAB), x["targets"], x["weights"], block_tokens=32)
        return sums.ce + sums.z + sums.count

    assert not np.any(jax.grad(others)(x["h"]))


def test_padded_vocabulary_rows_get_no_probability_and_no_gradient():
    x = inputs()
    loss = functools.partial(blocked_loss, coefficients=Coefficients(0.4, 0.6), kd=Distillation(), block_tokens=32)
    wild = np.concatenate([x["kernel"][:, :VOCAB], np.full((WIDTH, STUDENT_ROWS - VOCAB), 50.0, np.float32)], 1)
    value, gradient = jax.value_and_grad(loss, 1)(x["h"], wild)
    assert float(value) == pytest.approx(float(loss(x["h"], x["kernel"])), rel=1e-6)
    assert not np.any(gradient[:, VOCAB:])


def test_num_blocks():
    assert num_blocks(rows=8, seq_len=128, block_tokens=1024, shards=1) == 1
    assert num_blocks(rows=8, seq_len=128, block_tokens=512, shards=1) == 2
    assert num_blocks(rows=8, seq_len=128, block_tokens=512, shards=8) == 1
    assert num_blocks(rows=8, seq_len=96, block_tokens=400, shards=1) == 2
    assert num_blocks(rows=8, seq_len=7, block_tokens=1, shards=1) == 7


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"divergence": "forwards"}, "did you mean 'forward'"),
        ({"temperature_on": "student"}, "expected one of teacher, both"),
        ({"tail": "buckets"}, "did you mean 'bucket'"),
        ({"top_p": 0.0}, "top_p=0.0 in"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_k": 3, "divergence": "reverse", "tail": "renormalise"}, "needs objective.kd.tail='bucket'"),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(Distillation(), **fields).validate()
