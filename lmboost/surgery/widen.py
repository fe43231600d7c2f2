"""A model of unequal layers as one of equal layers that computes the same: its layers are filled up with zeros.

Formats that know one size for all layers (the Hugging Face Hub's) can hold such a model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import slots, subnet, view


def wide_config(config: ModelConfig, full_width: bool = False) -> ModelConfig:
    """The config of equal layers that has room for every layer of `config`.

    A layer has as many query heads for each key/value head as any layer has.

    full_width: heads times their size must be the model's width, as in GPT-2: there are more or larger heads.

    Raises a UserError where there is no such config, or where a head of its size lacks the rotary frequencies of a
    smaller one.
    """
    sizes = config.sizes
    room = max(heads // groups for heads, groups, _, _ in sizes)
    wide = dataclasses.replace(config, layer_sizes="", num_heads=room * config.num_kv_heads)
    if full_width and wide.num_heads * wide.head_dim != wide.d_model:
        wide = _full_width(wide, {features for _, _, features, _ in sizes})
    for _, _, features, _ in sizes:
        view.feature_places(wide, features)
    return wide


def _full_width(wide: ModelConfig, smaller: set[int]) -> ModelConfig:
    """With the smallest heads that have room for all, and as many as make up the width."""
    ratio = wide.num_heads // wide.num_kv_heads
    for head_dim in range(wide.head_dim, wide.d_model + 1):
        heads = wide.d_model // head_dim
        if heads < wide.num_heads:
            break
        new = dataclasses.replace(wide, head_dim=head_dim, num_heads=heads, num_kv_heads=heads // ratio)
        if heads * head_dim == wide.d_model and heads % ratio == 0 and all(view.has_room(new, n) for n in smaller):
            return new
    raise UserError(
        f"num_heads={wide.num_heads} of head_dim={wide.head_dim} can't be filled up with zeros to the width d_model="
        f"{wide.d_model}, which heads times their size must be in this architecture: cut fewer heads, or a wider model."
    )


def widen(config: ModelConfig, params: Mapping[str, Any], wide: ModelConfig) -> dict[str, Any]:
    """The parameters of `wide`, which `wide_config` made of `config`: they compute the same, up to rounding.

    Heads of fewer features are rescaled, so that logits divided by the square root of the larger size are the same.
    """
    if config == wide:
        return dict(params)
    width = np.arange(config.d_model, dtype=np.int32)
    stacks = []
    for segment, stack in transformer.split_layers(config, params["layers"]):
        cut = subnet.whole(dataclasses.replace(segment.config, num_layers=segment.stop - segment.start))
        held, scales = view.place_layers(
            segment.config, dataclasses.replace(wide, num_layers=len(cut.layers)), cut.layers
        )
        stacks.append(view.rescale_attention(slots.gather_layers(segment.config, stack, width, held), scales))
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.concatenate(xs), *stacks)}
