"""A model of each family, read from its files, teaches a student, is sampled from and becomes deeper."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest

from lmboost import checkpoint
from lmboost.generate import Generator
from lmboost.hf import config_json
from lmboost.models import transformer, vocabulary
from lmboost.objective.kd import Distillation
from lmboost.objective.select import Selection
from lmboost.objective.terms import Objective
from lmboost.surgery import grow, inherit
from lmboost.train_step import Program, init_state, make_train_step
from tests import dense, hub
from tests.hf.test_published import PUBLISHED
from tests.test_train_step import make_batch

# One published model of each family, with fewer and smaller layers.
NAMES = [
    "gemma-3-4b, its text",
    "granite-3.1-2b",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("gemma-2-2b", "smollm3-3b", "olmo-3-7b", "phi-4-mini", "falcon3-1b")
    ),
]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": hub.VOCAB, "max_position_embeddings": 64,
}  # fmt: skip

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # every case is compiled anew


@pytest.fixture(scope="module", params=NAMES)
def teacher(request, tmp_path_factory):
    """(model, parameters), from a directory that was written and read again."""
    directory = tmp_path_factory.mktemp("hub")
    config = PUBLISHED[request.param][0] | SIZES
    config |= {"head_dim": 16} if "head_dim" in config else {}
    for key in ("layer_types", "no_rope_layers", "sliding_window"):
        config |= {key: 5 if key == "sliding_window" else config[key][:5]} if config.get(key) else {}
    if name := config.get("rope_scaling"):
        config["rope_scaling"] = {k: v[:3] if isinstance(v, list) else v for k, v in name.items()}
    (directory / "config.json").write_text(json.dumps(config))
    model = dataclasses.replace(config_json.read(directory).model, dtype="float32", init_std=0.2)
    out = directory / "out"
    out.mkdir()
    hub.write(out, model)
    saved = checkpoint.Saved.find(f"hf:{out}")
    assert dataclasses.replace(saved.model, init_std=0.2) == model
    return model, saved.load(hub.one_device(), "float32", saved.model)


def test_it_teaches_a_student(teacher):
    """The step's loss and gradient are those of the dense oracle, with the teacher's own caps and multipliers."""
    model, params = teacher
    student = dataclasses.replace(hub.LLAMA, d_model=16)
    kd = Distillation()
    weights = {"kd": lambda *_: 0.5, "align": lambda *_: 0.0}
    objective = Objective(kd, None, Selection(), weights, block_tokens=64)
    own, batch = transformer.init(student, jax.random.key(0)), make_batch(rows=4, vocab_size=hub.VOCAB)
    tx = optax.sgd(1.0)
    step = make_train_step(Program(student, objective, frozenset({"kd"}), model), tx, lambda step: 1.0)
    state, metrics = jit(step)(init_state({"model": own}, tx), {"teacher": params}, batch)
    expected, gradient = jit(
        lambda p: jax.value_and_grad(dense.loss)(p, params, batch, student, model, kd, 0.5, 0.5, 0.0)
    )(own)
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(float(expected), rel=1e-5)
    moved = jax.tree.map(lambda old, new: old - new, own, state.params["model"])
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def test_what_it_says_next_is_the_best_of_its_logits(teacher):
    model, params = teacher
    mesh = hub.one_device()
    prompt = [5, 9, 200, 17, 3, 77]
    with jax.set_mesh(mesh):
        (made,) = Generator(model, params, mesh)([prompt], 6)
    tokens = np.array([prompt + list(made)], np.int32)
    logits = hub.logits(model, params, tokens)
    assert list(made) == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.slow
def test_deeper_it_computes_the_same_at_first(teacher):
    model, params = teacher
    child = inherit.of_layers(model, [layer for layer in range(5) for _ in range(2)])
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    grown = grow.plan("zero", model, child)(params, transformer.init(child, jax.random.key(1)))
    np.testing.assert_allclose(hub.logits(child, grown, tokens), hub.logits(model, params, tokens), atol=1e-5)
    assert vocabulary.Head.of(child, grown).softcap == model.logit_softcap
