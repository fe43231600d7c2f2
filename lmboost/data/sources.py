"""Documents from files: text and code by glob, JSONL, Parquet, TFDS, the Hub, and the Python standard library.

`find` turns what the user names into units, each of which `read` can read on its own in another process. What a file
holds is said by its bytes, see `formats`.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from lmboost import places, strict_json
from lmboost.data import files, formats, hub
from lmboost.errors import UserError

_UNIT_BYTES = 16_000_000  # text per unit where a source can be divided
_UNIT_FILES = 256
_COMPRESSION = 4  # how much larger than its file compressed text is taken to be; only sizes the shards
_PACKED = 2  # the same of Parquet
MAX_DOCUMENT_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    `valid` is False where bytes that are not UTF-8 became U+FFFD. `split` is the one it belongs to, where its hash does
    not decide.
    """

    text: str
    origin: str
    valid: bool = True
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a source that can be read alone.

    Attributes:
      kind: "text", "jsonl", "parquet" or "tfds".
      paths: files, one document each ("text"), or one file; for "tfds" the data set's directory.
      stamps: size and modification time of each path, so that a changed source is noticed.
      size: estimated bytes of text.
      start, stop: row groups ("parquet"; all of them where both are 0) or examples ("tfds").
      split: the TFDS split.
      part: the split of the data set that all of its documents belong to; "": their hashes decide; "ends": the text
        that it is begins in one and ends in the other.
    """

    kind: str
    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    size: int
    start: int = 0
    stop: int = 0
    split: str = ""
    part: str = ""


def find(sources: Sequence[str], text_field: str = "text") -> list[Unit]:
    """The units of `sources`, in a fixed order; a file that has two names is read once.

    A source is a glob (`**` allowed) of files of text, code, lines of JSON, or Parquet, also compressed;
    `tfds:NAME[/config][:version][?data_dir=...&split=train]` or `tfds:DIRECTORY`; `hub:NAME`, see `hub`; or `stdlib`.
    """
    known: dict[tuple, str] = {}  # by what the file system knows them as
    units: list[Unit] = []
    for source in sources:
        if source.startswith("tfds:"):
            units.extend(_tfds_units(source, text_field))
            continue
        for path in _paths(source):
            known.setdefault(_identity(path), path)
    texts = []
    for path in known.values():
        formats.refuse_tables(path)
        if formats.is_parquet(path):
            units.extend(_parquet_units(path, text_field))
        elif formats.is_json_lines(path):
            units.append(Unit("jsonl", (path,), (files.stamp(path),), _text_size(path)))
        else:
            texts.append(path)
    for group in grouped(texts, _text_size, _UNIT_BYTES, _UNIT_FILES):
        units.append(Unit("text", tuple(group), tuple(map(files.stamp, group)), sum(map(_text_size, group))))
    return units


def _paths(source: str) -> list[str]:
    if source == "stdlib":
        return files.standard_library()
    return list(hub.find(source).paths) if source.startswith(hub.PREFIX) else files.matches(source)


def _identity(path: str) -> tuple:
    if places.is_remote(path):
        return (path,)
    status = os.stat(path)
    return status.st_dev, status.st_ino


def grouped(items: Sequence, size: Callable[[Any], int], enough: int, most: float = math.inf) -> Iterator[list]:
    """Neighbours in groups that end where their sizes reach `enough`, or where they are `most`."""
    group, total = [], 0
    for i, item in enumerate(items, 1):
        group.append(item)
        total += size(item)
        if total >= enough or len(group) >= most or i == len(items):
            yield group
            group, total = [], 0


def one_text(units: Sequence[Unit], text_field: str) -> bool:
    """Whether the units are one file of text, a book say, which no hash can divide between the splits."""
    if len(units) != 1 or units[0].kind != "text" or len(units[0].paths) != 1:
        return False
    (path,) = units[0].paths
    with formats.readable(path), formats.open_text(path) as file:
        return not formats.begins_with_json(file, text_field)


def read(
    unit: Unit, text_field: str = "text", validation_fraction: float = 0.0, most: int = MAX_DOCUMENT_BYTES
) -> Iterator[Document]:
    """The documents of a unit, in order.

    Args:
      validation_fraction: of a text that ends in the validation split, its share there.
      most: bytes of a document, or of a line of JSON that holds one.

    Raises a UserError, naming the file, where it can't be read, is no text, has a malformed entry, or too long a one.
    """
    reader = {"text": _read_texts, "jsonl": _read_jsonl, "parquet": _read_parquet, "tfds": _read_tfds}[unit.kind]
    for document in reader(unit, text_field, most):
        if len(document.text) > most:
            raise _too_long(document.origin, most)
        if unit.part == "ends":
            yield from _divide(document, validation_fraction)
        else:
            yield dataclasses.replace(document, split=unit.part)


def _divide(document: Document, validation_fraction: float) -> Iterator[Document]:
    """The beginning and the end of a text, divided where a line or at least a word ends."""
    text = document.text
    wanted = round(len(text) * (1 - validation_fraction))
    at = next((i + 1 for mark in "\n ." if (i := text.rfind(mark, wanted - wanted // 10, wanted)) > 0), wanted)
    for part, split in ((text[:at], "train"), (text[at:], "validation")):
        yield dataclasses.replace(document, text=part, split=split)


def _too_long(origin: str, most: int) -> UserError:
    return UserError(
        f"{origin} has a document of more than {most:,} bytes (--max_document_bytes). Divide or exclude it, or allow "
        "longer ones."
    )


def _text_size(path: str) -> int:
    return files.size(path) * (_COMPRESSION if formats.is_compressed(path) else 1)


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


def _read_texts(unit: Unit, text_field: str, most: int) -> Iterator[Document]:
    for path in unit.paths:
        with formats.readable(path), formats.open_text(path) as file:
            if formats.begins_with_json(file, text_field):
                yield from _json_documents(file, path, text_field, most)
                continue
            if len(raw := file.read(most + 1)) > most:
                raise _too_long(path, most)
            yield _document(raw, path)


def _read_jsonl(unit: Unit, text_field: str, most: int) -> Iterator[Document]:
    (path,) = unit.paths
    with formats.readable(path), formats.open_text(path) as file:
        yield from _json_documents(file, path, text_field, most)


def _json_documents(file: io.BufferedReader, path: str, text_field: str, most: int) -> Iterator[Document]:
    number = 0
    while raw := file.readline(most + 1):
        number += 1
        if len(raw) > most:
            raise _too_long(f"{path}:{number}", most)
        raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if raw.strip():
            yield _json_document(raw, f"{path}:{number}", text_field)


def _json_document(raw: bytes, origin: str, text_field: str) -> Document:
    line, valid = _decode(raw)
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{origin}: not valid JSON: {error}. Expected one JSON object per line; `jq -c` makes lines of objects, "
            "`jq -c '.[]'` of one list."
        ) from error
    if not isinstance(entry, dict):
        raise UserError(f"{origin}: expected a JSON object, found {type(entry).__name__}.")
    if text_field not in entry:
        known = ", ".join(map(str, list(entry)[:8])) or "none"
        raise UserError(f"{origin}: no field {text_field!r}; the line has: {known}. Choose one with --text_field.")
    return _document(entry[text_field], origin, valid)


@contextlib.contextmanager
def _parquet(path: str, text_field: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    with formats.readable(path), files.opened(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise UserError(
                f"{path}: no column {text_field!r}; it has: {', '.join(names)}. Choose one with --text_field."
            )
        yield file


def _parquet_units(path: str, text_field: str) -> list[Unit]:
    if places.is_remote(path):  # there may be many, and to look into each takes its time
        return [Unit("parquet", (path,), (files.stamp(path),), files.size(path) * _PACKED)]
    with _parquet(path, text_field) as file:
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    runs = grouped(range(len(sizes)), lambda row_group: sizes[row_group], _UNIT_BYTES)
    return [
        Unit("parquet", (path,), (files.stamp(path),), sum(sizes[i] for i in run), run[0], run[-1] + 1) for run in runs
    ]


def _read_parquet(unit: Unit, text_field: str, most: int) -> Iterator[Document]:
    del most
    (path,) = unit.paths
    with _parquet(path, text_field) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(unit.start))
        groups = list(range(unit.start, unit.stop or file.metadata.num_row_groups))
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
    stamps = tuple(map(files.stamp, paths[1:]))
    return [
        Unit("tfds", (directory,), stamps, size * (min(i + step, count) - i) // count, i, min(i + step, count), split)
        for i in range(0, count, step)
    ]


def _tfds_builder(source: str, name: str, data_dir: str | None):
    import tensorflow_datasets as tfds  # only where TFDS is asked for: its import is slow

    base, _, version = name.partition(":")
    for directory in (name, os.path.join(data_dir or "~/tensorflow_datasets", base)):
        _check_features(os.path.expanduser(directory))
    if version and not version[0].isdigit() and not os.path.isdir(os.path.expanduser(name)):
        raise UserError(
            f"source={source!r} is of a namespace, whose code TFDS would run: download it and give tfds:DIR."
        )
    try:
        if os.path.isdir(os.path.expanduser(name)):
            return tfds.builder_from_directory(os.path.expanduser(name))
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
        return builder
    except Exception as error:  # TFDS raises many kinds here: unknown name, no network, no TensorFlow
        raise UserError(f"source={source!r}: TFDS can't open it: {type(error).__name__}: {error}") from error


def _check_features(directory: str) -> None:
    """Raises a UserError where a features.json names a class that is not TFDS's: to read it would run its module."""
    for path in pathlib.Path(directory).rglob("features.json") if os.path.isdir(directory) else ():
        found = strict_json.read(path, {}, "Download the data set again.")
        if others := sorted(name for name in _classes(found) if not name.startswith("tensorflow_datasets.")):
            raise UserError(
                f"{path} names the class {others[0]!r}, and only classes of tensorflow_datasets are imported: prepare "
                "the data set with those."
            )


def _classes(value: Any) -> Iterator[str]:
    """All that a features.json gives as the name of a class, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str) and "." in inner:
                yield inner
            yield from _classes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _classes(inner)


def _read_tfds(unit: Unit, text_field: str, most: int) -> Iterator[Document]:
    import tensorflow_datasets as tfds

    del most
    (directory,) = unit.paths
    _check_features(directory)
    try:
        examples = tfds.builder_from_directory(directory).as_data_source(split=unit.split)
        for i in range(unit.start, unit.stop):
            yield _document(examples[i][text_field], f"{directory} {unit.split}[{i}]")
    except (NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(
            f"{directory}: TFDS can't read split {unit.split!r} without TensorFlow: {error}. Prepare the data set "
            f'with download_and_prepare(file_format="array_record").'
        ) from error
