"""Every recipe and variant builds, and its full-size model traces."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import config, rounds
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.search.space import Orders, Space
from tests.search.promises import check_cut

# Trained without help, and "nokd", whose only help is the start that the search gives it.
ALONE = ("plain", "teacher", "reference", "scratch", "double", "shallow", "half_width", "parent", "nokd")
RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@functools.cache
def module(path):
    return config.load_module(str(path))


def variants_of(path):
    arms = ["", *(v for v in module(path).VARIANTS if v != "tiny")]
    return arms + [f"{arm},tiny" for arm in arms]


CASES = [(path, variant) for path in RECIPES for variant in variants_of(path)]
IDS = [f"{path.stem}:{variant}" for path, variant in CASES]
SIZES = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
SUBNETS = [
    (path, sizes)
    for path in RECIPES
    if path.stem.startswith("subnet_")
    for sizes in ("", "tiny", {"subnet_smollm2": "135m", "subnet_qwen2p5": "1.5b"}.get(path.stem, "12b"))
] + [(path, sizes) for path in RECIPES if path.stem == "subnet_qwen2p5" for sizes in ("7b", "7b,1.5b", "7b,tiny")]


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
    assert c.teacher.path == "" and c.data.train == ""
    assert c.init.path == "" and c.resume.path == ""
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
    commands = re.findall(r"python -m lmboost\.(train|search|rounds) (.*)", text)
    assert commands
    searched, workdir = [], ""
    for verb, flags in ((verb, flags.split()) for verb, flags in commands):
        if flags[0].endswith("/winner.py"):  # what the search before it wrote: its recipe, with another start
            assert flags[0] == f"--config={workdir}/winner.py"
            flags = [*searched, *flags[1:]]
        assert f"configs/{path.name}" in flags[0]
        searched = [flag for flag in flags if not flag.startswith("--workdir")]
        c, given = config.read(flags, rounds.Flags if verb == "rounds" else config.Flags)
        assert c.data.train and (workdir := given.workdir)
    assert c.teacher.path or c.init.path or verb == "rounds", "the last command is the helped run"
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


@pytest.mark.parametrize(("path", "sizes"), SUBNETS, ids=[f"{path.stem}:{sizes}" for path, sizes in SUBNETS])
def test_a_search_finds_cuts_of_the_plain_models_size(path, sizes):
    plain, cut = (module(path).get_config(f"{arm},{sizes}") for arm in ("scratch", "cut"))
    assert plain.search == cut.search == module(path).get_config(sizes).search
    parent, rng = module(path).parent(sizes), np.random.default_rng(0)
    space = Space.from_config(cut.search, parent, Orders.natural(parent))
    for found in (space.sample(rng), space.sample(rng)):
        check_cut(space, found)
    for model in map(model_of, (plain, cut)):
        assert space.low <= model.num_params() <= space.high
    own = {"layers": model.num_layers, "group_heads": model.num_heads // model.num_kv_heads}
    own |= {name: getattr(model, name) for name in ("d_model", "num_kv_heads", "head_dim", "mlp_dim")}
    assert all(size in getattr(space, name) for name, size in own.items()), "what is not searched could be found"
    assert dataclasses.replace(parent, **{name: getattr(model, name) for name in SIZES}) == model, "of the parent"
