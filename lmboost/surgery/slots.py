"""Parameters of a model gathered into another one, entry by entry: what cutting, viewing and widening share.

A target of fixed sizes has a slot for every entry: a feature of the residual stream, a layer, and in each layer the
heads, the features of a head and the units of the MLP. An array of int32 says which entry of the source each of them
holds; an empty one (EMPTY) holds zeros.

Shape suffixes, of the target: D model width, L layers, H query heads, K key/value heads, N head size, F MLP width.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmboost import sharding
from lmboost.models.model_config import ModelConfig

EMPTY = np.iinfo(np.int32).max  # no entry of any source

# What the axes of a parameter count, by the end of its path; layers are stacked on one more axis in front.
AXES = {
    "embed/embedding": (None, "width"),
    "position_embed/embedding": (None, "width"),
    "head": ("width", None),
    "attn_norm/scale": ("width",),
    "attn_norm/bias": ("width",),
    "mlp_norm/scale": ("width",),
    "mlp_norm/bias": ("width",),
    "final_norm/scale": ("width",),
    "final_norm/bias": ("width",),
    "q/kernel": ("width", "heads", "features"),
    "k/kernel": ("width", "groups", "features"),
    "v/kernel": ("width", "groups", "features"),
    "o/kernel": ("heads", "features", "width"),
    "q/bias": ("heads", "features"),
    "k/bias": ("groups", "features"),
    "v/bias": ("groups", "features"),
    "o/bias": ("width",),
    "up/kernel": ("width", "units"),
    "gate/kernel": ("width", "units"),
    "down/kernel": ("units", "width"),
    "up/bias": ("units",),
    "gate/bias": ("units",),
    "down/bias": ("width",),
}
# Of norms on queries and keys: one scale for all heads ("head"), or one for each feature of each ("full").
_QK_AXES = {
    "head": {"q": ("features",), "k": ("features",)},
    "full": {"q": ("heads", "features"), "k": ("groups", "features")},
}


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
    return jax.tree_util.tree_map_with_path(lambda keys, x: _take(x, AXES[_end(keys)], {"width": width}), rest)


def gather_layers(source: ModelConfig, stack: Any, width: jax.Array, layers: LayerSlots) -> Any:
    """The layers of a target as one stack, from the stack of a source of equal layers; `width` as in `gather_rest`."""

    def one(slots: LayerSlots):
        entries = {"width": width} | slots._asdict()

        def leaf(keys, x):
            x, name = jnp.take(x, slots.layer, axis=0, mode="fill", fill_value=0), sharding.path_name(keys)
            if name not in ("attn/q_norm/scale", "attn/k_norm/scale"):
                return _take(x, AXES[_end(keys)], entries)
            axes = _QK_AXES[source.qk_norm][name[len("attn/")]]
            return _take(x.reshape((-1, source.head_dim)[-len(axes) :]), axes, entries).reshape(-1)

        return jax.tree_util.tree_map_with_path(leaf, stack)

    return jax.vmap(one)(layers)


def _end(keys) -> str:
    """The last two parts of a parameter's path."""
    return "/".join(sharding.path_name(keys).split("/")[-2:])


def _take(x: jax.Array, axes: tuple[str | None, ...], entries: Mapping[str, jax.Array]) -> jax.Array:
    for axis, name in enumerate(axes):
        if name is not None:
            x = jnp.take(x, entries[name], axis=axis, mode="fill", fill_value=0)
    return x
