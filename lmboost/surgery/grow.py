"""A model that becomes deeper between two steps of its training, with the moments of its optimizer.

Each layer of the parent stays, and new ones are put among them (`GROWTHS`). Copies of whole layers are stacking (arXiv
2405.15319) and interposing (arXiv 2011.13635); copies or random layers whose output projections are zero add nothing at
first, so that the child computes what the parent does (arXiv 2401.02415, 2511.04981, which begins with no layer at
all; then what is new is random). Moments of what was there are
kept, those of what is new begin at zero. Where a norm follows each sublayer and another goes before it (Gemma 2), that
norm is zero instead.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmboost import ranges
from lmboost.errors import UserError, one_of
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.surgery.inherit import Inheritance, check_models, of_layers

# What a new layer begins as: (a copy of a parent's layer, or else random; whether it adds nothing at first).
GROWTHS = {
    "stack": (True, False), "interpose": (True, False), "zero": (True, True), "identity": (False, True),
    "random": (False, False),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Growth:
    """From a parent's state to that of a deeper child.

    Attributes:
      layers: for each layer of the child the parent's that it is, or stands behind; () of a parent without layers.
      kept: which of the child's layers are the parent's own.
      kind: of `GROWTHS`.
    """

    layers: tuple[int, ...]
    kept: frozenset[int]
    kind: str
    parent: ModelConfig
    child: ModelConfig

    def __call__(self, params: Mapping[str, Any], random: Mapping[str, Any]) -> dict[str, Any]:
        """The child's parameters, from the parent's and from a random tree of the child."""
        copies, silent = GROWTHS[self.kind]
        new = frozenset(range(self.child.num_layers)) - self.kept
        if copies:
            return self._taken(new if silent else frozenset())(params, random)
        mixed = self.moments(params, random)
        return mixed | {"layers": self._taken(new if silent else frozenset()).silence(mixed["layers"])}

    def moments(self, old: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
        """The same of a tree that mirrors parameters: of the parent's layers what they had, of new ones `fresh`."""
        if not self.parent.num_layers:
            return {**old, "layers": fresh["layers"]}
        return self._behind(self._taken()(old, fresh), fresh)

    def state(self, old: Any, fresh: Any) -> Any:
        """Of an optimizer's state whose trees mirror {"model": parameters, ...}; counters go on."""
        mirrors = lambda x: isinstance(x, Mapping) and "model" in x  # noqa: E731

        def grown(a: Any, b: Any) -> Any:
            return {**a, "model": self.moments(a["model"], b["model"])} if mirrors(a) else a

        return jax.tree.map(grown, old, fresh, is_leaf=mirrors)

    def _taken(self, silent: frozenset[int] = frozenset()) -> Inheritance:
        return Inheritance(self.layers, self.parent, self.child, silent=silent)

    def _behind(self, tree: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        """The layers that are kept of one tree of the child, the others of another."""
        stacks = []
        pairs = (transformer.split_layers(self.child, x["layers"]) for x in (tree, new))
        for (segment, a), (_, b) in zip(*pairs, strict=True):
            keep = np.array([layer in self.kept for layer in range(segment.start, segment.stop)])
            choose = lambda x, y, keep=keep: jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, y)  # noqa: E731
            stacks.append(jax.tree.map(choose, a, b))
        return {**tree, "layers": transformer.join_layers(stacks)}

    def report(self) -> str:
        """What the new layers are, in a line."""
        new = sorted(set(range(self.child.num_layers)) - self.kept)
        copies, silent = GROWTHS[self.kind]
        what = f"copies of the parent's {ranges.write([self.layers[i] for i in new])}" if copies else "random"
        return f"layers {ranges.write(new)} are new: {what}{', and add nothing at first' if silent else ''}"


def plan(kind: str, parent: ModelConfig, child: ModelConfig) -> Growth:
    """How a parent becomes the child by `init.grow`.

    "stack" repeats the parent as a whole; the others put new layers behind each of its layers, as evenly as they go.

    Raises a UserError where the child is not deeper, is not a multiple for "stack", or differs in more than depth.
    """
    one_of("init.grow", kind, GROWTHS)
    n, deeper = parent.num_layers, child.num_layers
    if deeper <= n:
        raise UserError(
            f"init.grow={kind!r}: model.num_layers={deeper}, but the parent has {n} layers; give more than that, or "
            "leave init.grow empty."
        )
    if not n:
        return _from_nothing(kind, parent, child)
    if kind == "stack" and deeper % n:
        raise UserError(
            f"init.grow='stack': model.num_layers={deeper} is no multiple of the parent's {n} layers, which are "
            "repeated as a whole: give a multiple, or another init.grow."
        )
    if kind == "stack":
        layers, kept = tuple(i % n for i in range(deeper)), range(n)
    else:
        kept = [layer * deeper // n for layer in range(n)]
        layers = tuple(sum(first <= i for first in kept) - 1 for i in range(deeper))
    check_models(of_layers(parent, layers), child, "init.")
    return Growth(layers, frozenset(kept), kind, parent, child)


def _from_nothing(kind: str, parent: ModelConfig, child: ModelConfig) -> Growth:
    """As `plan`, of a parent that has no layer."""
    copies, _ = GROWTHS[kind]
    if copies:
        others = " or ".join(repr(name) for name, (copies, _) in GROWTHS.items() if not copies)
        raise UserError(f"init.grow={kind!r} copies layers, and the parent has none: give {others}.")
    layers = {name: getattr(child, name) for name in ("num_layers", "layer_sizes", "layer_kinds")}
    check_models(dataclasses.replace(parent, **layers), child, "init.")
    return Growth((), frozenset(), kind, parent, child)
