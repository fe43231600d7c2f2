"""What a config.json says, key by key: how an architecture is described, and the settings that several share.

Sources: the configuration and modelling files of transformers 4.x and 5.x, and the files of the published models.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lmboost.errors import UserError
from lmboost.models.model_config import NEUTRAL, LayerSizes, ModelConfig

# Fields that `hf.rope` writes for every family that has rotary positions.
_ROTARY = {
    f.name for f in dataclasses.fields(ModelConfig) if f.name.startswith("rope_") and f.name != "rope_local_theta"
}


class Keys:
    """The keys of a config.json that matter to its family, absent ones filled in."""

    def __init__(self, path: pathlib.Path, values: Mapping[str, Any]):
        self.path, self._values = path, values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def need(self, key: str, *expected: Any) -> None:
        """Raises a UserError where the key has a value for which the decoder has no switch."""
        if self[key] not in expected:
            known = " or ".join(map(repr, expected))
            raise self.refuse(key, self[key], f"the decoder computes only what {known} stands for")

    def refuse(self, key: str, value: Any, why: str) -> UserError:
        return UserError(f"{self.path}: {key}={value!r}: {why}. Choose another model.")


@dataclasses.dataclass(frozen=True)
class Values:
    """Values that a switch can have, where they are not listed: what they are in words, and whether one is of them."""

    words: str
    holds: Callable[[Any], bool]

    def __contains__(self, value: Any) -> bool:
        return self.holds(value)

    def __str__(self) -> str:
        return self.words


ANYTHING = Values("anything", lambda value: True)


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
      keys: of config.json, those that change what is computed, each with what transformers takes where it is absent.
        None stands for one that may be absent; KINDS says of what type.
      names: the keys that are fields of a ModelConfig under another name.
      read, write: the other fields from config.json, and the other keys from a ModelConfig.
      switches: fields of a ModelConfig, and the values that they can have in this family. Of those that are neither
        here nor in `names` the default alone, but for sizes and what says how rotary positions turn.
      equal: pairs of fields that are equal in this family.
      follows: fields that are what the others make them.
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
    follows: Mapping[str, Callable[[ModelConfig], Any]] = dataclasses.field(default_factory=dict)
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
        free = {*NEUTRAL, *LayerSizes._fields, "layer_sizes", *self.names.values()} | _ROTARY
        fields = {f.name: (f.default,) for f in dataclasses.fields(ModelConfig) if f.name not in free} | self.switches
        out = [
            f"{name}={getattr(model, name)!r} (expected {_in_words(allowed)})"
            for name, allowed in fields.items()
            if getattr(model, name) not in allowed
        ]
        out += [
            f"{name}={getattr(model, name)!r} (expected {value!r})"
            for name, value in ((name, value_of(model)) for name, value_of in self.follows.items())
            if getattr(model, name) != value
        ]
        out += [
            f"{a}={getattr(model, a)!r} and {b}={getattr(model, b)!r} (expected equal)"
            for a, b in self.equal
            if getattr(model, a) != getattr(model, b)
        ]
        return out


def _in_words(allowed: Any) -> str:
    return str(allowed) if isinstance(allowed, Values) else " or ".join(map(repr, allowed))


# ---------------------------------------------------------------- keys that several architectures have

# Of keys whose default does not tell; of others that may be absent, a whole number.
KINDS = {
    "rope_parameters": dict, "rope_scaling": dict, "layer_types": list, "no_rope_layers": list, "rope_theta": float,
    "partial_rotary_factor": float, "attn_logit_softcapping": float, "final_logit_softcapping": float,
    "hidden_act": str, "activation": str, "auto_map": dict,
}  # fmt: skip
# As transformers names an activation: ours. "gelu_new" and those after it are one formula.
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "relu": "relu"} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"
)
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
NAMES = {  # of all but GPT-2
    "vocab_size": "vocab_size", "num_hidden_layers": "num_layers", "hidden_size": "d_model",
    "num_attention_heads": "num_heads", "max_position_embeddings": "max_seq_len",
    "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
BIASED = dict.fromkeys(("qkv_bias", "attn_out_bias"), (False, True))


def read_biases(c: Keys) -> dict[str, bool]:
    return {"qkv_bias": c["attention_bias"], "attn_out_bias": c["attention_bias"]}


# ---------------------------------------------------------------- tensors


def linear(name: str, weight: str, bias: str, *paths: str) -> tuple:
    """A projection: its published name, the layouts of weight and bias, our parameters that hold it."""
    return (
        (f"{name}.weight", weight, tuple(f"{path}/kernel" for path in paths)),
        (f"{name}.bias", bias, tuple(f"{path}/bias" for path in paths)),
    )


def norm(name: str, path: str) -> tuple:
    return ((f"{name}.weight", "d->d", (f"{path}/scale",)), (f"{name}.bias", "d->d", (f"{path}/bias",)))
