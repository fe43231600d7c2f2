"""A smaller model cut out of a larger one ("Where to Begin", arXiv 2510.07227): what is kept, and the model it makes.

A cut names what it keeps in the parent's own indices: features of the residual stream (the same in the whole network)
and, of each layer that is kept, key/value heads, query heads of each of them, features of a head and units of the MLP.
The four spaces of the paper are ways to come to such a cut (`space.py`). Weights are copied, none is rescaled;
attention logits are divided by the square root of the new head size, and rotary positions are those of that size.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmboost import ranges
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import LayerSizes, ModelConfig
from lmboost.surgery import inherit, slots


class LayerCut(NamedTuple):
    """What is kept of a layer, each in ascending order of the parent's indices.

    Attributes:
      layer: the parent's layer.
      groups: key/value heads.
      heads: for each of these groups the query heads, counted within the group from 0; equally many in each.
      features: of every query and key/value head.
      units: of the MLP.
    """

    layer: int
    groups: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    units: tuple[int, ...]

    @property
    def sizes(self) -> LayerSizes:
        heads = sum(map(len, self.heads))
        return LayerSizes(heads, len(self.groups), len(self.features), len(self.units))


class Cut(NamedTuple):
    """What is kept of a model: features of the residual stream, and layers in the parent's order."""

    width: tuple[int, ...]
    layers: tuple[LayerCut, ...]


def child_config(parent: ModelConfig, cut: Cut) -> ModelConfig:
    """The model that a cut makes; a plain config where its layers are of equal sizes.

    Raises a UserError where the cut names what the parent has not, or not in order.
    """
    check(parent, cut)
    kinds = parent.kinds
    child = dataclasses.replace(parent, d_model=len(cut.width))
    return child.with_layers([layer.sizes for layer in cut.layers], [kinds[layer.layer] for layer in cut.layers])


def extract(parent: ModelConfig, params: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """The parameters of `child_config(parent, cut)`: copies of the parent's."""
    width = np.array(cut.width, np.int32)
    runs = [_layer_slots(parent, cut.layers[start:stop]) for start, stop, *_ in child_config(parent, cut).segments()]
    stacks = [slots.gather_layers(parent, params["layers"], width, run) for run in runs]
    return slots.gather_rest(params, width) | {"layers": transformer.join_layers(stacks)}


def _layer_slots(parent: ModelConfig, layers: Sequence[LayerCut]) -> slots.LayerSlots:
    """Every slot filled, for layers of equal sizes."""
    rows = [layer._replace(heads=query_heads(parent, layer)) for layer in layers]
    return slots.LayerSlots(*(np.array(column, np.int32) for column in zip(*rows, strict=True)))


@dataclasses.dataclass(frozen=True)
class FirstEntries:
    """What a model takes from a larger one: its layers, and in them the first entries of everything."""

    parent: ModelConfig
    cut: Cut

    def __call__(self, params: Mapping[str, Any], random: Mapping[str, Any]) -> dict[str, Any]:
        """The child's parameters; nothing in them is `random`."""
        return extract(self.parent, params, self.cut)

    def report(self, params: Mapping[str, Any]) -> list[str]:
        """What was kept, a line each."""
        kept = ranges.write([layer.layer for layer in self.cut.layers])
        lines = [f"layers: of the parent's {kept}", f"width: the first {len(self.cut.width)} of {self.parent.d_model}"]
        parent, layers = self.parent, self.cut.layers
        each = {
            "key/value heads": ([layer.groups for layer in layers], parent.num_kv_heads),
            "query heads of each": ([layer.heads[0] for layer in layers], parent.num_heads // parent.num_kv_heads),
            "features of a head": ([layer.features for layer in layers], parent.head_dim),
            "units of the MLP": ([layer.units for layer in layers], parent.mlp_dim),
        }
        for name, (entries, size) in each.items():
            counts = set(map(len, entries))
            span = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{min(counts)}"
            lines.append(f"{name}: the first {span} of {size}")
        return lines


def plan(layers: str, fresh: str, parent: ModelConfig, child: ModelConfig) -> FirstEntries:
    """The cut of the first entries of everything; the child's config says how many are kept.

    Args:
      layers: the parent's layers, as "0-5,8"; empty is the first ones.

    Raises a UserError where the child is larger than the parent, or differs in more than sizes.
    """
    if fresh:
        raise UserError(f"init.fresh={fresh!r}: with init.kind='subnet' all comes from the parent; leave it empty.")
    chosen = inherit.parse_layers(layers, parent.num_layers, "init.layers") if layers else None
    if chosen and len(chosen) != child.num_layers:
        raise UserError(
            f"init.layers={layers!r} are {len(chosen)} layers, but model.num_layers={child.num_layers}: set it to "
            "the number of layers that are taken."
        )
    cut = first_entries(parent, child, chosen)
    inherit.check_models(child_config(parent, cut), child, "init.")
    return FirstEntries(parent, cut)


def query_heads(parent: ModelConfig, layer: LayerCut) -> list[int]:
    """The query heads that a layer keeps, counted in the whole layer, group by group."""
    each = parent.num_heads // parent.num_kv_heads
    return [group * each + head for group, heads in zip(layer.groups, layer.heads, strict=True) for head in heads]


def whole(parent: ModelConfig) -> Cut:
    """The cut that keeps everything."""
    return first_entries(parent, parent, tuple(range(parent.num_layers)))


def first_entries(parent: ModelConfig, child: ModelConfig, layers: Sequence[int] | None = None) -> Cut:
    """The cut that makes `child` from the first entries of every dimension.

    layers: the parent's, one for each of the child's; None is the first ones.

    Raises a UserError where the child is larger than the parent in anything.
    """
    child.validate()
    layers = range(child.num_layers) if layers is None else layers
    if len(layers) != child.num_layers:
        raise UserError(
            f"model.num_layers={child.num_layers}, but the layers {list(layers)} are {len(layers)}: name one layer "
            "of the parent for each of the cut."
        )
    ratio = parent.num_heads // parent.num_kv_heads
    limits = {"num_layers": parent.num_layers, "d_model": parent.d_model}
    limits |= {"num_kv_heads": parent.num_kv_heads, "head_dim": parent.head_dim, "mlp_dim": parent.mlp_dim}
    for name, limit in limits.items():
        if getattr(child, name) > limit:
            raise UserError(
                f"model.{name}={getattr(child, name)}, but the parent has {limit}: a cut is no larger than its "
                "parent in anything."
            )
    made = []
    for layer, (heads, groups, features, units) in zip(layers, child.sizes, strict=True):
        if heads // groups > ratio:
            raise UserError(
                f"model.num_heads={heads} with model.num_kv_heads={groups} is {heads // groups} query heads for "
                f"each key/value head, but the parent has {ratio}: keep at most as many."
            )
        each = (tuple(range(heads // groups)),) * groups
        made.append(LayerCut(layer, tuple(range(groups)), each, tuple(range(features)), tuple(range(units))))
    cut = Cut(tuple(range(child.d_model)), tuple(made))
    check(parent, cut)
    return cut


def check(parent: ModelConfig, cut: Cut) -> None:
    """Raises a UserError where a cut names what the parent has not, twice or out of order, or nothing at all."""
    if parent.layer_sizes:
        raise UserError(
            f"the parent's layers are of unequal sizes (layer_sizes={parent.layer_sizes!r}): cut the model that it was "
            "cut from."
        )
    ratio = parent.num_heads // parent.num_kv_heads
    _check_entries("width", cut.width, parent.d_model)
    _check_entries("layers", [layer.layer for layer in cut.layers], parent.num_layers)
    for layer in cut.layers:
        where = f"layer {layer.layer}: "
        _check_entries(f"{where}groups", layer.groups, parent.num_kv_heads)
        _check_entries(f"{where}features", layer.features, parent.head_dim)
        _check_entries(f"{where}units", layer.units, parent.mlp_dim)
        for heads in layer.heads:
            _check_entries(f"{where}heads", heads, ratio)
        counts = [len(heads) for heads in layer.heads]
        if len(counts) != len(layer.groups) or len(set(counts)) > 1:
            raise UserError(
                f"a cut's {where}heads keeps {counts} query heads of {len(layer.groups)} key/value heads: keep equally "
                "many of each, so that the heads can be divided into groups."
            )


def _check_entries(name: str, entries: Sequence[int], size: int) -> None:
    if not entries or list(entries) != sorted(set(entries)) or entries[0] < 0 or entries[-1] >= size:
        raise UserError(
            f"a cut's {name}={entries!r} must be some of the parent's 0 to {size - 1}, each once, in ascending order."
        )
