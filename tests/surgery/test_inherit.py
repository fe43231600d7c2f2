"""What a model takes from its parent, and what is refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmboost import ranges, sharding, start
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.presets import preset, tiny
from lmboost.surgery import inherit
from tests.compare import assert_same

PARENTS = {name: tiny(preset(name), 6) for name in ("gpt2", "pythia-70m", "smollm2-135m", "openllama-3b")}
SIZES = "2*4/2/16/128,2*2/1/16/96,2*4/2/8/64"
PARENTS["unequal"] = dataclasses.replace(PARENTS["smollm2-135m"], layer_sizes=SIZES)
PARENTS["gemma"] = dataclasses.replace(
    PARENTS["smollm2-135m"], layer_kinds="window,full", sliding_window=4, rope_local_theta=50.0, norm_placement="both",
    zero_centred_norm=True, embed_scale=8.0, residual_scale=0.5, attn_softcap=2.0,
)  # fmt: skip
parents = pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS.keys())
FIELDS = ("kind", "layers", "fresh")
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12))


@functools.cache
def params_of(config, seed):
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.1 * draw.standard_normal(x.shape, np.float32), shapes)


def inherited(parent, child, kind="inherit", layers="", fresh=""):
    return jax.jit(start.KINDS[kind](layers, fresh, parent, child))(params_of(parent, 0), params_of(child, 1))


def states(config, params, capture=()):
    ids = np.ones_like(TOKENS)
    positions = np.broadcast_to(np.arange(12), TOKENS.shape)
    return transformer.apply(config, params, TOKENS, ids, positions, capture=capture)


@parents
def test_all_layers_are_the_parent_bitwise(parent):
    for kind in ("inherit", "stack"):
        assert_same(inherited(parent, parent, kind), params_of(parent, 0))


@parents
def test_the_first_layers_give_the_parents_states(parent):
    child = inherit.of_layers(parent, range(3))
    params = inherited(parent, child)
    _, whole = states(parent, params_of(parent, 0), (0, 1, 2, 3))
    _, part = states(child, params, (0, 1, 2, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), part, whole)


@pytest.mark.parametrize("post", [False, True])
@parents
def test_an_expanded_model_computes_what_its_parent_does(parent, post):
    parent = dataclasses.replace(parent, norm_placement="post" if post else "pre", parallel_residual=False)
    child = inherit.of_layers(parent, [layer for layer in range(6) for _ in range(3)])
    taken = inherit.plan_expand("", "", parent, child)
    params = jax.jit(taken)(params_of(parent, 0), params_of(child, 1))
    (h, whole), (g, part) = states(parent, params_of(parent, 0), (2,)), states(child, params, (6,))
    np.testing.assert_allclose(g, h, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(part[6], whole[2], rtol=1e-6, atol=1e-6)
    for layer in range(18):  # all else is the parent's
        (_, new), (_, old) = (
            transformer.one_layer(m, p, i)
            for m, p, i in ((child, params, layer), (parent, params_of(parent, 0), layer // 3))
        )
        assert_same(new["attn"]["q"], old["attn"]["q"])
        assert_same(new["mlp"]["up"], old["mlp"]["up"])
        assert bool(np.any(new["mlp"]["down"]["kernel"])) == (layer % 3 == 0)
    assert taken.report(params)[0].endswith("; 1-2,4-5,7-8,10-11,13-14,16-17 add nothing at first")


def test_a_silent_layer_has_a_gradient_like_others():
    """Between two norms, too, where a projection of zeros would have one 1 / sqrt(norm_eps) times as large."""
    parent = dataclasses.replace(PARENTS["gemma"], num_layers=2)
    child = inherit.of_layers(parent, [0, 0, 1, 1])
    params = inherit.plan_expand("", "", parent, child)(params_of(parent, 0), params_of(child, 1))
    gradient = jax.jit(jax.grad(lambda p: states(child, p)[0].std()))(params)["layers"]
    largest = np.array([[np.abs(x[layer]).max() for x in jax.tree.leaves(gradient)] for layer in range(4)]).max(1)
    assert (largest > 0).all() and (largest[[1, 3]] < 10 * largest[[0, 2]]).all()


def test_chosen_layers_and_stacks():
    parent = PARENTS["smollm2-135m"]
    before = params_of(parent, 0)["layers"]
    for kind, layers, count, expected in (
        ("inherit", "0,2-3,5", 4, [0, 2, 3, 5]), ("inherit", "4", 1, [4]), ("stack", "", 12, [*range(6)] * 2),
        ("stack", "0-1", 6, [0, 1, 0, 1, 0, 1]),
    ):  # fmt: skip
        child = dataclasses.replace(parent, num_layers=count)
        after = inherited(parent, child, kind, layers)["layers"]
        assert_same(after, jax.tree.map(lambda x, expected=expected: x[np.array(expected)], before))


@pytest.mark.parametrize(
    ("kind", "layers", "indices", "sizes"),
    [
        ("inherit", "0-2", [0, 1, 2], "2*4/2/16/128,2/1/16/96"),
        ("inherit", "0,4-5", [0, 4, 5], "4/2/16/128,4/2/8/64,4/2/8/64"),  # equal neighbours, written one by one
        ("inherit", "2,3", [2, 3], ""),  # of equal sizes: a plain model
        ("stack", "1-2", [1, 2, 1, 2], "4/2/16/128,2/1/16/96,4/2/16/128,2/1/16/96"),
    ],
)
def test_layers_of_unequal_sizes_are_taken_one_by_one(kind, layers, indices, sizes):
    parent, before = PARENTS["unequal"], params_of(PARENTS["unequal"], 0)
    child = dataclasses.replace(inherit.of_layers(parent, indices), layer_sizes=sizes).validate()
    taken = start.KINDS[kind](layers, "", parent, child)
    after = jax.jit(taken)(before, params_of(child, 1))
    for new, old in enumerate(indices):
        assert_same(transformer.one_layer(child, after, new)[1], transformer.one_layer(parent, before, old)[1])
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, params_of(child, 1))
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put((before, params_of(child, 1)), sharding.tree_sharding((before, after), mesh))
    assert_same(jax.jit(taken, out_shardings=sharding.tree_sharding(after, mesh))(*placed), after)


def test_a_child_of_other_sizes_is_told_what_to_set():
    parent = PARENTS["unequal"]
    child = dataclasses.replace(parent, num_layers=3, layer_sizes="")
    for sizes, message in (
        ("", r"layer_sizes is '', the parent's '2\*4/2/16/128,2/1/16/96'. Set model.layer_sizes='2\*4/2/16/128,2/1"),
        ("4/2/16/128,2*2/1/16/96", "Set model.layer_sizes='2"),
    ):
        with pytest.raises(UserError, match=f"init.path is a model that these layers can't be taken from.*{message}"):
            inherit.plan("0-2", "", parent, dataclasses.replace(child, layer_sizes=sizes))
    with pytest.raises(UserError, match="Set model.num_heads=2, model.num_kv_heads=1, model.mlp_dim=96"):
        inherit.plan("2", "", parent, dataclasses.replace(child, num_layers=1))


def test_fresh_parts_stay_as_they_are_at_random():
    parent = PARENTS["gpt2"]
    child = dataclasses.replace(parent, num_layers=2)
    old, new = params_of(parent, 0), params_of(child, 1)
    params = inherited(parent, child, fresh="positions, final_norm")
    assert_same(params["position_embed"], new["position_embed"])
    assert_same(params["final_norm"], new["final_norm"])
    assert_same(params["embed"], old["embed"])
    taken = inherit.plan("", "positions", parent, child)
    assert taken.report(params) == [
        "layers: of the parent's 0-1", "embedding: inherited", "final_norm: inherited", "positions: random",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "0-6"}, r"init.layers='0-6': there is no layer 6; the parent has layers 0 to 5"),
        ({"layers": "0,0"}, "named once"),
        ({"layers": "2,1"}, "in the parent's order"),
        ({"layers": "3-1"}, "in the parent's order"),
        ({"layers": "half"}, "neither a layer nor a range"),
        ({"layers": "0-3"}, "are 4 of the parent's 6 layers, but model.num_layers=3"),
        ({"kind": "stack", "layers": "0-1"}, "no multiple of that"),
        ({"kind": "inherits"}, r"did you mean 'inherit'\?"),
        ({"fresh": "norms"}, "init.fresh='norms' is not known"),
        ({"fresh": "positions"}, "init.fresh='positions': the model has no positions of its own"),
        ({"kind": "copy", "fresh": "head"}, "not 'copy'"),
        ({"kind": "copy", "layers": "0-2"}, "not 'copy'"),
        ({"mlp_dim": 64}, "mlp_dim is 64, the parent's 128"),
        ({"num_layers": 8}, "are 6 of the parent's 6 layers, but model.num_layers=8"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    parent = PARENTS["pythia-70m"]
    fields = {"kind": "inherit", "layers": "", "fresh": ""} | {k: v for k, v in changes.items() if k in FIELDS}
    sizes = {k: v for k, v in changes.items() if k not in FIELDS}
    child = dataclasses.replace(parent, **{"num_layers": 3} | sizes)
    with pytest.raises(UserError, match=message):
        start.check("parent", **fields)
        start.KINDS[fields.pop("kind")](**fields, parent=parent, child=child)


def test_ranges_are_read_back():
    for layers in ((0, 1, 2), (0, 2, 3, 5), (7,)):
        assert inherit.parse_layers(ranges.write(layers), 8, "layers") == layers
