"""A cut computed in a hull, a model of fixed sizes, has the logits of the model that is cut out."""

import dataclasses

import jax
import numpy as np
import pytest

from lmboost.errors import UserError
from lmboost.surgery import subnet, view
from tests import dense
from tests.surgery import masked
from tests.surgery.masked import GPT2, LLAMA, PARENTS, SPACES

# A LayerNorm takes off the mean of the features, which zeros between them change unless every reader is one.
SEARCHED = [name for name in PARENTS if name != "opt without biases"]


def head_sizes(hull):
    """Those from a quarter of the hull's on that can be put into it: rotated features where theirs turn as fast."""
    rotated = {n: int(n * hull.rope_fraction) // 2 * 2 for n in range(1, hull.head_dim + 1)}
    room = rotated[hull.head_dim]
    return [
        n
        for n, r in rotated.items()
        if 4 * n >= hull.head_dim
        and (hull.position == "learned" or (r and room % r == 0 and n - r <= hull.head_dim - room))
    ]


def cuts_of(parent, hull, count=2):
    return [masked.random_cut(parent, space, seed, head_sizes(hull)) for space in SPACES for seed in range(count)]


def sizes_of(config):
    return {
        "num_layers": config.num_layers, "d_model": config.d_model, "num_kv_heads": config.num_kv_heads,
        "group_heads": config.num_heads // config.num_kv_heads, "head_dim": config.head_dim, "mlp_dim": config.mlp_dim,
    }  # fmt: skip


def tight(parent, cuts):
    """The sizes of the smallest hull of all cuts."""
    children = [subnet.child_config(parent, cut) for cut in cuts]
    sizes = {name: max(sizes_of(c)[name] for c in children) for name in sizes_of(parent)}
    return sizes | {"group_heads": max(len(layer.heads[0]) for cut in cuts for layer in cut.layers)}


def in_hull(parent, hull, batch):
    """Logits as a function of the parent's parameters and a view."""
    hull.validate()
    return lambda params, one: dense.forward(hull, view.apply(parent, params, hull, one), batch)[0]


def close(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def check(parent, hull, cuts):
    params, batch = masked.random_params(parent), masked.random_batch(parent)
    run = jax.jit(in_hull(parent, hull, batch))
    for cut in cuts:
        expected = masked.logits(parent, params, cut, **batch)
        assert np.abs(expected).max() > 0.1
        close(run(params, view.place(parent, hull, cut)), expected)
    assert run._cache_size() == 1, "one compiled function serves all cuts"


@pytest.mark.parametrize("name", SEARCHED)
def test_every_cut_is_computed_by_one_function(name):
    parent = PARENTS[name]
    cuts = cuts_of(parent, parent)
    check(parent, view.hull_config(parent, tight(parent, cuts) | {"head_dim": parent.head_dim}), cuts)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "qwen3", "olmo2"])
def test_the_hull_may_be_larger_than_the_parent(name):
    parent = PARENTS[name]
    sizes = {"num_layers": 6, "d_model": 31, "num_kv_heads": 5, "group_heads": 4, "head_dim": 64, "mlp_dim": 50}
    check(parent, view.hull_config(parent, sizes), [masked.whole(parent), *cuts_of(parent, parent, count=1)])


@pytest.mark.parametrize("name", ["gpt2", "pythia", "llama", "olmo2"])
def test_views_are_stacked_and_mapped_over(name):
    parent, params, batch = PARENTS[name], masked.random_params(PARENTS[name]), masked.random_batch(PARENTS[name])
    hull, cuts = view.hull_config(parent, sizes_of(parent)), cuts_of(parent, parent, count=1)
    views = jax.tree.map(lambda *xs: np.stack(xs), *(view.place(parent, hull, cut) for cut in cuts))
    assert {x.dtype.name for x in jax.tree.leaves(views)} == {"int32", "float32"}
    got = jax.jit(jax.vmap(in_hull(parent, hull, batch), in_axes=(None, 0)))(params, views)
    for one, cut in zip(got, cuts, strict=True):
        close(one, masked.logits(parent, params, cut, **batch))


# What is refused


CUT = masked.whole(LLAMA)
HULL = view.hull_config(LLAMA, sizes_of(LLAMA))


@pytest.mark.parametrize(
    ("smaller", "message"),
    [
        ({"num_layers": 3}, "4 layers.*num_layers=3"),
        ({"d_model": 23}, "24.*d_model=23"),
        ({"num_kv_heads": 2}, "3.*num_kv_heads=2"),
        ({"group_heads": 2}, "3 query heads.*2"),
        ({"head_dim": 4}, "head_dim=8.*head_dim=4"),
        ({"mlp_dim": 39}, "40.*mlp_dim=39"),
    ],
)
def test_a_cut_that_is_larger_than_its_hull(smaller, message):
    with pytest.raises(UserError, match=message):
        view.place(LLAMA, view.hull_config(LLAMA, sizes_of(LLAMA) | smaller), CUT)


@pytest.mark.parametrize("features", [3, 5, 6, 7])
def test_heads_whose_frequencies_the_hull_does_not_have(features):
    """Of 8: 6 do not divide it; 3, 5 and 7 leave one feature that is not rotated, and the hull has no room for it."""
    layer = CUT.layers[0]._replace(features=tuple(range(features)))
    with pytest.raises(UserError, match=f"head_dim={features}.*head_dim=8"):
        view.place(LLAMA, HULL, CUT._replace(layers=(layer,)))


def test_a_head_that_is_larger_than_the_hulls_with_learned_positions():
    with pytest.raises(UserError, match="8.*head_dim=7"):
        view.place(GPT2, view.hull_config(GPT2, sizes_of(GPT2) | {"head_dim": 7}), masked.whole(GPT2))


def test_a_cut_out_of_order():
    with pytest.raises(UserError, match=r"width=\(1, 0\)"):
        view.place(LLAMA, HULL, CUT._replace(width=(1, 0)))


@pytest.mark.parametrize("changes", [{"final_norm": False}, {"norm_placement": "post"}])
def test_a_residual_stream_that_is_read_without_a_layernorm(changes):
    with pytest.raises(UserError, match="norm='layernorm'.*read without a LayerNorm"):
        view.hull_config(dataclasses.replace(GPT2, **changes), sizes_of(GPT2))
