"""A model of unequal layers as one of equal layers that computes the same: its layers are filled up with zeros.

Formats that know one size for all layers (the Hugging Face Hub's) can hold such a model.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import slots, subnet, view


def wide_config(config: ModelConfig, heads: str = "any") -> ModelConfig:
    """The config of equal layers that has room for every layer of `config`.

    A layer has as many query heads for each key/value head as any layer has.

    heads: what an architecture asks of their number: "any"; "divide": that it divides the model's width, as in Llama;
      "full": that heads times their size are the width, as in GPT-2. There are more or larger heads where needed.

    Raises a UserError where there is no such config, or where a head of its size lacks the rotary frequencies of a
    smaller one.
    """
    smaller = config.head_dims
    room = max(sizes.num_heads // sizes.num_kv_heads for sizes in config.sizes)
    wide = dataclasses.replace(config, layer_sizes="", num_heads=room * config.num_kv_heads)
    for new in _more_heads(wide, heads):
        if all(view.has_room(new, features) for features in smaller):
            return new
    for features in smaller:
        view.feature_places(wide, features)  # raises where that is the reason
    raise UserError(
        f"num_heads={wide.num_heads} of head_dim={wide.head_dim} can't be filled up with zeros so that heads "
        f"{'times their size are' if heads == 'full' else 'divide'} the width d_model={wide.d_model}, as they must in "
        "this architecture: cut fewer heads, or a wider model."
    )


def _more_heads(wide: ModelConfig, heads: str) -> Iterator[ModelConfig]:
    """Models like it that have room for its heads and as many as `heads` asks for, the least first."""
    width, ratio = wide.d_model, wide.num_heads // wide.num_kv_heads
    if heads == "any":
        shapes = [(wide.num_heads, wide.head_dim)]
    elif heads == "divide":
        shapes = [(count, wide.head_dim) for count in range(wide.num_heads, width + 1) if width % count == 0]
    else:
        sizes = range(wide.head_dim, width // wide.num_heads + 1)
        shapes = [(width // head_dim, head_dim) for head_dim in sizes if width % head_dim == 0]
    for count, head_dim in shapes:
        # Where each query head has its own keys and values, it keeps them.
        groups = [count] if ratio == 1 else range(wide.num_kv_heads, count // ratio + 1)
        for kv_heads in groups:
            if count % kv_heads == 0:
                yield dataclasses.replace(wide, head_dim=head_dim, num_heads=count, num_kv_heads=kv_heads)


def widen(config: ModelConfig, params: Mapping[str, Any], wide: ModelConfig) -> dict[str, Any]:
    """The parameters of `wide`, which `wide_config` made of `config`: they compute the same, up to rounding.

    Heads of fewer features are rescaled, so that logits divided by the square root of the larger size are the same.
    """
    if config == wide:
        return dict(params)
    width = np.arange(config.d_model, dtype=np.int32)
    stacks = []
    for segment, stack in transformer.split_layers(config, params["layers"]):
        own = dataclasses.replace(segment.config, num_layers=segment.stop - segment.start)
        hull = dataclasses.replace(wide, num_layers=own.num_layers)
        held, scales = view.place_layers(own, hull, subnet.whole(own).layers)
        stacks.append(view.rescale_attention(own, slots.gather_layers(own, stack, width, held), scales))
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.concatenate(xs), *stacks)}
