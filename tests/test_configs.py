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
ALONE += ("one", "three", "six", "linear")
RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@functools.cache
def module(path):
    return config.load_module(str(path))


ARMS = [(path, arm) for path in RECIPES for arm in ("", *module(path).VARIANTS) if arm != "tiny"]
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


def program(c):
    """A model's switches: models of one recipe that have the same ones differ in sizes alone."""
    return {name: value for name, value in c.model.items() if name not in SIZES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_full_size_models_trace(path):
    """The recipe's own, and those of the arms that differ from it in more than sizes."""
    found = [module(path).get_config("")]
    for arm in module(path).VARIANTS:
        if arm != "tiny" and program(c := module(path).get_config(arm)) not in map(program, found):
            found.append(c)
    for c in found:
        model, rows = model_of(c), min(c.batch_size, 8)
        params, h, grads = trace(model, rows, c.seq_len)
        assert h.shape == (rows, c.seq_len, model.d_model) and h.dtype == model.dtype
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), grads)


@pytest.mark.parametrize(("path", "arm"), ARMS, ids=[f"{path.stem}:{arm}" for path, arm in ARMS])
def test_recipe_only_leaves_open_what_the_command_line_gives(path, arm):
    full, tiny = module(path).get_config(arm), module(path).get_config(f"{arm},tiny")
    for c in (full, tiny):
        model_of(c)
        assert c.teacher.path == "" and c.data.train == ""
        assert c.init.path == "" and c.resume.path == ""
        helped = c.objective.kd.weight > 0 or c.objective.align.weight > 0 or c.init.kind != "copy"
        assert helped != bool({*arm.split(",")} & {*ALONE})
        assert c.is_locked and {*config.flatten(c)} == {*config.flatten(config.base())}
        assert c.optimizer.warmup_steps < c.steps
    assert tiny.steps <= 10 and tiny.batch_size == 8 and tiny.seq_len == 64
    assert tiny.model.num_layers <= 4 and tiny.model.d_model <= 64 and tiny.model.vocab_size <= 300
    assert full.objective.kd == tiny.objective.kd and full.objective.align == tiny.objective.align
    assert all(full.model[s] == tiny.model[s] for s in ("norm", "mlp", "position", "tie_embeddings", "remat"))


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


def test_unknown_variant_names_the_known():
    path = RECIPES[0]
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
