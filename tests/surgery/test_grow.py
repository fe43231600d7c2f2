"""Models that become deeper: what the child computes, and what became of the moments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import config, optimizers
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.surgery import grow, inherit
from tests.compare import assert_same
from tests.surgery.test_inherit import PARENTS, params_of, parents, states


def deeper(parent, layers):
    return inherit.of_layers(parent, layers)


def grown(kind, parent, child):
    growth = grow.plan(kind, parent, child)
    return growth, jax.jit(growth)(params_of(parent, 0), params_of(child, 1))


def layers_of(config, params):
    return [transformer.one_layer(config, params, layer)[1] for layer in range(config.num_layers)]


@pytest.mark.parametrize("kind", ["zero", "identity"])
@parents
def test_what_adds_nothing_computes_what_the_parent_does(parent, kind):
    child = deeper(parent, [0, 1, 2, 2, 3, 4, 5, 5])
    _, params = grown(kind, parent, child)
    ours, theirs = ((m, p, states(m, p)[0]) for m, p in ((child, params), (parent, params_of(parent, 0))))
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-5, atol=1e-5)
    logits = [h @ transformer.head(p) for _, p, h in (ours, theirs)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", grow.GROWTHS)
@pytest.mark.parametrize("parent", [PARENTS["gpt2"], PARENTS["unequal"]], ids=["equal", "unequal"])
def test_layers_of_the_parent_stay_among_new_ones(parent, kind):
    order = list(range(6)) * 2 if kind == "stack" else [i for i in range(6) for _ in range(2)]
    child = deeper(parent, order)
    growth, params = grown(kind, parent, child)
    old, random = layers_of(parent, params_of(parent, 0)), layers_of(child, params_of(child, 1))
    assert growth.layers == tuple(order) and [order[i] for i in sorted(growth.kept)] == list(range(6))
    for i, layer in enumerate(layers_of(child, params)):
        if i in growth.kept or kind in ("stack", "interpose"):
            assert_same(layer, old[order[i]])
        elif kind == "random":
            assert_same(layer, random[i])
        else:  # like the other, but for what is zero
            like = old[order[i]] if kind == "zero" else random[i]
            jax.tree.map(
                lambda a, b: np.testing.assert_array_equal(a[a != 0], b[a != 0]), *jax.device_get((layer, like))
            )
            assert any((np.asarray(x) == 0).all() for x in jax.tree.leaves(layer))
    rest = {name: x for name, x in params.items() if name != "layers"}
    assert_same(rest, {name: params_of(parent, 0)[name] for name in rest})


@pytest.mark.parametrize("count, kept", [(7, [0, 1, 2, 3, 4, 5]), (9, [0, 1, 3, 4, 6, 7]), (12, [0, 2, 4, 6, 8, 10])])
def test_new_layers_are_spread_as_evenly_as_they_go(count, kept):
    parent = deeper(dataclasses.replace(transformer.ModelConfig(), num_layers=1), [0] * 6)
    growth = grow.plan("identity", parent, deeper(parent, [0] * count))
    assert sorted(growth.kept) == kept and sorted(growth.layers) == list(growth.layers)
    one = grow.plan("random", deeper(parent, [0]), deeper(parent, [0] * count))
    assert sorted(one.kept) == [0] and set(one.layers) == {0}


@pytest.mark.parametrize("name, kind", [("adamw", "stack"), ("muon", "zero"), ("lion", "random")])
def test_moments_of_what_was_there_are_kept_and_others_begin_at_zero(name, kind):
    parent = dataclasses.replace(
        transformer.ModelConfig(), num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=16,
        vocab_size=32,
    )  # fmt: skip
    child, c = dataclasses.replace(parent, num_layers=4), config.base().optimizer
    c.name, c.warmup_steps = name, 1
    growth, trees = grow.plan(kind, parent, child), {}
    for model in (parent, child):
        params = {"model": params_of(model, 0)}
        tx, _ = optimizers.make_optimizer(c, 10, params)
        trees[model] = params, tx, tx.init(params)
    params, tx, state = trees[parent]
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    new_params, new_tx, zeros = trees[child]
    moments = growth.state(state, zeros)
    assert jax.tree.structure(moments) == jax.tree.structure(zeros)
    old, new = dict(jax.tree_util.tree_leaves_with_path(state)), jax.tree_util.tree_leaves_with_path(moments)
    stacks = 0
    for keys, x in new:
        if x.shape == old[keys].shape:
            assert_same(x, old[keys])
            continue
        stacks += 1
        kept = sorted(growth.kept)
        assert_same(x[np.array(kept)], old[keys])
        assert not np.delete(np.asarray(x), kept, axis=0).any()
    assert stacks >= 9 * (2 if name == "adamw" else 1)
    new_tx.update(jax.tree.map(jnp.ones_like, new_params), moments, new_params)


@pytest.mark.parametrize("kind", ["identity", "random"])
@pytest.mark.parametrize("name", ["gpt2", "unequal"])
def test_a_model_grows_from_no_layer_at_all(name, kind):
    child = PARENTS[name]
    parent = dataclasses.replace(child, num_layers=0, layer_sizes="", layer_kinds="").validate()
    growth, params = grown(kind, parent, child)
    of_parent, random = params_of(parent, 0), params_of(child, 1)
    assert of_parent["layers"] == {} and params.keys() == random.keys()
    assert_same(
        {n: x for n, x in params.items() if n != "layers"}, {n: x for n, x in of_parent.items() if n != "layers"}
    )
    ours, theirs = states(child, params)[0], states(parent, of_parent)[0]
    if kind == "identity":
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert_same(params["layers"], random["layers"])
    zeros = jax.tree.map(jnp.zeros_like, random)
    assert_same(growth.moments(of_parent, zeros), {**of_parent, "layers": zeros["layers"]})


@pytest.mark.parametrize("kind", ["stack", "interpose", "zero"])
def test_there_is_nothing_to_copy_of_no_layer(kind):
    with pytest.raises(UserError, match=f"init.grow='{kind}' copies layers, and the parent has none: give 'identity'"):
        grow.plan(kind, dataclasses.replace(PARENTS["gpt2"], num_layers=0), PARENTS["gpt2"])
