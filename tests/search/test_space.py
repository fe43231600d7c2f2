"""Which cuts a search draws: those of its space, with as many parameters as were asked for."""

import dataclasses
import functools
import itertools
import json
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost import config
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import LayerSizes, ModelConfig
from lmboost.models.presets import preset, tiny
from lmboost.search import space as spaces
from lmboost.search.notation import from_json, parse_choices, parse_params, to_json
from lmboost.search.space import Orders, Space
from lmboost.surgery import subnet
from lmboost.surgery.subnet import Cut, LayerCut
from tests.search.promises import ROW, check_cut

MHA = tiny(preset("pythia-70m"), 6)
GQA = tiny(preset("smollm2-135m"), 6)
QWEN3 = dataclasses.replace(GQA, qk_norm="head", qkv_bias=True, tie_embeddings=True)
PARENTS = {"mha": MHA, "gqa": GQA, "qwen3": QWEN3, "gpt2": tiny(preset("gpt2"), 6)}
WIDE = {"layers": "2-6", "d_model": "24-64:8", "head_dim": "8,16", "mlp_dim": "16-128:16", "params": "60K-75K"}
SPACES = list(itertools.product(("coarse", "fine"), ("uniform", "layerwise"), ("any", "first")))


def space_of(parent, orders=None, **changes) -> Space:
    search = config.base().search
    for name, value in changes.items():
        search[name] = value
    return Space.from_config(search, parent, orders or Orders.natural(parent))


def wide(parent, granularity, scope, layer_choice, orders=None) -> Space:
    heads = {"num_kv_heads": "1-4"} if parent.num_kv_heads == 4 else {"num_kv_heads": "1-2", "group_heads": "1-2"}
    words = {"granularity": granularity, "scope": scope, "layer_choice": layer_choice}
    return space_of(parent, orders, **WIDE, **heads, **words)


def shuffled(parent, seed) -> Orders:
    rng = np.random.default_rng(seed)
    layers, groups = parent.num_layers, parent.num_kv_heads

    def order(size):
        return tuple(rng.permutation(size).tolist())

    return Orders(
        order(parent.d_model),
        order(layers),
        tuple(order(groups) for _ in range(layers)),
        tuple(tuple(order(parent.num_heads // groups) for _ in range(groups)) for _ in range(layers)),
        tuple(order(parent.head_dim) for _ in range(layers)),
        tuple(order(parent.mlp_dim) for _ in range(layers)),
    )


def walk(space, seed, steps=6):
    """Cuts from each of the three operators."""
    rng = np.random.default_rng(seed)
    a, b = space.sample(rng), space.sample(rng)
    cuts = [a, b]
    for _ in range(steps):
        a, b = space.crossover(rng, a, b), space.mutate(rng, b, 0.3)
        cuts += [a, b]
    return cuts


# How choices and bins are written.


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 300), st.integers(1, 70)), min_size=1, max_size=4))
def test_choices_are_the_union_of_their_ranges(parts):
    text = ", ".join(f"{first}-{first + more}:{step}" for first, more, step in parts)
    expected = {n for first, more, step in parts for n in range(first, first + more + 1, step)}
    assert parse_choices(text, "search.x", 7) == tuple(sorted(expected))


@given(st.text("0123456789-:, ", max_size=12))
def test_choices_are_ascending_sizes_or_an_error(text):
    try:
        choices = parse_choices(text, "search.x", 7)
    except UserError as error:
        assert "search.x=" in str(error)
    else:
        assert choices[0] > 0 and list(choices) == sorted(set(choices))


def test_choices():
    assert parse_choices("64-512:64,768", "f", 1) == (*range(64, 513, 64), 768)
    assert (parse_choices("3-5", "f", 1), parse_choices("", "f", 9), parse_choices("8", "f", 1)) == (
        (3, 4, 5),
        (9,),
        (8,),
    )
    for text in ("0", "0-4", "5-3", "1-5:0", "a", "1,,2", ",", "64-", "-4", "1:2", "1.5", "4-8:2:2", "1000000", "٣"):
        with pytest.raises(UserError, match=re.escape(f"f={text!r}")):
            parse_choices(text, "f", 1)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from("KMB"))
def test_bins_are_exact(a, b, suffix):
    unit = {"K": 10**3, "M": 10**6, "B": 10**9}[suffix]
    low, high = sorted((a, b))
    assert parse_params(f"{low}{suffix}-{high}{suffix}") == (low * unit, high * unit)
    assert parse_params(f"{low / 1000:.3f}{suffix} - {high / 1000:.3f}{suffix}") == (
        low * unit // 1000,
        high * unit // 1000,
    )


def test_bins():
    assert parse_params("385.1M-425.6M") == (385_100_000, 425_600_000)
    assert parse_params("405M+-5%") == (384_750_000, 425_250_000)
    assert (parse_params("7-7"), parse_params("1K+-0.05%"), parse_params("0.9B-1000M"))[1:] == (
        (1000, 1000),
        (900_000_000, 1_000_000_000),
    )
    for text in ("", "405M", "425M-385M", "405M+-", "405M+-100%", "4e8-5e8", "1.2-1.8", "385m-425m", "-5-5", "x"):
        with pytest.raises(UserError, match=re.escape(f"search.params={text!r}") + ".*Give a bin"):
            parse_params(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"granularity": "corse"}, "search.granularity='corse'.*did you mean 'coarse'"),
        ({"scope": "layer"}, "search.scope='layer'"),
        ({"layer_choice": "last"}, "search.layer_choice='last'"),
        ({"sort": "size"}, "search.sort='size'"),
        ({"sort": "activation", "granularity": "fine"}, "search.sort='activation'.*set search.sort='none'"),
        ({"layers": "2-7"}, "search.layers='2-7': 7 is more than the 6 "),
        ({"num_kv_heads": "4"}, "search.num_kv_heads='4': 4 is more than the 2 "),
        ({"group_heads": "1-3"}, "search.group_heads='1-3': 3 is more than the 2 "),
        ({"d_model": "64,128"}, "search.d_model='64,128': 128 is more than the 64 "),
        ({"mlp_dim": "none"}, "search.mlp_dim='none'"),
        ({"head_dim": "4-16:4"}, "search.head_dim='4-16:4': of a head of 12, 12 .* out of 2,4,8,16"),
        ({"head_dim": "1,16"}, "of a head of 1, 0 features are rotated"),
        ({"params": ""}, "search.params='' is empty. Give a bin"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        space_of(GQA, **{"params": "60K-75K"} | changes)


def test_parents_of_unequal_layers_are_refused():
    parent = dataclasses.replace(GQA, layer_sizes="3*4/2/16/128,3*2/2/16/64")
    with pytest.raises(UserError, match="init.path is a model of unequal layers"):
        space_of(parent, params="60K-75K")


def test_rotated_parts():
    # A quarter is rotated: of 64 features 16, so 8 of 32 and 8 of 39 are some of their frequencies, 10 of 40 are not.
    parent = dataclasses.replace(MHA, head_dim=64)
    assert space_of(parent, head_dim="8,16,32,39,64", params="1-9M").head_dim == (8, 16, 32, 39, 64)
    for wrong in (7, 40, 60):
        with pytest.raises(UserError, match=f"of a head of {wrong}, .* out of 8-23,32-39,64"):
            space_of(parent, head_dim=f"8,{wrong},64", params="1-9M")
    with pytest.raises(UserError, match="of a head of 3, 2 features are rotated and 1 not"):
        space_of(GQA, head_dim="3,16", params="1-9M")  # all 16 are rotated: there is no place for the third
    unrotated = dataclasses.replace(MHA, rope_fraction=0.0)
    assert space_of(unrotated, head_dim="3,16", params="1-9M").head_dim == (3, 16)
    learned = dataclasses.replace(MHA, position="learned")
    assert space_of(learned, head_dim="1,3,16", params="1-9M").head_dim == (1, 3, 16)


# What is drawn.


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS.keys())
@pytest.mark.parametrize("words", SPACES, ids=map("-".join, SPACES))
def test_operators_stay_in_the_space_and_in_the_bin(words, parent):
    for seed in range(3):
        space = wide(parent, *words, orders=shuffled(parent, seed) if words[0] == "coarse" else None)
        for cut in walk(space, seed):
            check_cut(space, cut)
            assert space.num_params(cut) == subnet.child_config(space.parent, cut).num_params()


@pytest.mark.parametrize("words", SPACES, ids=map("-".join, SPACES))
def test_a_mutation_changes_something_and_draws_are_diverse(words):
    space, rng = wide(GQA, *words), np.random.default_rng(1)
    cuts = [space.sample(rng) for _ in range(60)]
    assert all(space.mutate(rng, cut, 0.0) != cut for cut in cuts)
    assert {len(cut.layers) for cut in cuts} == {2, 3, 4, 5, 6} and len({len(cut.width) for cut in cuts}) >= 4
    parts = [part for cut in cuts for part in cut.layers]
    rows = [(len(part.groups), len(part.heads[0]), len(part.features), len(part.units)) for part in parts]
    assert all(len(set(sizes)) > 1 for sizes in zip(*rows, strict=True)) and len(set(cuts)) > 40


def test_children_have_parts_of_both_parents():
    space, rng = wide(GQA, "fine", "layerwise", "any"), np.random.default_rng(0)
    space = dataclasses.replace(space, low=0, high=10**9)  # nothing is stepped
    mixed = 0
    for _ in range(20):
        a, b = space.sample(rng), space.sample(rng)
        child = space.crossover(rng, a, b)
        have = [{part.layer: part for part in cut.layers} for cut in (a, b)]
        assert child.width in (a.width, b.width) and len(child.layers) in (len(a.layers), len(b.layers))
        assert set(have[0]) & set(have[1]) <= {part.layer for part in child.layers} <= set(have[0]) | set(have[1])
        for part in child.layers:
            found = [own[part.layer] for own in have if part.layer in own]
            assert (part.groups, part.heads) in [(f.groups, f.heads) for f in found]
            assert part.features in [f.features for f in found] and part.units in [f.units for f in found]
            mixed += part not in found
    assert mixed > 0


def test_coarse_takes_the_most_important():
    orders = shuffled(GQA, 3)
    space = space_of(GQA, orders, params="1-1M", layers="2", d_model="8", num_kv_heads="1", head_dim="4", mlp_dim="16",
                     group_heads="1", layer_choice="first")  # fmt: skip
    cut = space.sample(np.random.default_rng(0))
    assert cut.width == tuple(sorted(orders.width[:8]))
    assert [part.layer for part in cut.layers] == sorted(orders.layers[:2])
    for part in cut.layers:
        group = orders.groups[part.layer][0]
        assert part.groups == (group,) and part.heads == ((orders.heads[part.layer][group][0],),)
        assert part.features == tuple(sorted(orders.features[part.layer][:4]))
        assert part.units == tuple(sorted(orders.units[part.layer][:16]))


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS.keys())
def test_parameters_are_those_of_the_initialised_model(parent):
    for words in (("coarse", "uniform", "any"), ("fine", "layerwise", "any")):
        space = wide(parent, *words)
        cut = space.sample(np.random.default_rng(5))
        shapes = jax.eval_shape(
            functools.partial(transformer.init, subnet.child_config(space.parent, cut)), jax.random.key(0)
        )
        assert space.num_params(cut) == sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


# Bins with little or nothing in them.

SMALL = {"layers": "1,3", "d_model": "24,40", "num_kv_heads": "1-2", "group_heads": "1-2", "head_dim": "8,16",
         "mlp_dim": "16,48,72"}  # fmt: skip


def reachable(space) -> list[int]:
    """All numbers of parameters, one model after the other."""
    rows = [LayerSizes(k * g, k, n, f) for k, g, n, f in itertools.product(*(getattr(space, name) for name in ROW))]
    totals = set()
    for depth, d in itertools.product(space.layers, space.d_model):
        model = dataclasses.replace(space.parent, num_layers=depth, d_model=d)
        each = {model.layer_params(row) for row in rows}
        base = model.num_params() - depth * model.layer_params(model.sizes[0])
        layers = [(one,) * depth for one in each]
        if space.scope == "layerwise":
            layers = itertools.combinations_with_replacement(each, depth)
        totals |= {base + sum(own) for own in layers}
    return sorted(totals)


@pytest.mark.parametrize("scope", ["uniform", "layerwise"])
@pytest.mark.parametrize("parent", [GQA, QWEN3], ids=["gqa", "qwen3"])
def test_an_empty_bin_names_the_nearest_sizes(parent, scope):
    space = space_of(parent, params="1-1", scope=scope, **SMALL)
    totals = reachable(space)
    gaps = [(a, b) for a, b in itertools.pairwise([1, *totals, totals[-1] + 10**6]) if b - a > 1]
    for a, b in [gaps[0], gaps[-1], *gaps[1 : -1 : max(len(gaps) // 8, 1)]]:
        empty = dataclasses.replace(space, low=a + 1, high=b - 1)
        with pytest.raises(UserError, match="no model of this search has so many parameters") as error:
            empty.sample(np.random.default_rng(0))
        below = f"the largest below has {a}" if a >= totals[0] else "none is below"
        above = f"the smallest above has {b}" if b <= totals[-1] else "none is above"
        assert f"search.params={a + 1}-{b - 1}" in str(error.value) and f"{below}, {above}." in str(error.value)


@pytest.mark.parametrize("granularity, scope, _", SPACES[::2])
def test_every_size_that_there_is_is_found(granularity, scope, _, monkeypatch):
    space = space_of(QWEN3, params="1-1", scope=scope, granularity=granularity, **SMALL)
    totals = reachable(space)
    for tries, some in ((0, totals[:: max(len(totals) // 60, 1)]), (spaces.TRIES, totals[:: max(len(totals) // 6, 1)])):
        monkeypatch.setattr(spaces, "TRIES", tries)  # 0: nothing but looking through all sizes
        for total in some:
            one = dataclasses.replace(space, low=total, high=total)
            cut = one.sample(np.random.default_rng(0))
            check_cut(one, cut)
            again = one.crossover(np.random.default_rng(1), cut, one.mutate(np.random.default_rng(0), cut, 0.5))
            assert subnet.child_config(space.parent, again).num_params() == total


def test_looking_through_a_large_space_is_quick_and_diverse(monkeypatch):
    parent = preset("pythia-1b")
    space = space_of(parent, params="300M+-1%", layers="4-16", d_model="256-2048:256", num_kv_heads="1-8",
                     head_dim="64,128,256", mlp_dim="256-8192:256")  # fmt: skip
    monkeypatch.setattr(spaces, "TRIES", 0)
    rng = np.random.default_rng(0)
    cuts = [space.sample(rng) for _ in range(4)]
    for cut in cuts:
        check_cut(space, cut)
    assert len(set(map(space.num_params, cuts))) == 4


def test_a_search_too_large_to_look_through_says_so(monkeypatch):
    parent = ModelConfig(num_layers=48, d_model=8192, num_heads=64, num_kv_heads=8, mlp_dim=30000, qkv_bias=True)
    monkeypatch.setattr(spaces, "TRIES", 0)
    space = space_of(parent, params="20B-20.0001B", num_kv_heads="1-8", group_heads="1-8", head_dim="2,4,8,16,32,64",
                     mlp_dim="1-30000:7")  # fmt: skip
    with pytest.raises(UserError, match="search.params.*too many sizes to look through. Widen the bin"):
        space.sample(np.random.default_rng(0))


def test_a_space_of_one_cut():
    space = space_of(GQA, params="1-1M")
    cut = space.sample(np.random.default_rng(0))
    assert subnet.child_config(space.parent, cut) == GQA
    assert (
        space.mutate(np.random.default_rng(1), cut, 0.5) == cut == space.crossover(np.random.default_rng(2), cut, cut)
    )


# Cuts in files.


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SPACES))
def test_a_cut_comes_back_from_json(seed, words):
    cut = wide(GQA, *words).sample(np.random.default_rng(seed))
    assert from_json(json.loads(json.dumps(to_json(cut)))) == cut


def test_json_is_readable_and_checked():
    cut = Cut((0, 1, 2, 5), (LayerCut(3, (0, 2), ((0, 1), (1, 3)), (0, 4), (7,)),))
    layer = {"layer": 3, "groups": "0,2", "heads": "0-1;1,3", "features": "0,4", "units": "7"}
    assert to_json(cut) == {"width": "0-2,5", "layers": [layer]}
    for value, message in (
        ([], "a cut is an object"),
        ({"width": "0-2", "layers": "0"}, "a cut is an object"),
        ({"layers": [layer]}, "the cut has width=None"),
        ({"width": "0-2", "layers": [layer | {"layer": "3"}]}, r"layers\[0\] of a cut has no 'layer'"),
        ({"width": "0-2", "layers": [layer | {"units": 7}]}, r"layers\[0\] has units=7"),
        ({"width": "0-2", "layers": [layer | {"units": "7,3"}]}, r"layers\[0\].units='7,3'"),
        ({"width": "2-0", "layers": [layer]}, "width='2-0'"),
        ({"width": "", "layers": [layer]}, "width=''"),
    ):
        with pytest.raises(UserError, match=message):
            from_json(value)
