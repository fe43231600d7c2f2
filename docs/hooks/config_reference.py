"""The fields of a config as a page, read from the code that makes them: lmboost/config.py and ModelConfig.

A field's meaning is what its comments say, those above it and the one behind it; nothing is written down twice.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lmboost import config
from lmboost.models.model_config import CHOICES, ModelConfig

TITLE = """# Fields of a config

Made of `lmboost/config.py` and `lmboost/models/model_config.py`. A recipe sets fields of `config.base()`, a command
line does with `--config.FIELD=VALUE`, where the value is of the type of the default. A field that does not exist is an
error that names the nearest one.
"""


class Said(NamedTuple):
    """What the code says of a name, a field or a subtree: its comments, as one text."""

    name: str
    text: str


def page() -> str:
    """The whole page: a table for each subtree, with a row for each field of `config.base()`."""
    said = {one.name: one.text for one in (*_of_base(), *_of_model())}
    tables: dict[str, list[str]] = {}
    defaults, order = config.flatten(config.base()), [*said]
    for name in sorted(defaults, key=order.index):
        row = f"| `{name}`{{ #{name} }} | `{defaults[name]!r}` | {_cell(said[name])} |"
        tables.setdefault(name.rpartition(".")[0], []).append(row)
    parts = [TITLE]
    for subtree, rows in tables.items():
        parts += [f"## {subtree or 'The run'}", *filter(None, [said.get(subtree)])]
        parts.append("\n".join(["| field | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """A text as a cell of a table: but for `code`, nothing in it is markup."""
    for character in ("\\", "*", "_", "|"):
        text = text.replace(character, "\\" + character)
    return text.replace("<", "&lt;")


def _of_base() -> Iterator[Said]:
    """What `config.base` says of subtrees and of fields."""
    source = textwrap.dedent(inspect.getsource(config.base))
    lines = source.splitlines()
    names: dict[str, str] = {"c": ""}  # of variables: the subtree that each is
    body = ast.parse(source).body[0].body
    for node in (node for node in body if isinstance(node, ast.Assign)):
        full = ""
        for target in node.targets:
            if isinstance(target, ast.Attribute):
                full = _full(target, names)
            elif target.id not in names:
                names[target.id] = full
        above, behind = _above(lines, node.lineno - 1), _behind(lines[node.end_lineno - 1])
        leaves, of_leaf = _leaves(node.value), ""
        if len(leaves) == 1:  # what stands behind it is said of that leaf
            behind, of_leaf = "", behind
        if full:
            yield Said(full, " ".join(filter(None, (above, behind))))
        yield from (Said(f"{full}.{leaf}", of_leaf) for leaf in leaves)
    model = "The decoder; `vocab_size` is that of the data's tokenizer. Models that have names are in `presets.py`."
    yield Said("model", model)


def _of_model() -> Iterator[Said]:
    """What ModelConfig says of its fields."""
    source = textwrap.dedent(inspect.getsource(ModelConfig))
    lines = source.splitlines()
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above, behind = _above(lines, node.lineno - 1), _behind(lines[node.end_lineno - 1])
            choices = f"one of {', '.join(CHOICES[node.target.id])}" if node.target.id in CHOICES else ""
            yield Said(f"model.{node.target.id}", "; ".join(filter(None, (above, behind, choices))))


def _full(target: ast.expr, names: Mapping[str, str]) -> str:
    """The field that an expression as `kd.weight` or `c.eval.tasks` is, given the subtrees of variables."""
    if isinstance(target, ast.Name):
        return names[target.id]
    return ".".join(filter(None, (_full(target.value, names), target.attr)))


def _leaves(value: ast.expr) -> list[str]:
    """The keys of the dict that a subtree is made of, as in ConfigDict({"every": 500}); of all else none."""
    dicts = [a for a in value.args if isinstance(a, ast.Dict)] if isinstance(value, ast.Call) else []
    return [key.value for one in dicts for key in one.keys]


def _above(lines: list[str], line: int) -> str:
    """The comment directly above a line, without its signs."""
    first = line
    while first > 0 and lines[first - 1].strip().startswith("#"):
        first -= 1
    return " ".join(text.strip().removeprefix("#").strip() for text in lines[first:line])


def _behind(line: str) -> str:
    """The comment at the end of a line. None of the defaults has the two signs that begin one."""
    _, sign, text = line.partition("  # ")
    return text.strip() if sign and not text.startswith("fmt:") else ""
