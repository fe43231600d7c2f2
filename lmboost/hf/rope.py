"""Rotary positions in a config.json: keys of their own with `rope_scaling`, or all of them in `rope_parameters`.

Sources: modeling_rope_utils.py of transformers 4.x and 5.x, and the files of the published models.
"""

import math
from collections.abc import Mapping
from typing import Any

from lmboost.hf.family import Keys
from lmboost.models.model_config import ModelConfig

KEYS = {"rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": 1.0}
_OWN = ("rope_theta", "partial_rotary_factor")
_TYPES = ("rope_type", "type")
_ORIGINAL = "original_max_position_embeddings"
# The numbers of each scaling: as they are called there and here. Of yarn, "beta" are turns within the original length.
_NUMBERS = {
    "llama3": {
        "factor": "rope_scaling_factor", "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor", _ORIGINAL: "rope_original_seq_len",
    },
    "linear": {"factor": "rope_scaling_factor"},
    "dynamic": {"factor": "rope_scaling_factor"},
    "yarn": {
        "factor": "rope_scaling_factor", "beta_slow": "rope_low_freq_factor", "beta_fast": "rope_high_freq_factor",
        _ORIGINAL: "rope_original_seq_len", "attention_factor": "rope_attention_factor",
    },
    "longrope": {
        "factor": "rope_scaling_factor", _ORIGINAL: "rope_original_seq_len",
        "attention_factor": "rope_attention_factor",
    },
}  # fmt: skip
_FACTORS = {"short_factor": "rope_short_factors", "long_factor": "rope_long_factors"}
_NAMES = {"su": "longrope", "default": "default"} | {name: name for name in _NUMBERS}  # Phi-3 began with "su"


def read(
    c: Keys, head_dim: int, theta: str = "rope_theta", fraction: str = "partial_rotary_factor", by_layer: bool = False
) -> dict[str, Any]:
    """Fields of a ModelConfig; a UserError where positions are not of a kind that the decoder has.

    Args:
      theta, fraction: the keys that say so beside `rope_scaling`.
      by_layer: whether `rope_parameters` may have those of full layers and of others; `read_local` reads the latter.
    """
    where = "rope_scaling" if c["rope_scaling"] else "rope_parameters"
    given = c[where] or {}
    if by_layer and set(given) == {"full_attention", "sliding_attention"}:
        given = given["full_attention"]
    kind = next((given[key] for key in _TYPES if given.get(key)), "default")
    if kind not in _NAMES:
        raise c.refuse(
            where, given, f"the decoder has no rotary positions of type {kind!r}, only default, {', '.join(_NUMBERS)}"
        )
    kind = _NAMES[kind]
    if kind == "longrope" and _ORIGINAL in c and given.get(_ORIGINAL) is None:
        given = given | {_ORIGINAL: c[_ORIGINAL]}
    rope = {"rope_theta": c[theta], "partial_rotary_factor": c[fraction]}
    rope |= {key: value for key, value in given.items() if key not in _TYPES and value is not None}
    lists = {key: rope.pop(key) for key in _FACTORS if kind == "longrope" and key in rope}
    if kind == "yarn":
        rope = _yarn(c, where, rope)
    for key, value in rope.items():
        if key not in (*_OWN, *_NUMBERS.get(kind, ())):
            raise c.refuse(where, given, f"its key {key!r} is not known, and may change what is computed")
        if not _is_number(value):
            raise c.refuse(where if key in given else theta, value, f"expected a positive number as {key}")
    turned = int(head_dim * rope["partial_rotary_factor"])
    if turned % 2 or not 0 < turned <= head_dim:
        raise c.refuse(fraction, rope["partial_rotary_factor"], f"{turned} of {head_dim} features cannot be rotated")
    out = {"rope_theta": float(rope["rope_theta"]), "rope_fraction": float(rope["partial_rotary_factor"])}
    return out if kind == "default" else out | _scaling(c, where, kind, rope, lists)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < math.inf


def _scaling(c: Keys, where: str, kind: str, rope: Mapping[str, Any], lists: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a kind of scaling, absent numbers filled in as transformers does."""
    numbers = {key: value for key, value in rope.items() if key not in _OWN}
    length = c["max_position_embeddings"]
    if _ORIGINAL in _NUMBERS[kind]:
        numbers.setdefault(_ORIGINAL, length)
    if kind in ("yarn", "longrope"):
        numbers.setdefault("factor", length / numbers[_ORIGINAL])
    if kind == "yarn":
        numbers = {"beta_slow": 1.0, "beta_fast": 32.0, "attention_factor": _mscale(numbers["factor"])} | numbers
    if kind == "longrope":
        s = numbers["factor"]
        of_paper = math.sqrt(1 + math.log(s) / math.log(numbers[_ORIGINAL])) if min(s, numbers[_ORIGINAL]) > 1 else 1.0
        numbers.setdefault("attention_factor", of_paper)
    if missing := [key for key in (*_NUMBERS[kind], *_FACTORS) if key not in {*numbers, *lists}]:
        if missing[0] in _NUMBERS[kind] or kind == "longrope":
            raise c.refuse(where, dict(c[where]), f"expected {missing[0]!r} in it")
    for key, value in lists.items():
        if not isinstance(value, list) or not value or not all(map(_is_number, value)):
            raise c.refuse(where, value, f"expected a list of positive numbers as {key}")
    out = {"rope_scaling": kind} | {ours: float(numbers[theirs]) for theirs, ours in _NUMBERS[kind].items()}
    if kind != "linear":  # "dynamic" has no number of its own for it
        out["rope_original_seq_len"] = int(numbers.get(_ORIGINAL, length))
    return out | {_FACTORS[key]: ",".join(repr(float(x)) for x in value) for key, value in lists.items()}


def _yarn(c: Keys, where: str, rope: dict[str, Any]) -> dict[str, Any]:
    """The settings of yarn without those from which transformers makes its attention factor, and its switch."""
    rope = dict(rope)
    if rope.pop("truncate", True) is not True:
        raise c.refuse(where, dict(c[where]), "expected its 'truncate' to be true, or absent")
    scales = [rope.pop(key, None) for key in ("mscale", "mscale_all_dim")]
    if all(map(_is_number, scales)) and "attention_factor" not in rope and _is_number(rope.get("factor")):
        rope["attention_factor"] = _mscale(rope["factor"], scales[0]) / _mscale(rope["factor"], scales[1])
    return rope


def _mscale(factor: float, scale: float = 1.0) -> float:
    """Of YaRN (arXiv 2309.00071, equation 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write(m: ModelConfig) -> dict[str, Any]:
    """In the older keys, which every version of transformers reads."""
    if not m.scales_positions:
        return {"rope_theta": m.rope_theta, "rope_scaling": None}
    scaling = {"rope_type": m.rope_scaling}
    scaling |= {theirs: getattr(m, ours) for theirs, ours in _NUMBERS[m.rope_scaling].items()}
    if m.rope_scaling == "longrope":
        scaling |= {theirs: [float(x) for x in getattr(m, ours).split(",")] for theirs, ours in _FACTORS.items()}
    out = {"rope_theta": m.rope_theta, "rope_scaling": scaling}
    return out | ({"max_position_embeddings": m.rope_original_seq_len} if m.rope_scaling == "dynamic" else {})


def read_local(c: Keys, default: float) -> float:
    """The base of layers that have a window, whose positions are not scaled (Gemma 3, OLMo 3).

    default: where `rope_parameters` does not say.
    """
    given = (c["rope_parameters"] or {}).get("sliding_attention")
    if given is None:
        return float(default)
    if next((given[key] for key in _TYPES if given.get(key)), "default") != "default":
        raise c.refuse("rope_parameters", given, "expected the default type in layers that have a window")
    if not _is_number(given.get("rope_theta")) or not set(given) <= {"rope_theta", *_TYPES}:
        raise c.refuse("rope_parameters", given, "expected a positive number as rope_theta, and nothing else")
    return float(given["rope_theta"])
