"""One table knows the axes of every parameter, and whoever asks it for another one is told where to add it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lmboost import axes, optimizers, sharding
from lmboost.config import base
from lmboost.hf.families import FAMILIES
from lmboost.models import transformer
from lmboost.models.model_config import MLPS, NORMS, ModelConfig
from lmboost.models.presets import PRESETS, tiny
from lmboost.objective import align
from lmboost.surgery import inherit, slots

# No two axes are of one size.
PLAIN = ModelConfig(vocab_size=96, num_layers=2, d_model=48, num_heads=12, num_kv_heads=6, head_dim=8, mlp_dim=80)
LEARNED = dataclasses.replace(PLAIN, position="learned", max_seq_len=64)
BIASES = {"qkv_bias": True, "attn_out_bias": True, "mlp_bias": True}
MODELS = {name: tiny(model, layers=2) for name, model in PRESETS.items()} | {
    "plain": PLAIN,
    "biases": dataclasses.replace(LEARNED, **BIASES, norm="layernorm"),
    "tied": dataclasses.replace(LEARNED, tie_embeddings=True, final_norm=False),
    "unequal": dataclasses.replace(PLAIN, **BIASES, qk_norm="head", layer_sizes="12/6/8/80,6/6/8/32"),
    "both": dataclasses.replace(PLAIN, norm_placement="both", norm="layernorm"),
    "post": dataclasses.replace(PLAIN, norm_placement="post", qk_norm="full"),
} | {f"norm {norm}": dataclasses.replace(PLAIN, norm=norm) for norm in NORMS} | {
    f"mlp {mlp}": dataclasses.replace(PLAIN, mlp=mlp, mlp_bias=True) for mlp in MLPS
} | {f"qk_norm {kind}": dataclasses.replace(PLAIN, qk_norm=kind) for kind in ("head", "full")}  # fmt: skip

# How parameters are laid out, without the axis of stacked layers: what compiled programs and checkpoints are made for.
LAYOUT = {
    "embed/embedding": P("tensor", "fsdp"),
    "position_embed/embedding": P(None, "fsdp"),
    "final_norm/scale": P(None),
    "final_norm/bias": P(None),
    "head": P("fsdp", "tensor"),
    "layers/attn_norm/scale": P(None),
    "layers/attn_norm/bias": P(None),
    "layers/attn_post_norm/scale": P(None),
    "layers/attn_post_norm/bias": P(None),
    "layers/attn/q/kernel": P("fsdp", "tensor", None),
    "layers/attn/q/bias": P("tensor", None),
    "layers/attn/k/kernel": P("fsdp", "tensor", None),
    "layers/attn/k/bias": P("tensor", None),
    "layers/attn/v/kernel": P("fsdp", "tensor", None),
    "layers/attn/v/bias": P("tensor", None),
    "layers/attn/q_norm/scale": P(None),
    "layers/attn/k_norm/scale": P(None),
    "layers/attn/o/kernel": P("tensor", None, "fsdp"),
    "layers/attn/o/bias": P(None),
    "layers/mlp_norm/scale": P(None),
    "layers/mlp_norm/bias": P(None),
    "layers/mlp_post_norm/scale": P(None),
    "layers/mlp_post_norm/bias": P(None),
    "layers/mlp/up/kernel": P("fsdp", "tensor"),
    "layers/mlp/up/bias": P("tensor"),
    "layers/mlp/gate/kernel": P("fsdp", "tensor"),
    "layers/mlp/gate/bias": P("tensor"),
    "layers/mlp/down/kernel": P("tensor", "fsdp"),
    "layers/mlp/down/bias": P(None),
    "align": P(None, None),
}
UNKNOWN = ("layers/attn/router/kernel", "layers/mlp/experts/up/kernel", "layers/attn/q/scale", "layers/head", "adapter")


@functools.cache
def shapes(name):
    """What a run trains: the model, and maps of an alignment."""
    model = MODELS[name]
    maps = align.Alignment(pairs=((1, 2), (2, 4)), map="projection")
    return {
        "model": jax.eval_shape(lambda: transformer.init(model, jax.random.key(0))),
        "align": jax.eval_shape(lambda: align.init_projections(maps, model.d_model, 64, jax.random.key(0))),
    }


def leaves(tree):
    """(path, its name in the table, whether it is stacked, leaf) of each leaf."""
    for keys, x in jax.tree_util.tree_leaves_with_path(tree):
        path = sharding.path_name(keys)
        name = "/".join(part for part in path.split("/") if not part.isdigit()).removeprefix("model/")
        yield path, name, name.startswith("layers/"), x


def test_the_models_have_every_parameter_of_the_table():
    assert {name for model in MODELS for _, name, _, _ in leaves(shapes(model))} == {*axes.PARAMETERS} == {*LAYOUT}


@pytest.mark.parametrize("name", MODELS)
def test_axes_have_the_sizes_that_their_names_say(name):
    model = MODELS[name]
    for path, _, is_stacked, x in leaves(shapes(name)):
        config = transformer.split_layers(model, shapes(name)["model"]["layers"])[
            int(path.split("/")[2]) if model.layer_sizes and is_stacked else 0
        ][0].config
        sizes = {
            "embed": config.d_model, "vocab": config.vocab_rows, "positions": config.max_seq_len +
            config.position_offset, "heads": config.num_heads, "kv_heads": config.num_kv_heads, "mlp": config.mlp_dim,
            "features": config.head_dim, "state": config.d_model, "teacher_state": 64,
        }  # fmt: skip
        every = 1 if config.qk_norm == "head" else config.num_heads
        sizes |= {"heads*features": every * config.head_dim}
        every = 1 if config.qk_norm == "head" else config.num_kv_heads
        sizes |= {"kv_heads*features": every * config.head_dim}
        assert x.shape[is_stacked:] == tuple(sizes[axis] for axis in axes.of(path)), path


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)])
def test_every_parameter_and_its_moments_are_laid_out_as_ever(name, sizes):
    mesh, state = sharding.make_mesh(*sizes), jax.eval_shape(optax.scale_by_adam().init, shapes(name))
    for tree in (shapes(name), shapes(name)["model"], state.mu):
        for (path, parameter, is_stacked, _), where in zip(
            leaves(tree), jax.tree.leaves(sharding.tree_sharding(tree, mesh)), strict=True
        ):
            assert where.spec == P(*[None] * is_stacked, *LAYOUT[parameter]), path


def tree_of(path):
    tree = jnp.ones((2, 4, 4))
    for part in reversed(path.split("/")):
        tree = {part: tree}
    return tree


def muon(tree):
    c = base().optimizer
    c.update({"name": "muon", "warmup_steps": 1})
    return optimizers.make_optimizer(c, 10, shapes("plain"))[0].init(tree)


def gathered(tree):
    if "layers" not in tree:
        return slots.gather_rest(tree, np.arange(4))
    entries = slots.LayerSlots(*[np.zeros((1, 2), np.int32)] * 5)._replace(layer=np.zeros(1, np.int32))
    return slots.gather_layers(PLAIN, tree["layers"], np.arange(4), entries)


ASKERS = {
    "sharding": lambda tree: sharding.tree_sharding(tree, sharding.make_mesh()),
    "sharding of a run": lambda tree: sharding.tree_sharding({"model": tree}, sharding.make_mesh()),
    "sharding of moments": lambda tree: sharding.tree_sharding(optax.scale_by_adam().init(tree), sharding.make_mesh()),
    "muon": muon,
    "decay_mask": optimizers.decay_mask,
    "slots": gathered,
}


@pytest.mark.parametrize("path", UNKNOWN)
@pytest.mark.parametrize("asker", ASKERS)
def test_an_unknown_parameter_is_named_and_so_is_the_file_to_add_it_to(asker, path):
    with pytest.raises(KeyError, match=f"{path}' has no axes: add it to PARAMETERS in lmboost/axes.py"):
        ASKERS[asker](tree_of(path))


@pytest.mark.parametrize("name", axes.PARAMETERS)
def test_every_axis_has_a_rule(name):
    sharding.spec(axes.of(name))


def test_sides_are_the_axes_and_only_matrices_have_both():
    for name in axes.PARAMETERS:
        before, behind = axes.sides(name)
        assert before + behind == axes.of(name) or ("norm" in name and before == behind == ())
        assert bool(before) == name.endswith(("kernel", "embedding", "head", "align"))
        assert bool(before or behind) != ("norm" in name)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_published_tensors_have_the_axes_of_their_parameters(family):
    letters = {"d": "embed", "v": "vocab", "t": "positions", "n": "features", "f": "mlp"}
    for tensor, layout, paths in family.tensors:
        for path in paths:
            if not path.startswith(("layers/attn/q_norm", "layers/attn/k_norm")):  # their axis is two in one
                named = [letters.get(letter) for letter in layout.split("->")[1]]
                assert named == [None if axis.endswith("heads") else axis for axis in axes.of(path)], (tensor, path)


def test_what_is_not_inherited_with_the_layers_has_a_name():
    rest = {name.split("/")[0] for name in axes.PARAMETERS} - {"layers", "align"}
    assert set(inherit.PARTS) == rest
