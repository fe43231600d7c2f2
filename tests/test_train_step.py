"""The jitted step against the dense oracle, and what may not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmboost import sharding
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.objective.align import Alignment
from lmboost.objective.kd import Distillation
from lmboost.objective.select import Selection
from lmboost.objective.terms import Objective
from lmboost.train_step import Program, init_params, init_state, make_train_step
from tests import dense

STUDENT = ModelConfig(
    vocab_size=61, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
    dtype="float32", vocab_multiple=8, init_std=0.3,
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, num_layers=2, d_model=24, mlp_dim=48, vocab_multiple=16)
ROWS, TOKENS = 16, 32


def make_batch(rows=ROWS, seed=0, vocab_size=61):
    """Rows of two documents and, in some of them, padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (rows, TOKENS + 1)).astype(np.int32)
    cut, end = rng.integers(4, 20, (rows, 1)), rng.integers(22, TOKENS + 1, (rows, 1))
    place = np.arange(TOKENS)[None]
    segment_ids = np.where(place < cut, 1, 2) * (place < end)
    positions = np.where(place < cut, place, place - cut)
    weights = ((place != cut - 1) & (place < end - 1)).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids.astype(np.int32),
        "positions": positions.astype(np.int32),
        "weights": weights,
    }


@functools.cache
def models():
    init = jax.jit(transformer.init, static_argnums=0)
    return {"model": init(STUDENT, jax.random.key(0))}, init(TEACHER, jax.random.key(1))


def oracle(batch, *arguments):
    """(loss, gradient) of the dense oracle."""
    params, teacher_params = models()
    return jax.jit(lambda p: jax.value_and_grad(dense.loss)(p, teacher_params, batch, STUDENT, TEACHER, *arguments))(
        params["model"]
    )


def objective(weight=0.0, lam=0.0, **fields):
    base = {
        "kd": Distillation(), "align": None, "select": Selection(),
        "weights": {"kd": lambda *_: weight, "align": lambda *_: lam}, "block_tokens": 128,
    }  # fmt: skip
    return Objective(**base | fields)


def run_step(obj, helps, batch, accumulation=1, mesh=None, params=None, tx=None, rows=""):
    """(gradient, metrics) of one step: with plain SGD at rate 1 the update is minus the gradient.

    rows: the name of the batch's rows that the helpers read, where these are of other tokens.
    """
    student_params, teacher_params = models()
    params = params or student_params
    tx = tx or optax.sgd(1.0)
    program = Program(
        STUDENT, obj, frozenset(helps), TEACHER, TEACHER, accumulation, teacher_rows=rows, scorer_rows=rows
    )
    step, state = make_train_step(program, tx, lambda step: 1.0), init_state(params, tx, obj.auto)
    helpers = {"teacher": teacher_params, "scorer": teacher_params}
    if mesh is None:
        new, metrics = jax.jit(step)(state, helpers, batch)
    else:
        with jax.set_mesh(mesh):
            place = lambda tree: jax.device_put(tree, sharding.tree_sharding(tree, mesh))  # noqa: E731
            new, metrics = jax.jit(step)(place(state), place(helpers), sharding.put_batch(batch, mesh))
    gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, new.params)
    return gradient, {k: float(s) / float(c) for k, (s, c) in metrics.items()}


def assert_close(gradient, expected, tolerance=1e-5):
    """Relative to the norm, parameter by parameter; the step adds the gradient to parameters of size ~1."""
    for (path, a), b in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3)
        assert error < tolerance, (sharding.path_name(path), error)


MESHES = {"data": (8, 1, 1), "all": (2, 2, 2)}


@pytest.mark.parametrize("mesh, scatter", [(None, False), *((mesh, False) for mesh in MESHES), ("all", True)])
def test_a_step_with_kd_equals_the_dense_oracle(mesh, scatter):
    """Every kd option is checked in objective/test_blend.py; here the whole step, on 1 and on 8 devices."""
    kd, batch = Distillation(top_k=0 if scatter else 5), make_batch()
    params, teacher_params = models()
    expected, gradient = oracle(batch, kd, 0.6, 0.4, 1e-3)
    obj = dataclasses.replace(objective(0.6, kd=kd, z_loss=1e-3), block_tokens=32, scatter_head=scatter)
    found, metrics = run_step(obj, {"kd"}, batch, mesh=mesh and sharding.make_mesh(*MESHES[mesh]))
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert_close(found["model"], gradient)


ALIGNMENTS = {
    "late_to_early": Alignment(((1, 2),), scale="plain"),
    "before_norm": Alignment(((2, 2),), scale="plain", final_norm=False),
    "two_pairs_centred": Alignment(((1, 1), (2, 2)), scale="plain", centre=True),
    "to_teacher": Alignment(((2, 1),), scale="plain", map="student_to_teacher"),
    "last": Alignment(((3, 2),), scale="plain"),
}


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_plain_alignment_equals_the_dense_oracle(name):
    alignment, batch = ALIGNMENTS[name], make_batch()
    params, teacher_params = models()
    expected, gradient = oracle(batch, Distillation(), 0.5, 0.5, 0.0, alignment, 0.7)
    found, metrics = run_step(objective(0.5, 0.7, align=alignment), {"kd", "align"}, batch)
    assert_close(found["model"], gradient)
    if "centred" not in name:
        assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["teacher_to_student", "student_to_teacher", "projection"])
def test_the_alignment_gets_its_share_of_the_gradient(kind):
    alignment = Alignment(((2, 2),), scale="ratio", map=kind)
    obj = objective(lam=0.3, align=alignment)
    params = init_params(STUDENT, obj, 0, TEACHER)
    _, metrics = run_step(obj, {"align"}, make_batch(), params=params)
    assert metrics["align_ratio"] == pytest.approx(0.3, rel=1e-4)
    assert metrics["align_cosine"] == pytest.approx(-metrics["align"])


def test_a_learned_projection_is_trained_and_raises_the_cosine():
    obj = objective(lam=0.5, align=Alignment(((2, 2),), map="projection"))
    params = init_params(STUDENT, obj, 0, TEACHER)
    gradient, _ = run_step(obj, {"align"}, make_batch(), params=params)
    assert np.linalg.norm(gradient["align"]["2"]) > 0
    tx, batch, cosines = optax.adam(1e-2), make_batch(), []
    step = jax.jit(make_train_step(Program(STUDENT, obj, frozenset({"align"}), TEACHER), tx, lambda s: 1.0))
    state = init_state(params, tx)
    for _ in range(10):
        state, metrics = step(state, {"teacher": models()[1]}, batch)
        cosines.append(float(metrics["align_cosine"][0] / metrics["align_cosine"][1]))
    assert cosines[-1] > cosines[0] + 0.1


SELECTIONS = {
    "drop": Selection(2, 0.5, k=10, others="drop"),
    "zero": Selection(2, 0.5, k=30, others="zero"),
    "masked": Selection(2, 0.3, k=10),
    "mask_only": Selection(1, 0.5, k=20),
    "four": Selection(4, 0.25, k=10),
}


@pytest.mark.parametrize("name, mesh", [(name, None) for name in SELECTIONS] + [("masked", "all")])
def test_selection_trains_on_the_oracle_s_best_rows(name, mesh):
    selection = SELECTIONS[name]
    candidates = make_batch(ROWS * selection.candidates)
    params, teacher_params = models()
    scores = dense.score(teacher_params, candidates, TEACHER, selection)
    best = np.sort(np.argsort(-scores, kind="stable")[: selection.kept_rows(ROWS)])
    chosen = {k: x[best] for k, x in candidates.items()}
    expected, gradient = oracle(chosen, Distillation(), 0.5, 0.5, 0.0)
    mesh = mesh and sharding.make_mesh(*MESHES[mesh])
    found, metrics = run_step(objective(0.5, select=selection), {"kd", "select"}, candidates, mesh=mesh)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["kept_fraction"] == pytest.approx(len(best) / len(scores))
    assert_close(found["model"], gradient)


@pytest.mark.parametrize(
    "helps, mesh", [((), None), (("kd", "align"), None), (("kd", "align", "select"), None), (("kd", "align"), "all")]
)
def test_accumulation_equals_the_big_batch(helps, mesh):
    selection = Selection(2, 0.5) if "select" in helps else Selection()
    obj = objective(0.5, 0.4, align=Alignment(((2, 2),)), select=selection)
    batch = make_batch(ROWS * selection.candidates)
    mesh = mesh and sharding.make_mesh(*MESHES[mesh])
    whole, metrics = run_step(obj, helps, batch)
    parts, part_metrics = run_step(obj, helps, batch, accumulation=4, mesh=mesh)
    assert_close(parts, whole)
    assert part_metrics == pytest.approx(metrics, rel=1e-5)


def test_padding_changes_nothing():
    batch = make_batch()
    padded = {k: np.pad(x, [(0, 0), (0, 16)]) for k, x in batch.items()}
    obj = objective(0.5, 0.4, align=Alignment(((2, 2),), centre=True))
    short, metrics = run_step(obj, {"kd", "align"}, batch)
    long, padded_metrics = run_step(obj, {"kd", "align"}, padded)
    assert_close(long, short)
    assert padded_metrics == pytest.approx(metrics, rel=1e-5)


def test_helps_that_are_off_leave_no_trace():
    """Without active helps the lowered program is the plain one, whatever the objective says they would be."""
    batch = make_batch()
    obj = objective(0.7, 3.0, align=Alignment(((2, 2),)), select=Selection(2, 0.5))

    def text(o, helpers):
        program = Program(STUDENT, o, frozenset(), TEACHER, TEACHER)
        step = make_train_step(program, optax.adamw(1e-3), lambda s: 1e-3)
        return jax.jit(step).lower(init_state(models()[0], optax.adamw(1e-3)), helpers, batch).as_text()

    assert text(obj, {}) == text(objective(), {})


def test_the_teacher_gets_no_gradient():
    obj = objective(0.5, 1.0, align=Alignment(((2, 2),), scale="plain"))
    program = Program(STUDENT, obj, frozenset({"kd", "align"}), TEACHER)
    step = make_train_step(program, optax.sgd(1.0), lambda s: 1.0)

    def after(teacher):
        _, metrics = step(init_state(models()[0], optax.sgd(1.0)), {"teacher": teacher}, make_batch())
        return metrics["loss"][0]

    gradient = jax.jit(jax.grad(after))(models()[1])
    assert all(not np.any(g) for g in jax.tree.leaves(gradient))


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    params = jax.tree.map(jnp.copy, models()[0])
    params["model"]["head"] = params["model"]["head"].at[0, 0].set(jnp.nan)
    tx = optax.adamw(1e-3)
    step = jax.jit(make_train_step(Program(STUDENT, objective()), tx, lambda s: 1e-3))
    state = init_state(params, tx)
    for n in (1, 2):
        new, _ = step(state, {}, make_batch())
        assert int(new.step) == n and int(new.skipped) == n and int(new.skipped_in_a_row) == n
        same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), new.params, state.params)
        assert all(jax.tree.leaves(same)) and int(new.opt_state[0].count) == 0
        state = new
    healthy, _ = step(state.replace(params=models()[0]), {}, make_batch())
    assert int(healthy.skipped) == 2 and int(healthy.skipped_in_a_row) == 0


def test_counts_are_exact_above_256_tokens_in_bfloat16():
    student = dataclasses.replace(STUDENT, dtype="bfloat16")
    batch = make_batch()
    step = make_train_step(Program(student, objective()), optax.sgd(1.0), lambda s: 1.0)
    _, metrics = jax.jit(step)(init_state(models()[0], optax.sgd(1.0)), {}, batch)
    assert float(metrics["loss"][1]) == batch["weights"].sum() > 256
