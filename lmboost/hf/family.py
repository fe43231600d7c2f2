"""What a config.json says, key by key: how an architecture is described, and the settings that several share.

Sources: the configuration and modelling files of transformers 4.x and 5.x, and the files of the published models.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig


class Keys:
    """The keys of a config.json that matter to its family, absent ones filled in."""

    def __init__(self, path: pathlib.Path, values: Mapping[str, Any]):
        self.path, self._values = path, values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def need(self, key: str, *expected: Any) -> None:
        """Raises a UserError where the key has a value for which the decoder has no switch."""
        if self[key] not in expected:
            known = " or ".join(map(repr, expected))
            raise self.refuse(key, self[key], f"the decoder computes only what {known} stands for")

    def refuse(self, key: str, value: Any, why: str) -> UserError:
        return UserError(f"{self.path}: {key}={value!r}: {why}. Choose another model.")


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
      keys: of config.json, those that change what is computed, each with what transformers takes where it is absent.
        None stands for one that may be absent; KINDS says of what type.
      names: the keys that are fields of a ModelConfig under another name.
      read, write: the other fields from config.json, and the other keys from a ModelConfig.
      switches: fields of a ModelConfig, and the values that they can have in this family.
      equal: pairs of fields that are equal in this family.
      heads: what must hold of their number, as in `surgery.widen.wide_config`; models are filled up with zeros for it.
      prefix: of the names of tensors; files of the bare model leave it out.
      tensors: (name, layout, parameters), as in `weights.Layout`; "*" counts the layers. Those whose parameters a
        model does not have, biases mostly, do not count.
    """

    architecture: str
    model_type: str
    keys: Mapping[str, Any]
    names: Mapping[str, str]
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    switches: Mapping[str, Any]
    prefix: str
    tensors: tuple[tuple[str, str, tuple[str, ...]], ...]
    equal: tuple[tuple[str, str], ...] = ()
    heads: str = "any"

    def model(self, keys: Keys, dtype: str) -> ModelConfig:
        """The ModelConfig of a config.json; a UserError where the decoder lacks what it asks for."""
        fields = {ours: keys[theirs] for theirs, ours in self.names.items()} | self.read(keys)
        return ModelConfig(**fields, dtype=dtype).validate(f"{keys.path}, as a ModelConfig")

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """The keys of the config.json of a model that fits."""
        return {theirs: getattr(model, ours) for theirs, ours in self.names.items()} | self.write(model)

    def misfits(self, model: ModelConfig) -> list[str]:
        """What of a model this family can't express, in the words of the model's config."""
        out = [
            f"{name}={getattr(model, name)!r} (expected {' or '.join(map(repr, allowed))})"
            for name, allowed in self.switches.items()
            if getattr(model, name) not in allowed
        ]
        out += [
            f"{a}={getattr(model, a)!r} and {b}={getattr(model, b)!r} (expected equal)"
            for a, b in self.equal
            if getattr(model, a) != getattr(model, b)
        ]
        return out


# ---------------------------------------------------------------- keys that several architectures have

# Of keys whose default does not tell; of others that may be absent, a whole number.
KINDS = {
    "rope_parameters": dict, "rope_scaling": dict, "layer_types": list, "rope_theta": float,
    "partial_rotary_factor": float,
}  # fmt: skip
# As transformers names an activation: ours. "gelu_new" and those after it are one formula.
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "relu": "relu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"
)
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
ROPE_KEYS = {"rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": 1.0}
_ATTENTIONS = ("full_attention", "sliding_attention")
_LLAMA3 = {  # the numbers of its scaling
    "factor": "rope_scaling_factor", "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor", "original_max_position_embeddings": "rope_original_seq_len",
}  # fmt: skip


def read_rope(c: Keys, head_dim: int, theta: str = "rope_theta", fraction: str = "partial_rotary_factor") -> dict:
    """Rotary settings of either kind: keys of their own with `rope_scaling`, or all of them in `rope_parameters`."""
    where = "rope_scaling" if c["rope_scaling"] else "rope_parameters"
    given = c[where] or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise c.refuse(where, given, f"the decoder has no rotary positions of type {kind!r}, only default and llama3")
    rope = {"rope_theta": c[theta], "partial_rotary_factor": c[fraction]}
    rope |= {key: value for key, value in given.items() if key not in ("rope_type", "type") and value is not None}
    for key, value in rope.items():
        if key not in ("rope_theta", "partial_rotary_factor", *(_LLAMA3 if kind == "llama3" else ())):
            raise c.refuse(where, given, f"its key {key!r} is not known, and may change what is computed")
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise c.refuse(where if key in given else theta, value, f"expected a positive number as {key}")
    turned = int(head_dim * rope["partial_rotary_factor"])
    if turned % 2 or not 0 < turned <= head_dim:
        raise c.refuse(fraction, rope["partial_rotary_factor"], f"{turned} of {head_dim} features cannot be rotated")
    out = {"rope_theta": float(rope["rope_theta"]), "rope_fraction": float(rope["partial_rotary_factor"])}
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
        if missing := [key for key in _LLAMA3 if key not in rope]:
            raise c.refuse(where, given, f"expected {missing[0]!r} in it")
        out |= {ours: float(rope[theirs]) for theirs, ours in _LLAMA3.items()}
        out["rope_original_seq_len"] = int(out["rope_original_seq_len"])
    return out


def write_rope(m: ModelConfig) -> dict[str, Any]:
    """In the older keys, which every version of transformers reads."""
    if m.rope_scaling_factor == 1.0:
        return {"rope_theta": m.rope_theta, "rope_scaling": None}
    scaling = {"rope_type": "llama3"} | {theirs: getattr(m, ours) for theirs, ours in _LLAMA3.items()}
    return {"rope_theta": m.rope_theta, "rope_scaling": scaling}


def read_window(c: Keys) -> int:
    """The sliding window of a Qwen config, where it may be that of some layers alone; 0 where there is none."""
    layers, window = c["num_hidden_layers"], c["sliding_window"] if c["use_sliding_window"] else None
    full = min(c["max_window_layers"], layers) if window else layers
    if given := c["layer_types"]:
        alike = len(given) == layers and any(given == [kind] * len(given) for kind in _ATTENTIONS)
    else:
        alike = full in (0, layers)
    if not alike:
        key, value = ("layer_types", given) if given else ("max_window_layers", full)
        raise c.refuse(key, value, f"expected {' or '.join(_ATTENTIONS)} in all {layers} layers alike")
    if (given[0] if given else _ATTENTIONS[not full]) == "full_attention":
        return 0
    if not window:
        raise c.refuse("sliding_window", c["sliding_window"], "expected its size, as the layers have a window")
    return window
