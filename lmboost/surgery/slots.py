"""Parameters of a model gathered into another one, entry by entry: what cutting, viewing and widening share.

A target of fixed sizes has a slot for every entry: a feature of the residual stream, a layer, and in each layer the
heads, the features of a head and the units of the MLP. An array of int32 says which entry of the source each of them
holds; an empty one (EMPTY) holds zeros.

Shape suffixes, of the target: D model width, L layers, H query heads, K key/value heads, N head size, F MLP width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmboost import axes, sharding
from lmboost.models.model_config import ModelConfig

EMPTY = np.iinfo(np.int32).max  # no entry of any source


class LayerSlots(NamedTuple):
    """Entries of the source in each slot of each layer, int32; the rows are layers of the target.

    Attributes:
      layer: [L].
      groups: [L, K], key/value heads.
      heads: [L, H], query heads; those of one key/value head are neighbours.
      features: [L, N], of every head.
      units: [L, F], of the MLP.
    """

    layer: Any
    groups: Any
    heads: Any
    features: Any
    units: Any


def gather_rest(params: Mapping[str, Any], width: jax.Array) -> dict[str, Any]:
    """What a target has besides its layers; `width` int32 [D] has the source's features of the residual stream."""
    rest = {name: x for name, x in params.items() if name != "layers"}
    entries = {"embed": width}
    return jax.tree_util.tree_map_with_path(lambda keys, x: _take(x, axes.of(sharding.path_name(keys)), entries), rest)


def gather_layers(source: ModelConfig, stack: Any, width: jax.Array, layers: LayerSlots) -> Any:
    """The layers of a target as one stack, from the stack of a source of equal layers; `width` as in `gather_rest`."""

    def one(slots: LayerSlots):
        entries = {"embed": width, "kv_heads": slots.groups, "heads": slots.heads}
        entries |= {"features": slots.features, "mlp": slots.units}

        def leaf(keys, x):
            x = jnp.take(x, slots.layer, axis=0, mode="fill", fill_value=0)
            names = axes.of(f"layers/{sharding.path_name(keys)}")
            if "*" not in names[0]:
                return _take(x, names, entries)
            names = names[0].split("*") if source.qk_norm == "full" else ("features",)
            return _take(x.reshape((-1, source.head_dim)[-len(names) :]), names, entries).reshape(-1)

        return jax.tree_util.tree_map_with_path(leaf, stack)

    return jax.vmap(one)(layers)


def _take(x: jax.Array, names: Sequence[str], entries: Mapping[str, jax.Array]) -> jax.Array:
    """What is named of each axis; of others, such as a vocabulary, all."""
    for axis, name in enumerate(names):
        if name in entries:
            x = jnp.take(x, entries[name], axis=axis, mode="fill", fill_value=0)
    return x
