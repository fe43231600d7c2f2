"""Documents from files: text and code by glob, JSONL, Parquet, TFDS, and the Python standard library.

`find` turns what the user names into units, each of which `read` can read on its own in another process.
"""

import contextlib
import dataclasses
import glob
import gzip
import io
import json
import math
import os
import pathlib
import sysconfig
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from lmboost.errors import UserError

_UNIT_BYTES = 16_000_000  # text per unit where a source can be divided
_UNIT_FILES = 256
_COMPRESSION = 4  # how much larger than its file compressed text is taken to be; only sizes the shards
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. `valid` is False where bytes that are not UTF-8 became U+FFFD."""

    text: str
    origin: str
    valid: bool = True


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source that can be read alone.

    Attributes:
      kind: "text", "jsonl", "parquet" or "tfds".
      paths: files, one document each ("text"), or one file; for "tfds" the data set's directory.
      stamps: size and modification time of each path, so that a changed source is noticed.
      size: estimated bytes of text.
      start, stop: row groups ("parquet") or examples ("tfds").
      split: the TFDS split.
    """

    kind: str
    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    size: int
    start: int = 0
    stop: int = 0
    split: str = ""


def find(sources: Sequence[str], text_field: str = "text") -> list[Unit]:
    """The units of `sources`, in a fixed order; a file that two sources name is read once.

    A source is a glob (`**` allowed) of text, code, `.jsonl`, `.parquet` files, also `.gz` and `.zst`; a TFDS
    directory; `tfds:NAME[/config][:version][?data_dir=...&split=train]`; or `stdlib`.
    """
    files: dict[str, None] = {}
    units: list[Unit] = []
    for source in sources:
        if source == "stdlib":
            files.update(dict.fromkeys(_standard_library()))
        elif source.startswith("tfds:") or (pathlib.Path(source) / "features.json").is_file():
            units.extend(_tfds_units(source, text_field))
        else:
            files.update(dict.fromkeys(_matches(source)))
    texts = []
    for path in files:
        kind = _kind(path)
        if kind == "parquet":
            units.extend(_parquet_units(path, text_field))
        elif kind == "jsonl":
            units.append(Unit("jsonl", (path,), (_stamp(path),), _text_size(path)))
        else:
            texts.append(path)
    for group in grouped(texts, _text_size, _UNIT_BYTES, _UNIT_FILES):
        units.append(Unit("text", tuple(group), tuple(map(_stamp, group)), sum(map(_text_size, group))))
    return units


def grouped(items: Sequence, size: Callable[[Any], int], enough: int, most: float = math.inf) -> Iterator[list]:
    """Neighbours in groups that end where their sizes reach `enough`, or where they are `most`."""
    group, total = [], 0
    for i, item in enumerate(items, 1):
        group.append(item)
        total += size(item)
        if total >= enough or len(group) >= most or i == len(items):
            yield group
            group, total = [], 0


def read(unit: Unit, text_field: str = "text") -> Iterator[Document]:
    """The documents of a unit, in order; an unreadable file or a malformed entry is a UserError naming it."""
    reader = {"text": _read_texts, "jsonl": _read_jsonl, "parquet": _read_parquet, "tfds": _read_tfds}[unit.kind]
    return reader(unit, text_field)


def _matches(pattern: str) -> list[str]:
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        raise UserError(f"source={pattern!r} is a directory: give a glob of its files, such as '{pattern}/**/*.txt'.")
    found = sorted(path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path))
    if os.path.isfile(expanded):  # a name with brackets in it is no glob
        found = [expanded]
    if not found:
        raise UserError(
            f"source={pattern!r} matches no file. Give a glob (quote it, '**' descends), a TFDS directory, "
            f"tfds:NAME or stdlib."
        )
    return found


def _standard_library() -> list[str]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    inside = (path.relative_to(root) for path in root.rglob("*.py"))
    found = sorted(path for path in inside if not _NOT_LIBRARY.intersection(path.parts))
    if not found:
        raise UserError(f"source='stdlib': {root} holds no .py files; this interpreter ships without its sources.")
    return [str(root / path) for path in found]


def _kind(path: str) -> str:
    name = path.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _text_size(path: str) -> int:
    return os.path.getsize(path) * (_COMPRESSION if path.endswith((".gz", ".zst")) else 1)


def _decode(raw: bytes) -> tuple[str, bool]:
    try:
        return raw.decode("utf-8"), True
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace"), False


def _document(value: str | bytes | None, origin: str, valid: bool = True) -> Document:
    """A document from a field's value; None counts as empty text."""
    if isinstance(value, bytes):
        value, decoded = _decode(value)
        valid = valid and decoded
    elif value is None:
        value = ""
    elif not isinstance(value, str):
        raise UserError(f"{origin}: the text field holds {type(value).__name__}, expected a string.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON may name one half of a surrogate pair
        value, valid = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), False
    return Document(value, origin, valid)


def _open(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):  # of any number of frames; unlike zstandard's, this reader refuses a file that is cut off
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), 1 << 18)
    return open(path, "rb")


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """A UserError that names the file where it can't be read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} can't be read: {reason}. Mend, remove or exclude the file.") from error


def _read_texts(unit: Unit, text_field: str) -> Iterator[Document]:
    del text_field
    for path in unit.paths:
        with _readable(path), _open(path) as file:
            raw = file.read()
        yield _document(raw, path)


def _read_jsonl(unit: Unit, text_field: str) -> Iterator[Document]:
    (path,) = unit.paths
    with _readable(path), _open(path) as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield _json_document(raw, f"{path}:{number}", text_field)


def _json_document(raw: bytes, origin: str, text_field: str) -> Document:
    line, valid = _decode(raw)
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not valid JSON: {error}. Expected one JSON object per line.") from error
    if not isinstance(entry, dict):
        raise UserError(f"{origin}: expected a JSON object, found {type(entry).__name__}.")
    if text_field not in entry:
        known = ", ".join(map(str, list(entry)[:8])) or "none"
        raise UserError(f"{origin}: no field {text_field!r}; the line has: {known}. Choose one with --text_field.")
    return _document(entry[text_field], origin, valid)


def _parquet_units(path: str, text_field: str) -> list[Unit]:
    with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    if text_field not in names:
        raise UserError(f"{path}: no column {text_field!r}; it has: {', '.join(names)}. Choose one with --text_field.")
    runs = grouped(range(len(sizes)), lambda row_group: sizes[row_group], _UNIT_BYTES)
    return [Unit("parquet", (path,), (_stamp(path),), sum(sizes[i] for i in run), run[0], run[-1] + 1) for run in runs]


def _read_parquet(unit: Unit, text_field: str) -> Iterator[Document]:
    (path,) = unit.paths
    with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(unit.start))
        groups = list(range(unit.start, unit.stop))
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[text_field]):
            for value in _values(batch.column(0)):
                yield _document(value, f"{path}:row {row}")
                row += 1


def _values(column: pyarrow.Array) -> list:
    """A column's values; text as bytes, so that invalid UTF-8 is counted like anywhere else."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return (column.cast(pyarrow.large_binary()) if is_text else column).to_pylist()


def _tfds_units(source: str, text_field: str) -> list[Unit]:
    name, _, query = source.removeprefix("tfds:").partition("?")
    options = dict(urllib.parse.parse_qsl(query))
    if unknown := set(options) - {"data_dir", "split"}:
        raise UserError(f"source={source!r}: option {min(unknown)!r} is not known, expected data_dir or split.")
    split = options.get("split", "train")
    builder = _tfds_builder(source, name, options.get("data_dir"))
    if split not in builder.info.splits:
        raise UserError(f"source={source!r}: no split {split!r}, it has {', '.join(builder.info.splits) or 'none'}.")
    if text_field not in (builder.info.features or {}):
        known = ", ".join(builder.info.features or {}) or "none"
        raise UserError(f"source={source!r}: no feature {text_field!r}, it has: {known}. Choose one with --text_field.")
    facts = builder.info.splits[split]
    count, size = facts.num_examples, max(facts.num_bytes, facts.num_examples)
    step = max(1, count * _UNIT_BYTES // max(size, 1))
    directory = os.fspath(builder.data_path)
    paths = (directory, *sorted(os.fspath(path) for path in facts.filepaths))
    if missing := [path for path in paths if not os.path.exists(path)]:
        raise UserError(f"source={source!r}: {missing[0]} does not exist; the data set is not complete.")
    stamps = tuple(map(_stamp, paths[1:]))
    return [
        Unit("tfds", (directory,), stamps, size * (min(i + step, count) - i) // count, i, min(i + step, count), split)
        for i in range(0, count, step)
    ]


def _tfds_builder(source: str, name: str, data_dir: str | None):
    import tensorflow_datasets as tfds  # only where TFDS is asked for: its import is slow

    try:
        if os.path.isdir(os.path.expanduser(name)):
            return tfds.builder_from_directory(os.path.expanduser(name))
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
        return builder
    except Exception as error:  # TFDS raises many kinds here: unknown name, no network, no TensorFlow
        raise UserError(f"source={source!r}: TFDS can't open it: {type(error).__name__}: {error}") from error


def _read_tfds(unit: Unit, text_field: str) -> Iterator[Document]:
    import tensorflow_datasets as tfds

    (directory,) = unit.paths
    try:
        examples = tfds.builder_from_directory(directory).as_data_source(split=unit.split)
        for i in range(unit.start, unit.stop):
            yield _document(examples[i][text_field], f"{directory} {unit.split}[{i}]")
    except (NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(
            f"{directory}: TFDS can't read split {unit.split!r} without TensorFlow: {error}. Prepare the data set "
            f'with download_and_prepare(file_format="array_record").'
        ) from error
