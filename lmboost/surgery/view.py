"""A cut computed in a model of fixed sizes, so that one compiled function serves every cut.

The hull is a model that is at least as large as the cut in everything. Its parameters are gathered from the parent's,
with zeros where the cut has nothing, and rescaled so that it computes exactly what the cut does:

- Norms divide by the number of features, of which e of D are the cut's: what is written to the residual stream is
  multiplied by s = sqrt(D / e), which makes the mean square over D that over e, and what reads it is divided by s.
- LayerNorm takes off the mean over D: what is written to the stream is centred over the e features beforehand, which
  a LayerNorm does not see.
- Attention divides by sqrt(N) instead of sqrt(n), unless it has a scale of its own: queries are multiplied by
  sqrt(N / n).
- The rotary frequencies of a head of n features are some of those of N where the rotated part of n divides that of N:
  features are put where their frequency is.
- Heads, units and layers of zeros add nothing.

Shape suffixes: D width, L layers, H query heads, K key/value heads, N head size, F MLP width of the hull.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmboost import axes, sharding
from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import slots, subnet
from lmboost.surgery.subnet import Cut, LayerCut

_OF_ONE_SIZE = ("dynamic", "yarn", "longrope")  # scalings in which smaller heads turn as no larger ones do


class Scales(NamedTuple):
    """Factors of a layer's queries, keys and the scales of their norms, float32 [L] each; 1 in layers without heads."""

    q: Any
    k: Any
    q_norm: Any
    k_norm: Any


class View(NamedTuple):
    """Where in the hull a cut's entries lie, and what makes up for the zeros. Views of one hull can be stacked.

    Attributes:
      width: int32 [D].
      layers: LayerSlots of int32.
      stretch: float32, s above.
      scales: those of each layer.
    """

    width: Any
    layers: slots.LayerSlots
    stretch: Any
    scales: Scales


def hull_config(parent: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """A hull with these sizes: num_layers, d_model, num_kv_heads, group_heads, head_dim, mlp_dim.

    Its head is not tied, since embeddings are rescaled. Raises a UserError where norms can't be made up for.
    """
    sizes = dict(sizes)
    sizes["num_heads"] = sizes["num_kv_heads"] * sizes.pop("group_heads")
    hull = dataclasses.replace(parent, tie_embeddings=False, **sizes)
    if len(set(parent.kinds)) > 1:
        raise UserError(
            f"cuts of a model with model.layer_kinds={parent.layer_kinds!r} can't be searched: the candidates are "
            "computed by one program, in which a layer's window and positions are constants. Take init.kind='inherit' "
            "or 'subnet' with init.layers, or another parent."
        )
    centred = parent.norm != "rmsnorm"
    if centred and not (parent.final_norm and parent.norm_placement == "pre"):
        raise UserError(
            f"cuts of a model with norm={parent.norm!r}, norm_placement={parent.norm_placement!r} and final_norm="
            f"{parent.final_norm} can't be searched: its residual stream is read without a LayerNorm."
        )
    return hull


def place(parent: ModelConfig, hull: ModelConfig, cut: Cut) -> View:
    """The view of a cut, as numpy arrays.

    Raises a UserError where the cut is larger than the hull, or where the hull's heads lack its rotary frequencies.
    """
    subnet.check(parent, cut)
    if len(cut.layers) > hull.num_layers:
        raise UserError(f"a cut of {len(cut.layers)} layers does not fit into num_layers={hull.num_layers}.")
    held, scales = place_layers(parent, hull, cut.layers)
    width = _fill(cut.width, range(len(cut.width)), hull.d_model, "d_model")
    return View(width, held, np.float32((hull.d_model / len(cut.width)) ** 0.5), scales)


def place_layers(parent: ModelConfig, hull: ModelConfig, layers: Sequence[LayerCut]) -> tuple[slots.LayerSlots, Scales]:
    """Slots and factors of the hull's layers, as numpy arrays; those beyond `layers` are empty."""
    placed = [_place_layer(parent, hull, layer) for layer in layers]
    sizes = (hull.num_kv_heads, hull.num_heads, hull.head_dim, hull.mlp_dim)
    empty = slots.LayerSlots(np.int32(slots.EMPTY), *(np.full(n, slots.EMPTY, np.int32) for n in sizes))
    placed += [(empty, Scales(1.0, 1.0, 1.0, 1.0))] * (hull.num_layers - len(layers))
    held, scales = zip(*placed, strict=True)
    return (
        slots.LayerSlots(*map(np.stack, zip(*held, strict=True))),
        Scales(*(np.array(x, np.float32) for x in zip(*scales, strict=True))),
    )


def _place_layer(parent: ModelConfig, hull: ModelConfig, layer: LayerCut) -> tuple[slots.LayerSlots, Scales]:
    groups, features = len(layer.groups), len(layer.features)
    each, room = len(layer.heads[0]), hull.num_heads // hull.num_kv_heads
    if each > room:
        raise UserError(
            f"a cut with {each} query heads for a key/value head does not fit where there is room for {room}."
        )
    places = [group * room + head for group in range(groups) for head in range(each)]
    held = slots.LayerSlots(
        layer=np.int32(layer.layer),
        groups=_fill(layer.groups, range(groups), hull.num_kv_heads, "num_kv_heads"),
        heads=_fill(subnet.query_heads(parent, layer), places, hull.num_heads, "num_heads"),
        features=_fill(layer.features, feature_places(hull, features), hull.head_dim, "head_dim"),
        units=_fill(layer.units, range(len(layer.units)), hull.mlp_dim, "mlp_dim"),
    )
    return held, layer_scales(hull, groups * each, groups, features)


def layer_scales(hull: ModelConfig, heads: int, groups: int, features: int) -> Scales:
    """The factors of a layer that has so many heads, key/value heads and features of a head."""
    head = (hull.head_dim / features) ** 0.5
    logits = 1.0 if hull.attn_scale else head  # what they are to be multiplied by
    if hull.qk_norm == "none":
        return Scales(logits, 1.0, 1.0, 1.0)
    if hull.qk_norm == "head":
        return Scales(head, head, logits / head, 1 / head)
    q = head * (hull.num_heads / heads) ** 0.5
    k = head * (hull.num_kv_heads / groups) ** 0.5
    return Scales(q, k, logits / q, 1 / k)


def _fill(entries: Sequence[int], places: Sequence[int], size: int, name: str) -> np.ndarray:
    """int32 [size] with the entries at their places, and nothing elsewhere."""
    if len(entries) > size:
        raise UserError(f"a cut that keeps {len(entries)} does not fit into {name}={size}.")
    out = np.full(size, slots.EMPTY, np.int32)
    out[list(places)] = entries
    return out


def feature_places(hull: ModelConfig, features: int) -> list[int]:
    """Where in the hull's heads the features of a smaller head lie.

    With rotary positions, the pair i of r / 2 turns by theta^(-2 i / r) and goes where a head of the hull, with R
    rotated features, turns as fast: to pair i R / r. Raises a UserError where there is no such pair.
    """
    if hull.position != "rope":
        return list(range(features))
    own, room = dataclasses.replace(hull, head_dim=features).rotary_dim, hull.rotary_dim
    if not has_room(hull, features):
        raise UserError(
            f"head_dim={features} with {own} rotated features has no place in head_dim={hull.head_dim} with {room}: "
            "the smaller number must divide the larger one, so that its frequencies are among those, and there must be "
            "room for what is not rotated. Choose head sizes that divide each other, or, where model.rope_scaling is "
            f"one of {', '.join(_OF_ONE_SIZE)}, the parent's."
        )
    pairs = [i * (room // own) for i in range(own // 2)]
    return [*pairs, *(room // 2 + i for i in pairs), *range(room, room + features - own)]


def has_room(hull: ModelConfig, features: int) -> bool:
    """Whether a head of so many features can be put into one of the hull's."""
    if hull.position != "rope":
        return features <= hull.head_dim
    own, room = dataclasses.replace(hull, head_dim=features).rotary_dim, hull.rotary_dim
    if own != room and own and hull.scales_positions and hull.rope_scaling in _OF_ONE_SIZE:
        return False
    return features - own <= hull.head_dim - room and (own <= room and room % own == 0 if own else True)


def apply(parent: ModelConfig, params: Mapping[str, Any], hull: ModelConfig, view: View) -> dict[str, Any]:
    """The parameters of the hull that computes a cut, from those of the parent; to be jitted, or mapped over views.

    Equal to the cut up to rounding; gradients are not meant to be taken.
    """
    s, kept_D = view.stretch, (view.width != slots.EMPTY).astype(jnp.float32)

    def written(x):
        """What is added to the residual stream, features last."""
        if parent.norm != "rmsnorm":
            x = x - kept_D * (x.sum(-1, keepdims=True) / kept_D.sum())
        return x * s

    def read(scale):
        """The scale of a norm that reads the stream."""
        return (scale + 1) / s - 1 if parent.zero_centred_norm else scale / s

    def rescaled(keys, x):
        name = sharding.path_name(keys)
        inputs, outputs = axes.sides(f"layers/{name}")
        if outputs == ("embed",):
            return written(x)
        if parent.norm_placement != "post":
            return read(x) if name in ("attn_norm/scale", "mlp_norm/scale") else x
        return x / s if inputs == ("embed",) else x

    out = slots.gather_rest(params, view.width)
    out["head"] = out["head"] if "head" in out else out["embed"]["embedding"].T
    for name in ("embed", "position_embed"):
        if name in out:
            out[name] = {"embedding": written(out[name]["embedding"])}
    if "final_norm" in out:
        out["final_norm"] = out["final_norm"] | {"scale": read(out["final_norm"]["scale"])}
    else:
        out["head"] = out["head"] / s
    layers = slots.gather_layers(parent, params["layers"], view.width, view.layers)
    layers = rescale_attention(parent, layers, view.scales)
    return out | {"layers": jax.tree_util.tree_map_with_path(rescaled, layers)}


def rescale_attention(config: ModelConfig, layers: Mapping[str, Any], scales: Scales) -> dict[str, Any]:
    """Stacked layers of a model with their queries, keys and the norms of these multiplied."""
    attn = dict(layers["attn"])
    for name, factor_L in scales._asdict().items():
        times = functools.partial(_norm_times, config) if name.endswith("norm") else _times
        if name in attn:
            attn[name] = {key: times(x, factor_L) for key, x in attn[name].items()}
    return {**layers, "attn": attn}


def _times(x: jax.Array, factor_L: Any) -> jax.Array:
    """A parameter, or each layer of a stack, times its factor, in the stack's dtype."""
    return (x * jnp.asarray(factor_L).reshape((-1,) + (1,) * (x.ndim - 1))).astype(x.dtype)


def _norm_times(config: ModelConfig, scale: jax.Array, factor: Any) -> jax.Array:
    """The scale of a norm that gives so many times as much."""
    return _times(scale + 1.0, factor) - 1.0 if config.zero_centred_norm else _times(scale, factor)
