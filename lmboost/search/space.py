"""The cuts that a search chooses from ("Where to Begin", arXiv 2510.07227), and how they are drawn.

A dimension of size n keeps the first n entries of its order ("coarse") or any n ("fine"); sizes, and in a fine space
the entries, are the same in every layer ("uniform") or each layer's own ("layerwise"). Every cut that is drawn lies in
the bin: sizes that are drawn at random are stepped towards it, one dimension at a time. Where that fails again and
again, all numbers of parameters that there are get looked through: either one is in the bin, or it is empty.
"""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from lmboost.models.model_config import LayerSizes, ModelConfig
from lmboost.search import reach
from lmboost.search.notation import parse_params, read_choices
from lmboost.surgery.subnet import Cut, LayerCut

ROW = ("num_kv_heads", "group_heads", "head_dim", "mlp_dim")  # a layer's sizes, in the order of a draft's rows
PARTS = {"heads": (0, 1), "features": (2,), "units": (3,)}  # which of them a part of a layer has
TRIES = 20  # drafts that may miss the bin before all sizes are looked through
OVERSHOOT = 0.2  # of the steps that would pass the bin, the share that is taken
NO_LAYER = LayerCut(0, (), (), (), ())


class Orders(NamedTuple):
    """The entries of each dimension, the most important first: all of them, in the parent's indices.

    Attributes:
      width: features of the residual stream.
      layers: the parent's layers.
      groups, features, units: of each parent layer: key/value heads, features of a head, units of the MLP.
      heads: of each parent layer and each of its groups: query heads, counted within the group.
    """

    width: tuple[int, ...]
    layers: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[tuple[int, ...], ...], ...]
    features: tuple[tuple[int, ...], ...]
    units: tuple[tuple[int, ...], ...]

    @classmethod
    def natural(cls, parent: ModelConfig) -> "Orders":
        """The parent's own order."""
        layers, groups = tuple(range(parent.num_layers)), tuple(range(parent.num_kv_heads))
        heads = (tuple(range(parent.num_heads // len(groups))),) * len(groups)
        each = (groups, heads, tuple(range(parent.head_dim)), tuple(range(parent.mlp_dim)))
        return cls(tuple(range(parent.d_model)), layers, *((one,) * len(layers) for one in each))


@dataclasses.dataclass
class Draft:
    """A cut in the making: its sizes, and entries to start from, which a fine space grows or shrinks to these sizes.

    Rows (sizes in the order of ROW) and parts (entries) are by layer; in a uniform space those at 0 are for all.
    """

    d_model: int
    width: tuple[int, ...]
    layers: tuple[int, ...]
    rows: dict[int, list[int]]
    parts: dict[int, LayerCut]


@dataclasses.dataclass(frozen=True)
class Space:
    """The cuts of a parent of equal layers that have from `low` to `high` parameters, both included.

    Attributes:
      granularity: "coarse" or "fine".
      scope: "uniform" or "layerwise".
      layer_choice: "first" layers of their order, or "any".
      layers ... mlp_dim: the sizes to choose from, ascending; group_heads are query heads of a key/value head.
      orders: whose first entries are taken; of a fine space, only the layers' is.
    """

    parent: ModelConfig
    granularity: str
    scope: str
    layer_choice: str
    layers: tuple[int, ...]
    d_model: tuple[int, ...]
    num_kv_heads: tuple[int, ...]
    group_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    mlp_dim: tuple[int, ...]
    low: int
    high: int
    orders: Orders

    @classmethod
    def from_config(cls, search: ConfigDict, parent: ModelConfig, orders: Orders) -> "Space":
        """The space of a config's `search`; a UserError on what can't be read, or is more than the parent has."""
        low, high = parse_params(search.params)
        how = {name: search[name] for name in ("granularity", "scope", "layer_choice")}
        return cls(parent=parent, low=low, high=high, orders=orders, **how, **read_choices(search, parent))

    def num_params(self, cut: Cut) -> int:
        """The number of parameters of the model that a cut makes (`subnet.child_config`)."""
        model, base = self._models[len(cut.width)]
        return base + sum(model.layer_params(part.sizes) for part in cut.layers)

    @functools.cached_property
    def _choices(self) -> list[tuple[int, ...]]:
        """Of each size of a row."""
        return [getattr(self, name) for name in ROW]

    @functools.cached_property
    def _models(self) -> dict[int, tuple[ModelConfig, int]]:
        """For each width, the parent of that width, and its number of parameters without layers."""
        models = {d: dataclasses.replace(self.parent, d_model=d) for d in self.d_model}
        return {d: (model, dataclasses.replace(model, num_layers=0).num_params()) for d, model in models.items()}

    @functools.cached_property
    def _shapes(self) -> dict[tuple[int, int], None]:
        """Every (depth, width) at which the smallest layers are not above the bin, and the largest not below it."""
        shapes = []
        for d, (model, base) in self._models.items():
            least, most = (model.layer_params(_layer_sizes([own[i] for own in self._choices])) for i in (0, -1))
            shapes += [(l, d) for l in self.layers if base + l * least <= self.high and base + l * most >= self.low]
        return dict.fromkeys(shapes)

    # Cuts are drawn so: the sizes of a draft are brought into the bin, then entries are taken.

    def sample(self, rng: np.random.Generator) -> Cut:
        """A cut drawn at random. A UserError where the bin is empty, as from `mutate` and `crossover`."""
        shapes = list(self._shapes)
        cut = self._settle(rng, lambda: self._random(rng, *shapes[rng.integers(len(shapes))]))
        return cut or self._fill(rng, self._look_through(rng))

    def mutate(self, rng: np.random.Generator, cut: Cut, rate: float) -> Cut:
        """A cut of which each part is changed with probability `rate`, and one at least.

        Parts are the width, the choice of layers, and of each layer its heads, their features and its MLP's units.
        Where no other cut is found in this way, the result is a `sample`.
        """
        spots = [(name, 0) for name in ("width", "layers")]
        spots += [(name, slot) for slot in self._slots([part.layer for part in cut.layers]) for name in PARTS]
        spots = [spot for spot in spots if self._variable[spot[0]]]

        def draw():
            draft = self._draft(cut)
            chosen = np.flatnonzero(rng.random(len(spots)) < rate).tolist() or [rng.integers(len(spots))]
            for i in chosen:
                self._change(rng, draft, *spots[i])
            return draft

        return (self._settle(rng, draw, unlike=cut) if spots else None) or self.sample(rng)

    def crossover(self, rng: np.random.Generator, a: Cut, b: Cut) -> Cut:
        """A cut that has its width, its depth and each part of a layer from either; layers of both are kept."""

        def draw():
            parents = self._draft(a), self._draft(b)
            x, y = (parents[i] for i in rng.integers(2, size=2))
            both = set(parents[0].layers) & set(parents[1].layers)
            either = sorted(set(parents[0].layers) ^ set(parents[1].layers))
            others = rng.choice(either, len(y.layers) - len(both), replace=False).tolist() if either else []
            child = Draft(x.d_model, x.width, tuple(sorted([*both, *others])), {}, {})
            for slot in self._slots(child.layers):
                found = [parent for parent in parents if slot in parent.rows]
                heads, features, units = (found[i] for i in rng.integers(len(found), size=3))
                child.rows[slot] = heads.rows[slot][:2] + features.rows[slot][2:3] + units.rows[slot][3:]
                own = {"features": features.parts[slot].features, "units": units.parts[slot].units}
                child.parts[slot] = heads.parts[slot]._replace(**own)
            return child

        return self._settle(rng, draw) or self.sample(rng)

    def _settle(self, rng, draw: Callable[[], Draft], unlike: Cut | None = None) -> Cut | None:
        """The cut of the first of TRIES drafts that comes into the bin; None if none does."""
        for _ in range(TRIES if self._shapes else 0):
            draft = draw()
            if self._step_into_bin(rng, draft) and (cut := self._fill(rng, draft)) != unlike:
                return cut
        return None

    def _slots(self, layers: Sequence[int]) -> Sequence[int]:
        """The layers whose rows and parts a draft has: all, or 0 for all."""
        return layers if self.scope == "layerwise" else (0,)

    def _draft(self, cut: Cut) -> Draft:
        layers = tuple(part.layer for part in cut.layers)
        parts = dict(zip(self._slots(layers), cut.layers, strict=False))
        return Draft(len(cut.width), cut.width, layers, {slot: _row(part) for slot, part in parts.items()}, parts)

    def _random(self, rng, depth: int, d_model: int) -> Draft:
        draft = Draft(d_model, (), (), {}, {})
        self._set_layers(rng, draft, depth, ())
        return draft

    def _set_layers(self, rng, draft: Draft, depth: int, kept: Sequence[int]) -> None:
        """Gives a draft other layers, from `kept` on if any may be taken. Sizes of new ones are drawn at random."""
        if self.layer_choice == "first":
            draft.layers = tuple(sorted(self.orders.layers[:depth]))
        else:
            draft.layers = _resize(rng, self.parent.num_layers, depth, kept)
        for slot in self._slots(draft.layers):
            if slot not in draft.rows:
                draft.rows[slot] = [choices[int(rng.random() * len(choices))] for choices in self._choices]
                draft.parts[slot] = NO_LAYER

    @functools.cached_property
    def _variable(self) -> dict[str, bool]:
        """Which parts of a cut can be changed: in their size, or in what they keep."""
        parent, fine = self.parent, self.granularity == "fine"
        whole = (parent.num_kv_heads, parent.num_heads // parent.num_kv_heads, parent.head_dim, parent.mlp_dim)
        sizes = [len(c) > 1 or (fine and c[0] < most) for c, most in zip(self._choices, whole, strict=True)]
        return {name: any(sizes[i] for i in own) for name, own in PARTS.items()} | {
            "width": len(self.d_model) > 1 or (fine and self.d_model[0] < parent.d_model),
            "layers": len(self.layers) > 1 or (self.layer_choice == "any" and self.layers[0] < parent.num_layers),
        }

    def _change(self, rng, draft: Draft, name: str, slot: int) -> None:
        """Changes a part of a draft: its size, or what is kept of it, or both."""
        free = self.layer_choice == "any" if name == "layers" else self.granularity == "fine"
        if name == "layers":
            depth = _other(rng, self.layers, len(draft.layers), free)
            self._set_layers(rng, draft, depth, _drop(rng, draft.layers) if free else ())
        elif name == "width":
            draft.d_model = _other(rng, self.d_model, draft.d_model, free)
            draft.width = _drop(rng, draft.width) if free else ()
        else:
            row, part = draft.rows[slot], draft.parts[slot]
            i = rng.choice([i for i in PARTS[name] if len(self._choices[i]) > 1] or PARTS[name])
            row[i] = _other(rng, self._choices[i], row[i], free)
            if free and name == "heads":  # a group that is dropped, and perhaps comes back, loses its query heads
                kept = _drop(rng, range(len(part.groups)))
                groups, heads = (tuple(own[k] for k in kept) for own in (part.groups, part.heads))
                draft.parts[slot] = part._replace(groups=groups, heads=heads)
            elif free:
                draft.parts[slot] = part._replace(**{name: _drop(rng, getattr(part, name))})

    def _step_into_bin(self, rng, draft: Draft) -> bool:
        """Steps the sizes of a draft towards the bin, one random dimension at a time; whether they came into it."""
        if (len(draft.layers), draft.d_model) not in self._shapes:
            alike = [(l, d) for l, d in self._shapes if l == len(draft.layers) or d == draft.d_model]
            depth, draft.d_model = rng.choice(alike or list(self._shapes)).tolist()
            self._set_layers(rng, draft, depth, draft.layers)
        model, total = self._models[draft.d_model]
        rows = [draft.rows[slot] for slot in self._slots(draft.layers)]
        times = len(draft.layers) // len(rows)
        costs = [model.layer_params(_layer_sizes(row)) for row in rows]
        total += times * sum(costs)
        for _ in range(50 + 20 * len(rows)):
            if self.low <= total <= self.high:
                return True
            at, i = int(rng.random() * len(rows)), int(rng.random() * len(ROW))
            row, choices = list(rows[at]), self._choices[i]
            sign = 1 if total < self.low else -1
            here = choices.index(row[i])
            left, passes = (len(choices) - 1 - here if sign > 0 else here), True
            while passes and left:  # a random step, and as long as it would pass the bin a shorter one
                step = 1 + int(rng.random() * left)
                row[i] = choices[here + sign * step]
                cost = model.layer_params(_layer_sizes(row))
                after = total + times * (cost - costs[at])
                passes, left = (after > self.high if sign > 0 else after < self.low), step - 1
            if row != rows[at] and (not passes or rng.random() < OVERSHOOT):
                rows[at][i] = row[i]
                costs[at], total = cost, after
        return self.low <= total <= self.high

    def _look_through(self, rng) -> Draft:
        """A draft in the bin, found among all sizes that there are. A UserError where there is none."""
        rows, units = {}, {}  # by width and parameters in a layer: of its attention, and of its MLP

        def widths():
            for d in rng.permutation(self.d_model).tolist():
                model, base = self._models[d]
                attention, mlp = rows.setdefault(d, defaultdict(list)), units.setdefault(d, {})
                for row in itertools.product(*self._choices[:3]):
                    attention[model.layer_params(_layer_sizes((*row, self.mlp_dim[0])))].append(row)
                for size in self.mlp_dim:  # what it adds to the last of these rows, the largest
                    mlp[model.layer_params(_layer_sizes((*row, size))) - max(attention)] = size
                yield reach.Width(d, base, self.layers, sorted(attention), sorted(mlp))

        d, depth, attention, mlp = reach.find(rng, widths(), self.scope == "uniform", self.low, self.high)
        draft = self._random(rng, depth, d)
        for slot, of_attention, of_mlp in zip(self._slots(draft.layers), attention, mlp, strict=True):
            fitting = rows[d][of_attention]
            draft.rows[slot] = [*fitting[rng.integers(len(fitting))], units[d][of_mlp]]
        return draft

    def _fill(self, rng, draft: Draft) -> Cut:
        """The cut of a draft's sizes."""
        coarse, orders = self.granularity == "coarse", self.orders
        layers, firsts = [], {}

        def take(order, size, kept):
            if not coarse:
                return _resize(rng, len(order), size, kept)
            if (key := (id(order), size)) not in firsts:  # layers often share orders
                firsts[key] = tuple(sorted(order[:size]))
            return firsts[key]

        width = take(orders.width, draft.d_model, draft.width)
        for layer in draft.layers:
            if layers and not coarse and self.scope == "uniform":
                layers.append(layers[0]._replace(layer=layer))
                continue
            slot = layer if self.scope == "layerwise" else 0
            (num_groups, num_heads, head_dim, mlp_dim), part = draft.rows[slot], draft.parts[slot]
            groups = take(orders.groups[layer], num_groups, part.groups)
            known = dict(zip(part.groups, part.heads, strict=True))
            heads = tuple(take(orders.heads[layer][k], num_heads, known.get(k, ())) for k in groups)
            features = take(orders.features[layer], head_dim, part.features)
            layers.append(LayerCut(layer, groups, heads, features, take(orders.units[layer], mlp_dim, part.units)))
        return Cut(width, tuple(layers))


def _row(part: LayerCut) -> list[int]:
    return [len(part.groups), len(part.heads[0]), len(part.features), len(part.units)]


def _layer_sizes(row: Sequence[int]) -> LayerSizes:
    groups, group_heads, head_dim, mlp_dim = row
    return LayerSizes(groups * group_heads, groups, head_dim, mlp_dim)


def _other(rng, choices: Sequence[int], size: int, may_stay: bool) -> int:
    """Another of the choices if there is one, near ones more likely; if the size may stay, it does as often as not."""
    if len(choices) == 1 or (may_stay and rng.random() < 0.5):
        return size
    distance = np.abs(np.arange(len(choices)) - choices.index(size))
    weights = np.cumsum(np.where(distance, 1 / np.maximum(distance, 1), 0))
    return choices[np.searchsorted(weights, rng.random() * weights[-1], "right")]


def _drop(rng, kept: Sequence[int]) -> Sequence[int]:
    """Entries (ascending) without some of them: most often few, at times all."""
    return _resize(rng, kept[-1] + 1, len(kept) - 1 - int(rng.random() ** 4 * len(kept)), kept)


def _resize(rng, total: int, size: int, kept: Sequence[int]) -> tuple[int, ...]:
    """`size` of `total` entries, ascending, drawn at random: some of those kept, or all of them and others."""
    if size == len(kept):
        return tuple(kept)
    if size == total:
        return tuple(range(total))
    mask = np.zeros(total, bool)
    if size < len(kept):
        mask[rng.choice(kept, size, replace=False, shuffle=False)] = True
    else:
        mask[list(kept)] = True
        pool = np.flatnonzero(~mask) if kept else total
        mask[rng.choice(pool, size - len(kept), replace=False, shuffle=False)] = True
    return tuple(np.flatnonzero(mask).tolist())
