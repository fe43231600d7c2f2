"""What a search asks: new cuts of its space, the same ones when it is told the same again, and better ones."""

import itertools
import math

import numpy as np
import pytest

from lmboost import config
from lmboost.errors import UserError
from lmboost.models.presets import preset, tiny
from lmboost.search import evolution
from lmboost.search.space import Orders, Space
from tests.search.promises import check_cut

PARENT = tiny(preset("smollm2-135m"), 8)
NUMBERS = {"population": 12, "elites": 5, "mutation": 0.15, "crossover": 0.5, "fresh": 0.1}
SPACES = list(itertools.product(("coarse", "fine"), ("uniform", "layerwise")))


def space_of(granularity="coarse", scope="layerwise", **changes) -> Space:
    search = config.base().search
    changes = {
        "params": "60K-80K", "layers": "2-8", "d_model": "24-64:8", "num_kv_heads": "1-2", "group_heads": "1-2",
        "head_dim": "4,8,16", "mlp_dim": "16-128:16", "granularity": granularity, "scope": scope,
    } | changes  # fmt: skip
    for name, value in changes.items():
        search[name] = value
    return Space.from_config(search, PARENT, Orders.natural(PARENT))


def make(space, method="evolution", seed=0, **changes):
    return evolution.Search(**({"method": method, "space": space, "seed": seed} | NUMBERS | changes))


def fitness(seed):
    """A loss: less for heads and units of layers, and features, that are worth more; the first ones are most."""
    rng = np.random.default_rng(seed)
    worth = rng.lognormal(0, 1, (PARENT.num_layers, 2))
    units = np.cumsum(-np.sort(-rng.exponential(size=(PARENT.num_layers, PARENT.mlp_dim)), axis=1), axis=1)

    def loss(cut):
        gain = 0.0
        for part in cut.layers:
            attention = math.sqrt(len(part.groups) * len(part.heads[0]) * len(part.features))
            gain += worth[part.layer] @ (attention, math.sqrt(units[part.layer, len(part.units) - 1]))
            gain -= 1e-3 * sum(part.units)
        return -gain * math.sqrt(len(cut.width))

    return loss


def run(search, loss, candidates):
    """The generations that are asked, each with its losses."""
    asked = []
    while sum(len(cuts) for cuts, _ in asked) < candidates and (cuts := search.ask()):
        asked.append((cuts, [loss(cut) for cut in cuts]))
        search.tell(*asked[-1])
    return asked


@pytest.mark.parametrize("method", evolution.METHODS)
@pytest.mark.parametrize("words", SPACES, ids=map("-".join, SPACES))
def test_candidates_are_new_and_in_the_space(words, method):
    space = space_of(*words)
    asked = run(make(space, method), fitness(0), 60)
    cuts = [cut for cuts, _ in asked for cut in cuts]
    assert [len(cuts) for cuts, _ in asked] == [12] * 5
    assert len(set(cuts)) == 60
    for cut in cuts:
        check_cut(space, cut)


@pytest.mark.parametrize("method", evolution.METHODS)
def test_a_search_that_is_told_the_same_again_goes_on_the_same(method):
    whole = run(make(space_of(), method), fitness(1), 72)
    again = make(space_of(), method)
    for cuts, losses in whole[:3]:  # as after a restart: the losses come from a file
        assert again.ask() == cuts
        again.tell(cuts, losses)
    assert run(again, fitness(1), 36) == whole[3:]
    assert make(space_of(), method, seed=1).ask() != whole[0][0]


def test_what_is_told_matters_to_evolution_only():
    def second(method, sign):
        search = make(space_of(), method)
        cuts = search.ask()
        search.tell(cuts, [sign * i for i in range(len(cuts))])
        return search.ask()

    assert second("evolution", 1) != second("evolution", -1)
    assert second("random", 1) == second("random", -1)


def test_the_best_is_of_all_generations_and_finite():
    search = make(space_of())
    with pytest.raises(UserError, match="none of the 0 candidates"):
        _ = search.best
    first = search.ask()
    search.tell(first, [math.nan, math.inf, -math.inf] * 4)
    with pytest.raises(UserError, match="none of the 12 candidates evaluated so far has a finite loss"):
        _ = search.best
    second = search.ask()  # without parents: at random
    assert len(second) == 12
    search.tell(second, [math.nan, 3.0, 2.0, 2.0, *[4.0] * 8])
    assert search.best == (second[2], 2.0)
    third = search.ask()
    search.tell(third, [5.0] * 12)
    assert search.best == (second[2], 2.0)
    search.tell(third[:1], [1.5])
    assert search.best == (third[0], 1.5)


def changes(old, new):
    """How many parts differ: width, layers, and of the layers of both heads, features and units."""
    mine, its = ({part.layer: part for part in cut.layers} for cut in (old, new))
    pairs = [(mine[layer], its[layer]) for layer in set(mine) & set(its)]
    own = [(x.groups, x.heads) != (y.groups, y.heads) for x, y in pairs]
    own += [getattr(x, name) != getattr(y, name) for name in ("features", "units") for x, y in pairs]
    return (old.width != new.width) + (set(mine) != set(its)) + sum(own)


def test_parents_are_the_elites():
    space = space_of("fine", params="1-1M")  # nothing is stepped into the bin
    search = make(space, elites=2, mutation=0.0, crossover=0.5, fresh=0.25, population=24)
    cuts = search.ask()
    search.tell(cuts, [abs(i - 7.2) for i in range(24)])
    children, elites = search.ask(), cuts[7:9]
    crossed, mutated = children[6:18], children[18:]
    assert all(min(changes(elite, child) for elite in elites) == 1 for child in mutated)
    assert sum(changes(elites[0], child) == 1 for child in mutated) >= 3  # the better one more often
    parts = [part for elite in elites for part in elite.layers]
    for child in crossed:  # what the elites have of a layer, but for one mutation
        own = [part for part in child.layers if part.layer in {other.layer for other in parts}]
        drawn = [part.features not in {other.features for other in parts} for part in own]
        drawn += [part.units not in {other.units for other in parts} for part in own]
        drawn += [part.heads not in {other.heads for other in parts} for part in own]
        assert sum(drawn) <= 1 and len(own) > 0
    assert any(min(changes(elite, child) for elite in elites) > 1 for child in crossed)


@pytest.mark.parametrize("method", evolution.METHODS)
def test_a_small_space_is_exhausted(method):
    space = space_of(scope="uniform", params="1-1M", layers="2-6", d_model="64", num_kv_heads="2", group_heads="1-2",
                     head_dim="16", mlp_dim="64,128", layer_choice="first")  # fmt: skip
    # Children of one parent in which one thing is changed are 6 of the 20: the others have to be drawn afresh.
    search = make(space, method, population=6, elites=1, mutation=0.0, crossover=0.0, fresh=0.0)
    asked = run(search, lambda cut: float(len(cut.layers)), 1000)
    cuts = [cut for cuts, _ in asked for cut in cuts]
    assert len(cuts) == len(set(cuts)) == 5 * 2 * 2
    assert search.ask() == []


def test_an_empty_bin_is_an_error():
    with pytest.raises(UserError, match="no model of this search has so many parameters"):
        make(space_of(params="1-2")).ask()


@pytest.mark.parametrize("words", SPACES, ids=map("-".join, SPACES))
def test_evolution_beats_random_draws(words):
    space, best = space_of(*words), {method: [] for method in evolution.METHODS}
    for seed in range(10):
        for method, losses in best.items():
            search = make(space, method, seed, population=16)
            run(search, fitness(seed), 128)
            losses.append(search.best[1])
    won = np.less(best["evolution"], best["random"]).sum()
    # Cuts that are alike in every layer have five parts to change in all: more of them are met by chance.
    assert won >= (9 if space.scope == "layerwise" else 7)
    assert np.mean(best["evolution"]) < np.mean(best["random"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "evolve"}, "search.method='evolve' is not known.*evolution"),
        ({"population": 0}, "search.population=0"),
        ({"elites": -1}, "search.elites=-1"),
        ({"mutation": 1.5}, "search.mutation=1.5"),
        ({"crossover": math.nan}, "search.crossover=nan"),
        ({"fresh": -0.1}, "search.fresh=-0.1"),
        ({"crossover": 0.7, "fresh": 0.4}, "search.crossover=0.7 and search.fresh=0.4"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make(space_of(), **changes)
