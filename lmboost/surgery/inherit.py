"""A model that starts with layers of another one.

Inheritune (arXiv 2404.08634): the first layers of a deeper trained model, its embeddings, final norm and head. Its
baselines: stacking (a shallower model's layers, twice) and hybrid stacking (the deeper one's first layers, twice).
Block expansion (LLaMA Pro, arXiv 2401.02415): copies between a shallower model's layers that add nothing at first, so
that the child computes what the parent does. All else that is not named in `Inheritance.fresh` is a bitwise copy.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmboost import axes, ranges, sharding
from lmboost.errors import UserError, one_of
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig, Segment

# What a model has besides its layers: where that is in the parameters, and what the user calls it.
PARTS = {"embed": "embedding", "position_embed": "positions", "final_norm": "final_norm", "head": "head"}

_LAST_SCALES = ("attn_post_norm/scale", "mlp_post_norm/scale")


@dataclasses.dataclass(frozen=True)
class Inheritance:
    """What a model takes from its parent.

    Attributes:
      layers: for each layer of the child, the layer of the parent that it starts as, counted from 0.
      parent, child: what the two are; the child's layers have the sizes of those that they start as.
      fresh: parts (of PARTS) that are not inherited.
      silent: layers of the child whose output projections, or norms of what these give, begin as zeros.
    """

    layers: tuple[int, ...]
    parent: ModelConfig
    child: ModelConfig
    fresh: frozenset[str] = frozenset()
    silent: frozenset[int] = frozenset()

    def __call__(self, params: Mapping[str, Any], random: Mapping[str, Any]) -> dict[str, Any]:
        """The child's parameters.

        Args:
          params: the parent's.
          random: a parameter tree of the child, from which the fresh parts come.
        """
        rest = {name: (random if PARTS[name] in self.fresh else params)[name] for name in random if name != "layers"}
        return rest | {"layers": self.silence(self._take_layers(params))}

    def _take_layers(self, params: Mapping[str, Any]) -> Any:
        """The child's layers out of the parent's parameters, stacked as the child's segments are."""
        if len(self.parent.segments()) == 1:
            index = jnp.array(self.layers)
            return jax.tree.map(lambda x: jnp.take(x, index, axis=0), params["layers"])
        taken = [transformer.one_layer(self.parent, params, layer)[1] for layer in self.layers]
        return transformer.join_layers(
            [jax.tree.map(lambda *xs: jnp.stack(xs), *taken[s.start : s.stop]) for s in self.child.segments()]
        )

    def silence(self, layers: Any) -> Any:
        """The child's layers, those that are silent with zeros wherever they give to the residual stream."""
        if not self.silent:
            return layers

        def silenced(segment: Segment, stack: Any) -> Any:
            keep = np.array([layer not in self.silent for layer in range(segment.start, segment.stop)])

            def leaf(keys, x):
                path, kept = sharding.path_name(keys), keep.reshape(-1, *[1] * (x.ndim - 1))
                if path in _LAST_SCALES and self.child.zero_centred_norm:
                    return jnp.where(kept, x, -jnp.ones_like(x))
                return x * kept.astype(x.dtype) if self._gives(path) else x

            return jax.tree_util.tree_map_with_path(leaf, stack)

        return transformer.join_layers([silenced(*part) for part in transformer.split_layers(self.child, layers)])

    def _gives(self, path: str) -> bool:
        """Whether a layer is silent where this parameter of it, and all like it, are zeros."""
        if self.child.norm_placement == "both":
            # Not the projections before these norms: the gradient of a norm at zero is 1 / sqrt(norm_eps).
            return path in (*_LAST_SCALES, "attn_post_norm/bias", "mlp_post_norm/bias")
        norms = ("attn_norm/bias", "mlp_norm/bias") if self.child.norm_placement == "post" else ()
        return axes.sides(f"layers/{path}")[1] == ("embed",) or path in norms

    def report(self, params: Mapping[str, Any]) -> list[str]:
        """What became of each part of a parameter tree of the child, a line each."""
        parts = [PARTS[name] for name in sorted(set(params) - {"layers"})]
        became = [f"{part}: {'random' if part in self.fresh else 'inherited'}" for part in parts]
        silent = f"; {ranges.write(sorted(self.silent))} add nothing at first" if self.silent else ""
        return [f"layers: of the parent's {ranges.write(self.layers)}{silent}", *became]


def plan(layers: str, fresh: str, parent: ModelConfig, child: ModelConfig, field: str = "init.") -> Inheritance:
    """A child with some of the parent's layers in their order, by two fields of a config or of a command.

    Args:
      layers: the parent's layers, as "0-5,8"; empty is the first ones.
      fresh: parts that are not inherited, as "embedding,head".
      field: what these names begin with where the user gives them.

    Raises a UserError where layers are not the parent's, not in order, or not as many as the child has, and where the
    child is another model than these layers make.
    """
    if not child.num_layers:
        raise UserError("model.num_layers=0: there are no layers to inherit; expected at least 1.")
    layers = layers or f"0-{min(child.num_layers, parent.num_layers) - 1}"
    return _plan(layers, parse_layers(layers, parent.num_layers, f"{field}layers"), fresh, parent, child, field)


def plan_stack(layers: str, fresh: str, parent: ModelConfig, child: ModelConfig) -> Inheritance:
    """As `plan`, but with these layers over and over until the child has enough; empty is all of the parent's."""
    layers, chosen, times = _repeated(layers, parent, child)
    return _plan(layers, chosen * times, fresh, parent, child, "init.")


def plan_expand(layers: str, fresh: str, parent: ModelConfig, child: ModelConfig) -> Inheritance:
    """As `plan_stack`, but a layer's copies follow it and are silent: the child computes what these layers do."""
    layers, chosen, times = _repeated(layers, parent, child)
    taken = _plan(layers, tuple(layer for layer in chosen for _ in range(times)), fresh, parent, child, "init.")
    return dataclasses.replace(taken, silent=frozenset(i for i in range(child.num_layers) if i % times))


def _repeated(layers: str, parent: ModelConfig, child: ModelConfig) -> tuple[str, tuple[int, ...], int]:
    """(the layers as a user gives them, the same as numbers, how often the child has each)."""
    layers = layers or f"0-{parent.num_layers - 1}"
    chosen = parse_layers(layers, parent.num_layers, "init.layers")
    if child.num_layers % len(chosen):
        raise UserError(
            f"init.layers={layers!r} are {len(chosen)} layers, but model.num_layers={child.num_layers} is no "
            "multiple of that: layers are repeated a whole number of times."
        )
    return layers, chosen, child.num_layers // len(chosen)


def _plan(
    layers: str, chosen: tuple[int, ...], fresh: str, parent: ModelConfig, child: ModelConfig, field: str
) -> Inheritance:
    words = [word.strip() for word in fresh.split(",") if word.strip()]
    parts = frozenset(one_of(f"{field}fresh", word, PARTS.values()) for word in words)
    there = {"positions": child.position == "learned", "final_norm": child.final_norm, "head": not child.tie_embeddings}
    if missing := sorted(part for part in parts if not there.get(part, True)):
        raise UserError(f"{field}fresh={fresh!r}: the model has no {missing[0]} of its own; leave it out.")
    if len(chosen) != child.num_layers:
        raise UserError(
            f"{field}layers={layers!r} are {len(chosen)} of the parent's {parent.num_layers} layers, but "
            f"model.num_layers={child.num_layers}: set it to the number of layers that are taken."
        )
    check_models(of_layers(parent, chosen), child, field)
    return Inheritance(chosen, parent, child, parts)


def of_layers(parent: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The model that some layers of a parent make, with the sizes and kinds that these have."""
    sizes, kinds = parent.sizes, parent.kinds
    return parent.with_layers([sizes[layer] for layer in layers], [kinds[layer] for layer in layers])


def parse_layers(text: str, num_layers: int, field: str) -> tuple[int, ...]:
    """The layers in "0-5,8", counted from 0; a UserError where they are not the model's or not in order."""
    if not num_layers:
        raise UserError(f"{field}: the parent has no layers. It can only grow: init.kind='continue' and init.grow.")
    layers: list[int] = []
    wrong = "is neither a layer nor a range. Give layers as in '0-5,8'."
    for _, first, last in ranges.parse(text, f"{field}={text!r}", wrong):
        last = min(last, max(first, num_layers))  # one too many is enough to tell
        layers += range(first, last + 1) if last >= first else [first, last]
    if over := [i for i in layers if i >= num_layers]:
        raise UserError(f"{field}={text!r}: there is no layer {over[0]}; the parent has layers 0 to {num_layers - 1}.")
    if sorted(set(layers)) != layers:
        raise UserError(f"{field}={text!r}: layers must be named once, in the parent's order.")
    return tuple(layers)


def check_models(taken: ModelConfig, child: ModelConfig, field: str) -> None:
    """Raises a UserError unless the child is the model that the layers which it takes make."""
    same = of_layers(child, range(child.num_layers))  # equal sizes are written alike
    if wrong := taken.differences(same):
        a, b = vars(taken), vars(same)
        differ = "; ".join(f"{name} is {b[name]!r}, the parent's {a[name]!r}" for name in wrong)
        raise UserError(
            f"{field}path is a model that these layers can't be taken from: in this config's model, {differ}. Set "
            f"{', '.join(f'model.{name}={a[name]!r}' for name in wrong)}."
        )
