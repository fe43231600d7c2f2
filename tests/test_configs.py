"""Every recipe and variant builds, and its full-size model traces."""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from lmboost import config
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.transformer import ModelConfig

RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@functools.cache
def module(path):
    spec = importlib.util.spec_from_file_location("recipe", path)
    out = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(out)
    return out


def variants_of(path):
    arms = ["", *(v for v in module(path).VARIANTS if v != "tiny")]
    return arms + [f"{arm},tiny" for arm in arms]


CASES = [(path, variant) for path in RECIPES for variant in variants_of(path)]
IDS = [f"{path.stem}:{variant}" for path, variant in CASES]


def model_of(c):
    return ModelConfig(**c.model.to_dict()).validate()


@functools.cache
def trace(model: ModelConfig, rows: int, tokens: int):
    """Shapes of the parameters, the last state and the gradient; computes nothing."""
    params = jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)

    def total(params, ids):
        h, _ = transformer.apply(model, params, ids, ids, ids)
        return h.astype(jnp.float32).sum(), h

    grads, h = jax.eval_shape(jax.grad(total, has_aux=True), params, ids)
    return params, h, grads


@pytest.mark.parametrize(("path", "variant"), CASES, ids=IDS)
def test_recipe_builds_and_its_model_traces(path, variant):
    c = module(path).get_config(variant)
    model = model_of(c)
    params, h, grads = trace(model, min(c.batch_size, 8), c.seq_len)
    assert h.shape == (min(c.batch_size, 8), c.seq_len, model.d_model) and h.dtype == model.dtype
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), grads)


@pytest.mark.parametrize(("path", "variant"), CASES, ids=IDS)
def test_recipe_only_leaves_open_what_the_command_line_gives(path, variant):
    c = module(path).get_config(variant)
    flat = config.flatten(c)
    assert c.teacher["from"] == "" and c.data.train == ""
    helped = c.objective.kd.weight > 0 or c.objective.align.weight > 0
    assert helped != any(arm in variant for arm in ("plain", "teacher"))
    assert c.is_locked and {*flat} == {*config.flatten(config.base())}
    assert c.optimizer.warmup_steps < c.steps
    if variant.endswith("tiny"):
        assert c.steps <= 10 and c.batch_size == 8 and c.seq_len == 64
        assert c.model.num_layers <= 4 and c.model.d_model <= 64 and c.model.vocab_size <= 300
        full = module(path).get_config(variant.removesuffix("tiny").rstrip(","))
        assert full.objective.kd == c.objective.kd and full.objective.align == c.objective.align
        assert all(full.model[s] == c.model[s] for s in ("norm", "mlp", "position", "tie_embeddings", "remat"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_docstring_shows_commands_that_parse(path, monkeypatch, tmp_path):
    monkeypatch.chdir(path.parents[1])
    text = module(path).__doc__.replace("\\\n", " ")
    commands = re.findall(r"python -m lmboost\.train (.*)", text)
    assert commands and all(f"configs/{path.name}" in command for command in commands)
    for command in commands:
        c, workdir = config.load(command.split())
        assert c.data.train and workdir
    assert c.teacher["from"], "the last command is the helped run"
    assert all(re.search(rf"\b{v}\b", text) for v in module(path).VARIANTS), "every variant is described"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_unknown_variant_names_the_known(path):
    with pytest.raises(
        UserError, match=r"variant='plian' is not known \(did you mean 'plain'\?\): expected one of .*tiny"
    ):
        module(path).get_config("plian")
    with pytest.raises(UserError, match=r"names several arms \(plain, teacher\)"):
        module(path).get_config("teacher,plain")
