"""How the search for a cut is written: sizes to choose from and the bin in a config, a cut in a file."""

import dataclasses
import re
from collections.abc import Mapping
from fractions import Fraction
from math import ceil, floor
from typing import Any

from ml_collections import ConfigDict

from lmboost import ranges
from lmboost.errors import UserError, one_of
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import view
from lmboost.surgery.subnet import Cut, LayerCut

_COUNT = r"([0-9]{1,12}(?:\.[0-9]{1,12})?)([KMB]?)"
LARGEST = 999_999  # entry of a dimension
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_choices(text: str, field: str, default: int) -> tuple[int, ...]:
    """The sizes in "FIRST-LAST:STEP,...", as in "64-512:64,768", ascending; without ":STEP" in steps of 1.

    Empty text is `default` alone. A UserError on anything else, and on a size of 0.
    """
    sizes: set[int] = set()
    for word in text.split(",") if text.strip() else [str(default)]:
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6})(?::([0-9]{1,6}))?)?", word.strip())
        first, last, step = (int(n) for n in match.groups("1")) if match else (0, 0, 0)
        if match and match[2] is None:
            last = first
        if not 0 < first <= last or not step:
            raise UserError(
                f"{field}={text!r}: {word.strip()!r} is neither a size nor a range of sizes. Give sizes from 1 to "
                "999999 as FIRST-LAST:STEP or one by one, comma between them, as in '64-512:64,768'."
            )
        sizes.update(range(first, last + 1, step))
    return tuple(sorted(sizes))


def parse_params(text: str) -> tuple[int, int]:
    """The fewest and the most parameters of a bin "385.1M-425.6M" or "405M+-5%"; suffixes K, M, B, or none."""
    expected = "Give a bin of parameters as LOWEST-HIGHEST, as in '385.1M-425.6M', or as '405M+-5%'."
    span = re.fullmatch(rf"{_COUNT}\s*-\s*{_COUNT}", text.strip())
    around = re.fullmatch(rf"{_COUNT}\s*\+-\s*([0-9]{{1,2}}(?:\.[0-9]{{1,12}})?)\s*%", text.strip())
    if not span and not around:
        raise UserError(f"search.params={text!r} {'is not a bin' if text.strip() else 'is empty'}. {expected}")
    if span:
        low, high = (Fraction(span[i]) * _SUFFIXES[span[i + 1]] for i in (1, 3))
    else:
        centre, share = Fraction(around[1]) * _SUFFIXES[around[2]], Fraction(around[3]) / 100
        low, high = centre * (1 - share), centre * (1 + share)
    if ceil(low) > floor(high):
        ends = f"from {float(low):.12g} to {float(high):.12g}"
        raise UserError(f"search.params={text!r} holds no number: {ends}. {expected}")
    return ceil(low), floor(high)


def read_choices(search: ConfigDict, parent: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The choices of each dimension in a config's `search`, ascending, with its words checked.

    A UserError on what can't be read, what the parent has not, and what does not go together.
    """
    if parent.layer_sizes:
        raise UserError(
            f"init.path is a model of unequal layers (layer_sizes={parent.layer_sizes!r}): a cut is searched in one "
            "whose layers all have the same sizes."
        )
    if len(set(parent.kinds)) > 1:
        raise UserError(
            f"init.path is a model with layers of several kinds (layer_kinds={parent.layer_kinds!r}): a cut is "
            "searched in one whose layers are all alike, as a layer's window and positions are constants of the "
            "program that computes every candidate. Take init.kind='inherit' or 'subnet' with init.layers."
        )
    one_of("search.granularity", search.granularity, ("coarse", "fine"))
    one_of("search.scope", search.scope, ("uniform", "layerwise"))
    one_of("search.layer_choice", search.layer_choice, ("any", "first"))
    if one_of("search.sort", search.sort, ("none", "activation")) != "none" and search.granularity == "fine":
        raise UserError(
            f"search.sort={search.sort!r} orders entries for a coarse cut, which takes the first of them, but "
            "search.granularity='fine' chooses entries itself: set search.sort='none'."
        )
    sizes = {name: getattr(parent, name) for name in ("d_model", "num_kv_heads", "head_dim", "mlp_dim")}
    sizes |= {"layers": parent.num_layers, "group_heads": parent.num_heads // parent.num_kv_heads}
    choices = {name: parse_choices(search[name], f"search.{name}", size) for name, size in sizes.items()}
    for name, size in sizes.items():
        if choices[name][-1] > size:
            raise UserError(
                f"search.{name}={search[name]!r}: {choices[name][-1]} is more than the {size} that the model in "
                f"init.path has. Give sizes of at most {size}."
            )
    if parent.position == "rope":
        _check_rotation(choices["head_dim"], parent, search.head_dim)
    return choices


def _check_rotation(head_dims: tuple[int, ...], parent: ModelConfig, text: str) -> None:
    """A UserError where the rotary frequencies of a head size are not some of those of the largest one."""
    hull = dataclasses.replace(parent, head_dim=head_dims[-1])
    rotated = {n: dataclasses.replace(parent, head_dim=n).rotary_dim for n in range(1, hull.head_dim + 1)}
    largest, rest = hull.rotary_dim, hull.head_dim - hull.rotary_dim

    def is_good(n):
        return view.has_room(hull, n) and bool(rotated[n]) == bool(largest)

    if wrong := [n for n in head_dims if not is_good(n)]:
        n, good = wrong[0], ranges.write([k for k in rotated if is_good(k)])
        raise UserError(
            f"search.head_dim={text!r}: of a head of {n}, {rotated[n]} features are rotated and {n - rotated[n]} not; "
            f"of the largest, {head_dims[-1]}, {largest} and {rest}. The rotated ones must be a divisor of the "
            f"largest's, the others not more than its. Give sizes out of {good}."
        )


def to_json(cut: Cut) -> dict[str, Any]:
    """A cut for a JSON file: entries as "0-5,8", those of a layer's groups with ";" between them."""
    layers = [
        {
            "layer": part.layer,
            "groups": ranges.write(part.groups),
            "heads": ";".join(map(ranges.write, part.heads)),
            "features": ranges.write(part.features),
            "units": ranges.write(part.units),
        }
        for part in cut.layers
    ]
    return {"width": ranges.write(cut.width), "layers": layers}


def from_json(value: Mapping[str, Any]) -> Cut:
    """The cut of which `to_json` made `value`; a UserError naming the part that is missing or can't be read."""
    if not isinstance(value, Mapping) or not isinstance(value.get("layers"), list):
        raise UserError(f"a cut is an object with 'width' and a list 'layers', not {value!r}.")
    layers = []
    for i, part in enumerate(value["layers"]):
        where = f"layers[{i}]"
        if not isinstance(part, Mapping) or type(part.get("layer")) is not int or part["layer"] < 0:
            raise UserError(f"{where} of a cut has no 'layer', the number of one of the parent's: {part!r}.")
        heads = tuple(_entries(text, f"{where}.heads") for text in _text(part, "heads", where).split(";"))
        others = ("groups", "features", "units")
        own = {name: _entries(_text(part, name, where), f"{where}.{name}") for name in others}
        layers.append(LayerCut(layer=part["layer"], heads=heads, **own))
    return Cut(_entries(_text(value, "width", "the cut"), "width"), tuple(layers))


def _text(part: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(part.get(name), str):
        raise UserError(f"{where} has {name}={part.get(name)!r}: expected entries as in '0-5,8'.")
    return part[name]


def _entries(text: str, where: str) -> tuple[int, ...]:
    """The reverse of `ranges.write`."""
    entries: list[int] = []
    where, wrong = f"{where}={text!r} of a cut", "is no entry or range after those before it."
    for word, first, last in ranges.parse(text, where, wrong):
        if last < first or (entries and first <= entries[-1]) or last > LARGEST:
            raise UserError(f"{where}: {word!r} {wrong}")
        entries += range(first, last + 1)
    return tuple(entries)
