"""A smaller model cut out of a larger one ("Where to Begin", arXiv 2510.07227): what is kept, and the model it makes.

A cut names what it keeps in the parent's own indices: features of the residual stream (the same in the whole network)
and, of each layer that is kept, key/value heads, query heads of each of them, features of a head and units of the MLP.
The paper's four spaces are four ways to come to such a cut (`space`). Weights are copied, none is rescaled; attention
logits are divided by the square root of the new head size, and rotary positions are those of that size.
"""

from typing import NamedTuple


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


class Cut(NamedTuple):
    """What is kept of a model: features of the residual stream, and layers in the parent's order."""

    width: tuple[int, ...]
    layers: tuple[LayerCut, ...]
