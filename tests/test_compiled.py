"""What the compiler was told: no array of the size of all logits, one program, time flat in depth."""

import dataclasses
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmboost import sharding
from lmboost.data import scored, windows
from lmboost.data.retokenize import Retokenizer
from lmboost.data.scored import Parts, SoftLabels, State
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.objective.align import Alignment
from lmboost.objective.kd import Distillation
from lmboost.objective.select import Selection
from lmboost.objective.terms import Objective
from lmboost.train_step import Program, init_params, init_state, make_train_step

# A vocabulary so large against everything else that only logits can have B x T x V elements.
STUDENT = ModelConfig(
    vocab_size=4096, num_layers=2, d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64, max_seq_len=256
)
TEACHER = dataclasses.replace(STUDENT, d_model=16, num_layers=1)
OBJECTIVE = Objective(
    Distillation(top_k=10),
    Alignment(((1, 1),)),
    Selection(2, 0.5),
    {"kd": lambda *_: 0.5, "align": lambda *_: 1.0},
    block_tokens=64,
)
HELPS = frozenset({"kd", "align", "select"})
OTHERS = [((2, 2, 2), {"disk": True}), ((2, 2, 2), {"other": True})]


def lower(mesh, rows, tokens, attention, student=STUDENT, rate=1e-3, disk=False, other=False):
    """The lowered train step on abstract arguments laid out on `mesh`; with help from disk, or from models.

    other: the models read other tokens, in rows of their own.
    """
    student, teacher = (dataclasses.replace(m, attention=attention) for m in (student, TEACHER))
    tx = optax.adamw(1e-3)

    def place(tree):
        places = sharding.tree_sharding(tree, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)

    with jax.set_mesh(mesh):
        state = place(jax.eval_shape(lambda: init_state(init_params(student, OBJECTIVE, 0, teacher), tx)))
        params = jax.eval_shape(lambda: transformer.init(teacher, jax.random.key(0)))
        params = place(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params))
        labels, state_ = SoftLabels("best", 10, 1.0, student.vocab_size, 10), State(1, teacher.d_model, 8)
        known = Parts(tokens, labels, True, scored.Selection(10, "drop"), (state_,)) if disk else None
        batch = windows.batch_of([], 1, tokens, known and known.like(1))
        batch |= Retokenizer("teacher", "", "", 2 * tokens).padded(1, tokens) if other else {}
        batch = sharding.batch_like(batch, rows, mesh)
        basis = jax.ShapeDtypeStruct((teacher.d_model, 8), jnp.float32, sharding=sharding.replicated(mesh))
        helpers = {"targets": {"1": basis}} if disk else {"teacher": params, "scorer": params}
        objective = dataclasses.replace(OBJECTIVE, kd=Distillation()) if other else OBJECTIVE
        names = dict.fromkeys(("teacher_rows", "scorer_rows"), "teacher" if other else "")
        program = Program(student, objective, HELPS, teacher, teacher, known=known, **names)
        step = make_train_step(program, tx, lambda s: rate)
        return jax.jit(step, donate_argnums=0).lower(state, helpers, batch)


def largest_array(text: str) -> int:
    """Elements of the largest array that a compiled program's text mentions."""
    shapes = re.findall(r"\b(?:pred|[sufbc]\w*\d+\w*)\[([\d,]+)\]", text)
    assert len(shapes) > 100
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


def topology_mesh(sizes):
    """A mesh of TPUs that are not there, for the TPU compiler."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # no chip is used
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    return sharding.make_mesh(*sizes, devices=devices)


@pytest.mark.parametrize(
    "sizes, changes", [pytest.param((1, 1, 1), {}, marks=pytest.mark.slow), ((2, 2, 2), {}), *OTHERS]
)
def test_no_array_of_all_logits_on_cpu(sizes, changes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    rows, tokens = 4 * sharding.batch_shards(mesh), 128
    text = lower(mesh, 2 * rows, tokens, "xla", **changes).compile().as_text()
    assert largest_array(text) < rows // sharding.batch_shards(mesh) * tokens * STUDENT.vocab_size / sizes[2]


@pytest.mark.parametrize(
    "sizes, attention, changes",
    [
        ((2, 2, 2), "splash", {}),
        pytest.param((8, 1, 1), "splash", {}, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), "xla", {}, marks=pytest.mark.slow),
        *(pytest.param(sizes, "splash", changes, marks=pytest.mark.slow) for sizes, changes in OTHERS),
    ],
)
def test_no_array_of_all_logits_on_tpu(sizes, attention, changes):
    mesh = topology_mesh(sizes)
    rows, tokens = 4 * sharding.batch_shards(mesh), 128
    text = lower(mesh, 2 * rows, tokens, attention, **changes).compile().as_text()
    assert largest_array(text) < rows // sharding.batch_shards(mesh) * tokens * STUDENT.vocab_size / sizes[2]


def test_the_check_sees_an_array_of_all_logits():
    text = jax.jit(lambda h, w: jnp.sum(jax.nn.relu(h @ w) ** 2)).lower(
        jax.ShapeDtypeStruct((4, 128, 32), jnp.float32), jax.ShapeDtypeStruct((32, 4096), jnp.float32)
    )
    mentioned = re.findall(r"f32\[4,128,4096\]|f32\[512,4096\]", text.compile().as_text())
    assert mentioned


@pytest.mark.slow
def test_lower_and_compile_time_are_flat_in_depth():
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    seconds = {6: [], 48: []}
    for attempt in range(4):  # each of another program, so that no cache has it
        for layers, times in seconds.items():
            jax.clear_caches()
            began = time.process_time()  # whatever else the machine does
            lower(mesh, 8, 128, "xla", dataclasses.replace(STUDENT, num_layers=layers), rate=attempt * 1e-3).compile()
            times.append(time.process_time() - began)
    ratio = min(seconds[48][1:]) / min(seconds[6][1:])
    assert ratio < 1.3, seconds
