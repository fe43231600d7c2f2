"""A model that is cut out of another one computes what masks over the parent leave of it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import LayerSizes, format_sizes
from lmboost.surgery import subnet
from lmboost.surgery.subnet import Cut, LayerCut
from tests import dense
from tests.compare import assert_same
from tests.surgery import masked
from tests.surgery.masked import LLAMA, PARENTS, SPACES

# The last space, which has the others in it, for every parent; all of them for one parent of each family.
CASES = [(name, SPACES[-1]) for name in PARENTS] + [("llama", space) for space in SPACES[:-1]]
CASES += [
    pytest.param(name, space, marks=pytest.mark.slow)
    for name in ("gpt2", "opt", "pythia", "qwen3", "olmo2")
    for space in SPACES[:-1]
]
parents = pytest.mark.parametrize("name", PARENTS)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
    return dense.forward(config, params, batch)[0]


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@parents
def test_masks_that_keep_everything_leave_the_parent(name):
    parent, params, batch = PARENTS[name], masked.random_params(PARENTS[name]), masked.random_batch(PARENTS[name])
    expected = masked.logits(parent, params, masked.whole(parent), **batch)
    assert np.abs(expected).max() > 1
    close(forward(parent, params, batch), expected)


@pytest.mark.parametrize(("name", "space"), CASES)
def test_the_child_computes_what_the_masks_leave(name, space):
    """And its parameters are those of its config, which is a plain one where the cut is uniform."""
    parent, params, batch = PARENTS[name], masked.random_params(PARENTS[name]), masked.random_batch(PARENTS[name])
    cut = masked.random_cut(parent, space, seed=list(PARENTS).index(name))
    child = subnet.child_config(parent, cut).validate()

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # every case is compiled anew
    def run(params):
        own = subnet.extract(parent, params, cut)
        return own, forward(child, own, batch)

    own, got = run(params)
    assert shapes(own) == shapes(jax.eval_shape(lambda: transformer.init(child, jax.random.key(0))))
    assert child.layer_sizes == "" or space.endswith("layerwise")
    assert np.abs(got).max() > 0.1
    close(got, masked.logits(parent, params, cut, **batch))


def test_a_layerwise_cut_of_equal_sizes_is_a_plain_config():
    cut = masked.random_cut(LLAMA, "fine layerwise", seed=3)
    layer = cut.layers[0]
    equal = cut._replace(layers=(layer, layer._replace(layer=3, units=tuple(39 - u for u in reversed(layer.units)))))
    assert subnet.child_config(LLAMA, equal).layer_sizes == ""


@parents
def test_the_whole_cut_is_the_parent_bitwise(name):
    parent, params = PARENTS[name], masked.random_params(PARENTS[name])
    assert subnet.whole(parent) == masked.whole(parent)
    assert subnet.child_config(parent, masked.whole(parent)) == parent
    assert_same(subnet.extract(parent, params, masked.whole(parent)), params)


@pytest.mark.parametrize("name", ["gpt2", "olmo2"])
def test_a_cut_of_a_cut_is_a_cut(name):
    """Bitwise: what is kept is copied and nothing is rescaled."""
    parent, params = PARENTS[name], masked.random_params(PARENTS[name])
    first = masked.random_cut(parent, "fine uniform", seed=5)
    child = subnet.child_config(parent, first)
    second = masked.random_cut(child, "fine layerwise", seed=6)

    def both(a, b):
        kept = [a.heads[g] for g in b.groups]
        return a._replace(
            groups=tuple(a.groups[g] for g in b.groups),
            heads=tuple(tuple(old[h] for h in new) for old, new in zip(kept, b.heads, strict=True)),
            features=tuple(a.features[n] for n in b.features),
            units=tuple(a.units[f] for f in b.units),
        )

    at_once = Cut(
        tuple(first.width[d] for d in second.width), tuple(both(first.layers[x.layer], x) for x in second.layers)
    )
    assert subnet.child_config(child, second) == subnet.child_config(parent, at_once)

    @jax.jit
    def run(params):
        twice = subnet.extract(child, subnet.extract(parent, params, first), second)
        return twice, subnet.extract(parent, params, at_once)

    assert_same(*run(params))


def test_a_bfloat16_parent_has_a_bfloat16_child():
    params = jax.tree.map(lambda x: x.astype("bfloat16"), masked.random_params(LLAMA))
    got = subnet.extract(LLAMA, params, masked.random_cut(LLAMA, "fine layerwise", seed=0))
    assert {x.dtype.name for x in jax.tree.leaves(got)} == {"bfloat16"}


def test_a_cut_of_one_entry_of_everything():
    parent, params, batch = PARENTS["opt"], masked.random_params(PARENTS["opt"]), masked.random_batch(PARENTS["opt"])
    cut = Cut((5,), (LayerCut(2, (1,), ((0,),), (3,), (7,)),))
    got = forward(subnet.child_config(parent, cut), subnet.extract(parent, params, cut), batch)
    close(got, masked.logits(parent, params, cut, **batch))


# The first entries


CHILD = dataclasses.replace(LLAMA, num_layers=2, d_model=10, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=7)
UNEQUAL = dataclasses.replace(
    LLAMA, num_layers=3, d_model=10, num_heads=6, num_kv_heads=3, head_dim=8, mlp_dim=7, layer_sizes="2*6/3/2/7,1/1/8/5"
)


def test_the_first_entries_of_equal_layers():
    cut = subnet.first_entries(LLAMA, CHILD, (1, 3))
    assert cut.width == tuple(range(10)) and [layer.layer for layer in cut.layers] == [1, 3]
    for layer in cut.layers:
        assert layer[1:] == ((0, 1), ((0, 1), (0, 1)), tuple(range(6)), tuple(range(7)))


def test_the_first_entries_of_layers_with_sizes_of_their_own():
    cut = subnet.first_entries(LLAMA, UNEQUAL, (0, 1, 3))
    equal = ((0, 1, 2), ((0, 1),) * 3, (0, 1), tuple(range(7)))
    assert [layer[1:] for layer in cut.layers] == [equal, equal, ((0,), ((0,),), tuple(range(8)), tuple(range(5)))]
    assert [layer.layer for layer in cut.layers] == [0, 1, 3]


@pytest.mark.parametrize("space", ["coarse uniform", "coarse layerwise"])
@parents
def test_a_coarse_cut_is_the_first_entries_of_its_config(name, space):
    for seed in range(4):
        cut = masked.random_cut(PARENTS[name], space, seed)
        child = subnet.child_config(PARENTS[name], cut)
        assert subnet.first_entries(PARENTS[name], child, tuple(layer.layer for layer in cut.layers)) == cut


# What is refused


CUT = masked.whole(LLAMA)


def with_layer(**changes):
    return CUT._replace(layers=(CUT.layers[0], CUT.layers[1]._replace(**changes)))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (CUT._replace(width=(0, 2, 1)), r"width=\(0, 2, 1\).* 0 to 23, each once, in ascending order"),
        (CUT._replace(width=(0, 1, 1)), r"width=\(0, 1, 1\).*each once"),
        (CUT._replace(width=(-1, 1)), r"width=\(-1, 1\).* 0 to 23"),
        (CUT._replace(width=()), r"width=\(\)"),
        (CUT._replace(width=(0, 24)), r"width=\(0, 24\).* 0 to 23"),
        (CUT._replace(layers=()), "layers=.* 0 to 3"),
        (CUT._replace(layers=CUT.layers[::-1]), "layers=.*3, 2, 1, 0.*ascending"),
        (CUT._replace(layers=CUT.layers[:1] * 2), "layers=.*0, 0.*each once"),
        (CUT._replace(layers=(CUT.layers[0], CUT.layers[1]._replace(layer=4))), "layers=.*0, 4.* 0 to 3"),
        (with_layer(features=(1, 0)), r"layer 1.*features=\(1, 0\).* 0 to 7"),
        (with_layer(features=()), r"layer 1.*features=\(\)"),
        (with_layer(units=(3, 3)), r"layer 1.*units=\(3, 3\).* 0 to 39"),
        (with_layer(units=(40,)), r"layer 1.*units=\(40,\).* 0 to 39"),
        (with_layer(groups=(0, 2, 1)), r"layer 1.*groups=\(0, 2, 1\).* 0 to 2"),
        (with_layer(heads=((0, 1), (2, 1), (0, 1))), r"layer 1.*heads=\(2, 1\).* 0 to 2"),
        (with_layer(heads=((0, 1), (0, 3), (0, 1))), r"layer 1.*heads=\(0, 3\).* 0 to 2"),
        (with_layer(heads=((0, 1), (0,), (0, 1))), r"layer 1.*\[2, 1, 2\].*equally many"),
        (with_layer(groups=(0, 1)), "layer 1.*of 2 key/value heads"),
    ],
)
def test_a_cut_that_the_parent_does_not_allow(cut, message):
    for refuse in (subnet.child_config, lambda parent, cut: subnet.extract(parent, masked.random_params(LLAMA), cut)):
        with pytest.raises(UserError, match=message):
            refuse(LLAMA, cut)


@pytest.mark.parametrize(
    ("changes", "layers", "message"),
    [
        ({"num_layers": 5}, (0, 1, 2, 3, 4), "num_layers=5.*parent has 4"),
        ({"d_model": 25}, (0, 1), "d_model=25.*parent has 24"),
        ({"num_kv_heads": 4}, (0, 1), "num_kv_heads=4.*parent has 3"),
        ({"head_dim": 9}, (0, 1), "head_dim=9.*parent has 8"),
        ({"mlp_dim": 41}, (0, 1), "mlp_dim=41.*parent has 40"),
        ({"num_heads": 8}, (0, 1), "num_heads=8.*num_kv_heads=2 is 4 query heads.*has 3"),
        ({"num_heads": 5}, (0, 1), "num_heads=5.*not a multiple of.*num_kv_heads=2"),
        ({}, (1, 0), "layers=.*1, 0.*ascending"),
        ({}, (1, 1), "layers=.*1, 1.*each once"),
        ({}, (1, 4), "layers=.*1, 4.* 0 to 3"),
        ({}, (0, 1, 2), "layers"),
        ({"layer_sizes": "4/2/6/7,8/2/6/7", "num_heads": 8}, (0, 1), "8.*2.* 4 query heads"),
    ],
)
def test_first_entries_that_there_are_not(changes, layers, message):
    with pytest.raises(UserError, match=message):
        subnet.first_entries(LLAMA, dataclasses.replace(CHILD, **changes), layers)


def test_a_parent_of_unequal_layers_is_refused():
    cut = subnet.first_entries(LLAMA, UNEQUAL, (0, 1, 3))
    unequal = subnet.child_config(LLAMA, cut)
    assert unequal.layer_sizes == format_sizes([LayerSizes(6, 3, 2, 7)] * 2 + [LayerSizes(1, 1, 8, 5)])
    with pytest.raises(UserError, match="unequal sizes.*layer_sizes='2\\*6/3/2/7,1/1/8/5'"):
        subnet.child_config(unequal, cut)
