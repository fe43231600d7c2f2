"""JSON that others may have written, edited or damaged: read whole, checked against what is expected, or one error.

What is expected is written as it looks: `{"step": int, "shards": [{"file": str}], "teacher?": dict}`. A type, or a
union of types, stands for a value; numbers are finite; bool is no int, but an int is a float. `[X]` is a list of X, and
`{}` an object that has these fields, those with "?" perhaps, and others besides.
"""

import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from etils import epath

from lmboost.errors import UserError, nearest

MAX_BYTES = 1 << 30  # of a file; the largest known, the list of a data set's shards, is a thousandth of it


def read(path: str | os.PathLike, expected: Mapping[str, Any], hint: str) -> dict[str, Any]:
    """The JSON object in a file, local or gs://.

    Args:
      expected: its fields, as above.
      hint: what to do about a file that is not like that; ends the message.

    Raises a UserError naming the file, and the field where it is one; a FileNotFoundError where there is no such file.
    """
    path = epath.Path(path)
    try:
        if (size := path.stat().length) > MAX_BYTES:
            raise UserError(f"{path} has {size:,} bytes, expected a JSON object of at most {MAX_BYTES:,}. {hint}")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:  # a directory, or one that others may not read
        raise UserError(f"{path} cannot be read ({error.strerror or error}). {hint}") from error
    return parse(raw, path, expected, hint)


def parse(raw: bytes, path: str | os.PathLike, expected: Mapping[str, Any], hint: str) -> dict[str, Any]:
    """As `read`, of bytes that come from `path`."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:  # of UTF-8 and of numbers of too many digits, too
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not readable JSON ({why or 'empty'}). {hint}") from error
    check(content, expected, os.fspath(path), hint)
    return content


def check(content: Any, expected: Mapping[str, Any], where: str, hint: str) -> None:
    """Raises a UserError, beginning with `where`, where an object is not as expected."""
    if wrong := mismatch(content, expected):
        raise UserError(f"{where}: {wrong}. {hint}")


def make(kind: type, values: Mapping[str, Any], where: str, hint: str) -> Any:
    """A dataclass from the object of its fields, of which those with defaults may be missing.

    Raises a UserError, beginning with `where`, on a field that it does not have or that is of another type.
    """
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    known = [field.name for field in fields]
    if unknown := [name for name in values if name not in known]:
        raise UserError(
            f"{where} has a field {unknown[0]!r} that this release of lmboost does not know"
            f"{nearest(unknown[0], known)}: it was written by a later one, or edited. {hint}"
        )
    optional = {f.name: "?" for f in fields if (f.default, f.default_factory) != (dataclasses.MISSING,) * 2}
    check(values, {name + optional.get(name, ""): hints[name] for name in known}, where, hint)
    return kind(**values)


def mismatch(value: Any, expected: Any, at: str = "") -> str | None:
    """What is wrong with a value that stands at the place `at`; None where it is as expected."""
    if isinstance(expected, Mapping):
        if not isinstance(value, dict):
            return _other(value, "an object", at)
        for name, inner in expected.items():
            key = name.removesuffix("?")
            place = f"{at}.{key}" if at else key
            if key not in value:
                if key == name:
                    return f"the field {place} is missing"
            elif wrong := mismatch(value[key], inner, place):
                return wrong
    elif isinstance(expected, list):
        if not isinstance(value, list):
            return _other(value, "a list", at)
        for i, each in enumerate(value):
            if wrong := mismatch(each, expected[0], f"{at}[{i}]"):
                return wrong
    else:
        kinds = expected.__args__ if isinstance(expected, types.UnionType) else (expected,)
        if not any(_is(value, kind) for kind in kinds):
            return _other(value, " or ".join(_NAMES.get(kind, kind.__name__) for kind in kinds), at)
    return None


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int and isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 63
    return isinstance(value, kind)


_NAMES = {
    int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", dict: "an object",
    list: "a list", types.NoneType: "null",
}  # fmt: skip


def _other(value: Any, wanted: str, at: str) -> str:
    text = repr(value) if not isinstance(value, dict | list) else _NAMES[type(value)]
    return f"{at or 'the whole'} is {text[:80]}, expected {wanted}"
