"""Every recipe and variant builds, and its full-size model traces."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from lmboost import config
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.transformer import ModelConfig

ALONE = ("plain", "teacher", "reference", "scratch", "double", "shallow", "half_width")
RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@functools.cache
def module(path):
    return config.load_module(str(path))


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
    assert c.init["from"] == "" and c.resume["from"] == ""
    helped = c.objective.kd.weight > 0 or c.objective.align.weight > 0 or c.init.kind != "copy"
    assert helped != bool({*variant.split(",")} & {*ALONE})
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
    assert c.teacher["from"] or c.init["from"], "the last command is the helped run"
    assert all(re.search(rf"\b{v}\b", text) for v in module(path).VARIANTS), "every variant is described"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_unknown_variant_names_the_known(path):
    first, second = module(path).VARIANTS[:2]
    wrong = first.replace(first[1:3], first[2:0:-1], 1)
    with pytest.raises(
        UserError, match=rf"variant='{wrong}' is not known \(did you mean '{first}'\?\): expected.*tiny"
    ):
        module(path).get_config(wrong)
    with pytest.raises(UserError, match=rf"names several arms \({', '.join(sorted((first, second)))}\)"):
        module(path).get_config(f"{second},{first}")
