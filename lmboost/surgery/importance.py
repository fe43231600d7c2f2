"""How much each part of a model does on held-out text, and the order in which a cut should take the parts.

The statistics are those of Minitron (arXiv 2407.14679, section 2.2), forward passes alone, as means over tokens:

    width    |x| of each feature at the inputs of attention and MLP, over all layers
    heads    L2 norm of a query head's output, before the output projection; a group is the sum of its heads
    units    |h| of each hidden unit of the MLP, after nonlinearity and gate
    layers   1 - cos(state in, state out), as in ShortGPT (arXiv 2403.03853)

The width is measured behind the norms, not on the residual stream, because that is what the layers read: the stream
itself grows with depth and is ruled by a few huge features, which a norm's scale may well take back. (Where a model
has its norms on the outputs, its layers read the stream.)

Shape suffixes: B batch, T tokens, D model width, K key/value heads, G query heads of each, H = K * G, N head size,
F MLP width, L layers.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models import layer_kinds, transformer
from lmboost.models.block import Block
from lmboost.models.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Importance:
    """Means over tokens, float64; larger is more important."""

    width_D: np.ndarray
    layers_L: np.ndarray
    heads_LxKxG: np.ndarray
    units_LxF: np.ndarray
    head_dim: int  # N; features of a head are not measured

    def orders(self) -> dict[str, tuple]:
        """The fields of a `search.space.Orders`: the most important entries first, of equal ones the lower.

        A key/value head is as important as its query heads together. Features come in the parent's order: the first
        ones of a head are rotary pairs that belong together.
        """
        return {
            "width": _falling(self.width_D),
            "layers": _falling(self.layers_L),
            "groups": tuple(_falling(heads_KxG.sum(1)) for heads_KxG in self.heads_LxKxG),
            "heads": tuple(tuple(map(_falling, heads_KxG)) for heads_KxG in self.heads_LxKxG),
            "features": (tuple(range(self.head_dim)),) * len(self.layers_L),
            "units": tuple(map(_falling, self.units_LxF)),
        }


def _falling(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argsort(-values, kind="stable"))


def measure(config: ModelConfig, params: Any, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh) -> Importance:
    """The importance of every part of a model, from one forward pass over some batches.

    Args:
      config, params: of a model whose layers are all of one size; any dtype of compute, the statistics are float32.
      batches: this process's rows of held-out text as `loader.Loader.eval_batches` gives them, of one shape: int32
        [B, T] "tokens", "segment_ids" (0 is padding, which does not count) and "positions".
      mesh: the mesh in use, over which the rows are spread; B over all processes is a multiple of its shards.

    Raises a UserError where layers differ in size, and where there is no token.
    """
    if len(config.segments()) > 1:
        raise UserError(
            f"model.layer_sizes={config.layer_sizes!r}: importance is measured in models whose layers are all of one "
            "size. Take one of these as the parent, or give search.sort='none'."
        )
    names = ("tokens", "segment_ids", "positions")
    found = [sums(config, params, *sharding.put_batch({n: b[n] for n in names}, mesh).values()) for b in batches]
    total = {name: np.sum([np.asarray(x[name], np.float64) for x in found], axis=0) for name in (found or [{}])[0]}
    if not total or not total["tokens"]:
        raise UserError("importance: the held-out text has no token. Give a validation split that is not empty.")
    mean = {name: x / total["tokens"] for name, x in total.items()}
    groups = (config.num_layers, config.num_kv_heads, config.num_heads // config.num_kv_heads)
    return Importance(
        mean["width"].sum(0) / (2 * config.num_layers), mean["layers"], mean["heads"].reshape(groups), mean["units"],
        config.head_dim,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def sums(config: ModelConfig, params: Any, tokens_BxT, segment_ids_BxT, positions_BxT) -> dict[str, jax.Array]:
    """The statistics of one batch, summed over its tokens, float32, on every device alike.

    Layers are scanned: one of them is compiled, and only one's activations are held at a time.

    Returns: "tokens" [], how many there are; "width" [L, D], the sum over both inputs of a layer; "layers" [L];
      "heads" [L, H]; "units" [L, F].
    """
    counts_BxT = (segment_ids_BxT > 0).astype(jnp.float32)
    # The compiler leaves out all of this pass but the embedding.
    _, states = transformer.apply(config, params, tokens_BxT, segment_ids_BxT, positions_BxT, capture=(0,))

    def over_tokens(x):
        return jnp.sum(counts_BxT.reshape(counts_BxT.shape + (1,) * (x.ndim - 2)) * x, axis=(0, 1))

    def layer_step(kind, x_BxTxD, layer_and_params):
        layer, weights = layer_and_params
        (y_BxTxD, _), seen = Block(config.of_kind(kind), parent=None).apply(
            {"params": weights}, x_BxTxD, segment_ids_BxT, positions_BxT, layer, mutable=["intermediates"]
        )
        ((attn_in_BxTxD, heads_BxTxHxN),) = seen["intermediates"]["attn"]["inputs_and_heads"]
        ((mlp_in_BxTxD, units_BxTxF),) = seen["intermediates"]["mlp"]["inputs_and_units"]
        return y_BxTxD, {
            "width": over_tokens(_size(attn_in_BxTxD) + _size(mlp_in_BxTxD)),
            "layers": over_tokens(1 - _cosine(x_BxTxD, y_BxTxD)),
            "heads": over_tokens(jnp.linalg.norm(heads_BxTxHxN.astype(jnp.float32), axis=-1)),
            "units": over_tokens(_size(units_BxTxF)),
        }

    step_of, layers = functools.partial(functools.partial, layer_step), jnp.arange(config.num_layers)
    _, of_layers = layer_kinds.scan(step_of, states[0], config.kinds, layers, params["layers"])
    found = of_layers | {"tokens": counts_BxT.sum()}
    return {name: sharding.constrain(x, (None,) * x.ndim) for name, x in found.items()}


def _size(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32))


def _cosine(a_BxTxD: jax.Array, b_BxTxD: jax.Array) -> jax.Array:
    """Cosine of the angle between two states, float32 [B, T]; 0 where one of them is 0."""
    a, b = a_BxTxD.astype(jnp.float32), b_BxTxD.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-30)
