"""Layers of several kinds: the decoder is what its layers make one after the other; a period of them is compiled."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import flops
from lmboost.config import base
from lmboost.errors import UserError
from lmboost.models import layer_kinds, transformer
from lmboost.models.block import Block
from lmboost.search import notation
from lmboost.surgery import importance, inherit, subnet, view
from tests.models.test_transformer import BASE, apply, batch, cached, close, params_of

MIXED = dataclasses.replace(
    BASE, num_layers=9, layer_kinds="2*window,full,nope", sliding_window=3, rope_local_theta=50.0, init_std=0.1
)
kinds_of_layers = st.lists(st.sampled_from(sorted(layer_kinds.KINDS)), min_size=1, max_size=40)


@hypothesis.given(kinds_of_layers)
def test_kinds_are_read_as_they_are_written(kinds):
    text = layer_kinds.write(kinds)
    assert layer_kinds.parse(text, len(kinds)) == tuple(kinds)
    assert layer_kinds.parse(text.replace(",", " , "), len(kinds)) == tuple(kinds)


@hypothesis.given(kinds_of_layers)
def test_periods_are_the_layers(kinds):
    found = layer_kinds.periods(kinds)
    assert [kind for period, times in found for _ in range(times) for kind in period] == kinds


@pytest.mark.parametrize(
    ("pattern", "layers", "found"),
    [
        ("full", 12, [(1, 12)]), ("window,full", 26, [(2, 13)]), ("window,full", 7, [(2, 3), (1, 1)]),
        ("5*window,full", 26, [(6, 4), (1, 2)]), ("3*full,nope", 36, [(4, 9)]),
        ("21*full,7*window", 28, [(1, 21), (1, 7)]),
    ],
)  # fmt: skip
def test_few_layers_are_compiled(pattern, layers, found):
    periods = layer_kinds.periods(layer_kinds.parse(pattern, layers))
    assert [(len(period), times) for period, times in periods] == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_kinds": "window,ful"}, r"model.layer_kinds='ful' is not known \(did you mean 'full'\?\)"),
        ({"layer_kinds": "0*full"}, r"model.layer_kinds='0\*full': '0\*full' is not of the form COUNT\*KIND"),
        ({"layer_kinds": "full,,nope"}, "'' is not of the form"),
        ({"layer_kinds": "window"}, "has layers with a window, but model.sliding_window=0: set it to the number"),
        ({"layer_kinds": "full,nope", "position": "learned"}, "layers without rotary positions, but model.position="),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **change).validate()


def layer_by_layer(config, params, tokens, segment_ids, positions):
    """The state after each layer."""
    x = params["embed"]["embedding"][tokens]
    states = []
    for layer in range(config.num_layers):
        own, weights = transformer.one_layer(config, params, layer)
        x, _ = Block(own, parent=None).apply({"params": weights}, x, segment_ids, positions, jnp.int32(layer))
        states.append(x)
    return states


def test_it_is_its_layers_one_after_the_other():
    """Nine layers: a period of four twice, and one more; with states taken out in the middle of a period."""
    params = params_of(MIXED)
    states = jax.jit(functools.partial(layer_by_layer, MIXED))(params, *batch())
    h, captured = apply(MIXED, params, *batch(), capture=(3, 9))
    close(captured[3], states[2])
    close(captured[9], states[8])
    plain, _ = apply(MIXED, params, *batch())
    close(plain, h)


def test_each_kind_is_what_it_says():
    """A window hides what is farther, without positions the order of earlier tokens does not matter."""
    one = dataclasses.replace(MIXED, num_layers=1)
    tokens, segment_ids, positions = batch()
    params = params_of(one)

    def last(kind, tokens):
        return apply(dataclasses.replace(one, layer_kinds=kind), params, tokens, segment_ids, positions)[0][:, -1]

    swapped = tokens.copy()
    swapped[:, [1, 9]] = tokens[:, [9, 1]]
    assert (tokens[:, 1] != tokens[:, 9]).all()
    for kind, moves in (("full", True), ("window", False), ("nope", False)):
        assert (np.abs(last(kind, tokens) - last(kind, swapped)).max() > 1e-4) == moves, kind
    other = np.where(np.arange(16) == 1, (tokens + 1) % 97, tokens)
    for kind, sees in (("full", True), ("window", False), ("nope", True)):
        assert (np.abs(last(kind, tokens) - last(kind, other)).max() > 1e-4) == sees, kind
    turned = dataclasses.replace(one, layer_kinds="", sliding_window=3, rope_theta=50.0, rope_local_theta=0.0)
    close(last("window", tokens), apply(turned, params, tokens, segment_ids, positions)[0][:, -1], 0)


def test_a_cache_gives_the_states_of_the_whole():
    whole, _ = apply(MIXED, params_of(MIXED), *batch())
    cache, parts = transformer.init_cache(MIXED, 2, 20), []
    tokens, segment_ids, positions = batch()
    slots = np.pad(segment_ids, ((0, 0), (0, 4)))
    for part in np.split(np.arange(16), [7, 14, 15]):
        h, cache = cached(MIXED, params_of(MIXED), tokens[:, part], slots, positions[:, part], cache)
        parts.append(h)
    close(whole, np.concatenate(parts, 1))


def test_flops_count_windows_where_layers_have_them():
    each = [dataclasses.replace(MIXED.of_kind(kind), num_layers=1) for kind in MIXED.kinds]
    expected = [flops.forward_flops(one, 32, vocabulary=False) for one in each]
    assert len(set(expected)) == 2
    assert flops.forward_flops(MIXED, 32, vocabulary=False) == pytest.approx(sum(expected))
    assert flops.forward_flops(MIXED, 32, 4, vocabulary=False) == pytest.approx(sum(expected[:4]))


@pytest.mark.slow
def test_importance_is_measured_layer_by_layer():
    params = params_of(MIXED)
    found = importance.sums(MIXED, params, *batch())
    states = [params["embed"]["embedding"][batch()[0]], *layer_by_layer(MIXED, params, *batch())]
    cosine = lambda a, b: (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)  # noqa: E731
    expected = [jnp.sum(1 - cosine(a, b)) for a, b in zip(states, states[1:], strict=False)]
    close(found["layers"], np.array(expected), 1e-4)


def test_a_cut_of_it_can_be_made_but_not_searched():
    cut = subnet.first_entries(MIXED, dataclasses.replace(MIXED, num_layers=3, mlp_dim=16), (1, 2, 3))
    assert subnet.child_config(MIXED, cut).kinds == ("window", "full", "nope")
    sizes = dict.fromkeys(("num_layers", "d_model", "num_kv_heads", "group_heads", "head_dim", "mlp_dim"), 2)
    with pytest.raises(UserError, match=r"layer_kinds='2\*window,full,nope' can't be searched"):
        view.hull_config(MIXED, sizes)
    with pytest.raises(UserError, match=r"layers of several kinds \(layer_kinds='2\*window,full,nope'\)"):
        notation.read_choices(base().search, MIXED)


def test_layers_that_are_inherited_keep_their_kinds():
    child = inherit.of_layers(MIXED, [0, 2, 3, 8])
    assert child.kinds == ("window", "full", "nope", "window") == tuple(MIXED.kinds[i] for i in (0, 2, 3, 8))
    taken = inherit.plan("0,2,3,8", "", MIXED, child)
    params = taken(params_of(MIXED), params_of(MIXED))
    x = apply(child, params, *batch(), capture=(1,))[1][1]
    close(x, layer_by_layer(MIXED, params_of(MIXED), *batch())[0])
    with pytest.raises(UserError, match="layer_kinds is 'window,full', the parent's 'window,full,nope'. Set model.lay"):
        inherit.plan("0,2,3,8", "", MIXED, dataclasses.replace(child, layer_kinds="window,full"))
