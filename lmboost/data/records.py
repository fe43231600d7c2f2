"""Token records: what `prepare` writes and `loader` reads.

A data set is a directory: ArrayRecord shards in the TFDS layout, `manifest.json` and `tokenizer/`. A shard is one
stream of tokens, cut in records of R tokens plus the first token of the next record, so that every token of the
stream but the first is the target of exactly one record.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import zstandard
from array_record.python import array_record_module
from etils import epath
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from lmboost import places, strict_json
from lmboost.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")
_NAME = "tokens"  # the data set's name in its file names
_MANIFEST = {
    "fingerprint": str, "tokenizer_fingerprint": str, "vocab_size": int, "bos_id": int | None, "eos_id": int | None,
    "record_tokens": int, "arguments": dict,
    "splits": {split: dict.fromkeys(("tokens", "documents", "bytes", "records"), int) for split in SPLITS},
    "shards": {split: [dict] for split in SPLITS}, "problems": dict,
}  # fmt: skip


def _example_message() -> type:
    """tf.train.Example, by the numbers of its fields: TFDS has it, but takes a sixth of a process's start to load."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="lmboost", syntax="proto3")

    def add(parent, name: str, **fields: tuple[int, int, int, str | None]) -> None:
        message = parent.add(name=name)
        for field, (number, label, kind, type_name) in fields.items():
            message.field.add(name=field, number=number, label=label, type=kind, type_name=type_name)

    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    nested = lambda label, number, name: (number, label, kinds.TYPE_MESSAGE, f".lmboost.{name}")  # noqa: E731
    add(file.message_type, "BytesList", value=(1, many, kinds.TYPE_BYTES, None))
    add(file.message_type, "Int64List", value=(1, many, kinds.TYPE_INT64, None))
    add(file.message_type, "Feature", bytes_list=nested(one, 1, "BytesList"), int64_list=nested(one, 3, "Int64List"))
    add(file.message_type, "Features", feature=nested(many, 1, "Features.FeatureEntry"))
    entry = file.message_type[-1].nested_type
    add(entry, "FeatureEntry", key=(1, one, kinds.TYPE_STRING, None), value=nested(one, 2, "Feature"))
    entry[0].options.map_entry = True
    add(file.message_type, "Example", features=nested(one, 1, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("lmboost.Example"))


_Example = _example_message()


@dataclasses.dataclass(frozen=True)
class Record:
    """A run of a shard's stream.

    Attributes:
      tokens: int32 [R + 1], zero after `length`.
      doc_starts: int32 [documents], ascending offsets in [0, length) at which a document begins.
      length: valid tokens, at most R + 1.
    """

    tokens: np.ndarray
    doc_starts: np.ndarray
    length: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a split. `positions` is the number of targets of its stream, document borders included."""

    file: str
    records: int
    positions: int
    documents: int
    tokens: int
    bytes: int
    digest: str
    file_bytes: int


def cut(documents: Sequence[np.ndarray], record_tokens: int) -> Iterator[Record]:
    """The records of the stream made of `documents` (int32 [tokens] each, none empty)."""
    if not documents:
        return
    stream = np.concatenate(documents)
    starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
    for begin in range(0, len(stream) - 1, record_tokens):
        tokens = stream[begin : begin + record_tokens + 1]
        low, high = np.searchsorted(starts, [begin, begin + len(tokens)])
        padded = np.zeros(record_tokens + 1, np.int32)
        padded[: len(tokens)] = tokens
        yield Record(padded, (starts[low:high] - begin).astype(np.int32), len(tokens))


def serialize(record: Record) -> bytes:
    """The record as tf.train.Example, in TFDS's encoding; equal records give equal bytes."""
    example = _Example()
    feature = example.features.feature
    feature["tokens"].bytes_list.value.append(record.tokens.astype("<i4").tobytes())
    feature["doc_starts"].int64_list.value.extend(record.doc_starts.tolist())
    feature["length"].int64_list.value.append(record.length)
    return example.SerializeToString(deterministic=True)


def parse(serialized: bytes) -> Record:
    """Inverse of `serialize`. Another error, mostly a ValueError, where the bytes are no record."""
    feature = _Example.FromString(serialized).features.feature
    tokens = np.frombuffer(feature["tokens"].bytes_list.value[0], "<i4")
    starts, length = np.asarray(feature["doc_starts"].int64_list.value), feature["length"].int64_list.value[0]
    if not 0 <= length <= tokens.size or (starts.size and not 0 <= starts[0] <= starts[-1] < length):
        raise ValueError(f"a record of {tokens.size} tokens has {length} and documents at {starts}")
    if (starts[1:] <= starts[:-1]).any():
        raise ValueError("the documents of a record are not in order")
    return Record(tokens, starts.astype(np.int32), length)


def write_shard(path: pathlib.Path, documents: Sequence[np.ndarray], text_bytes: int, record_tokens: int) -> Shard:
    """Writes `documents` as a shard at `path`, whole or not at all."""
    digest, records = hashlib.sha256(), 0
    with places.local_file(path) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,zstd:3")
        for record in cut(documents, record_tokens):
            serialized = serialize(record)
            digest.update(hashlib.sha256(serialized).digest())
            writer.write(serialized)
            records += 1
        writer.close()
        file_bytes = os.path.getsize(partial)
    return Shard(
        file=path.name,
        records=records,
        positions=max(0, sum(map(len, documents)) - 1),
        documents=len(documents),
        tokens=sum(map(len, documents)) - len(documents),
        bytes=text_bytes,
        digest=digest.hexdigest(),
        file_bytes=file_bytes,
    )


def shard_name(split: str, index: int, count: int) -> str:
    """The TFDS name of a shard's file."""
    return f"{_NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_tfds_metadata(directory: pathlib.Path, shards: dict[str, list[Shard]], record_tokens: int) -> None:
    """Writes dataset_info.json and features.json, with which `tfds.builder_from_directory` opens `directory`.

    The shards may be elsewhere yet.
    """
    import tensorflow_datasets as tfds  # only the writer needs it: others start faster

    files = [directory / shard.file for split in SPLITS for shard in shards[split]]
    absent = [file for file in files if not file.exists()]
    for file in absent:
        file.touch()  # TFDS looks for the names, not for what is in them
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,
        dataset_name=_NAME,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=tfds.features.FeaturesDict(
            {
                "tokens": tfds.features.Tensor(shape=(record_tokens + 1,), dtype=np.int32, encoding="bytes"),
                "doc_starts": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                "length": np.int32,
            }
        ),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[shard.records for shard in shards[split]],
                num_bytes=sum(shard.file_bytes for shard in shards[split]),
                filename_template=template,
            )
            for split in SPLITS
        ],
        filename_template=template,
        check_data=False,
        description="Token records of lmboost: a record's last token is the first of the next record of its shard.",
    )
    for file in absent:
        file.unlink()


def fingerprint(shards: dict[str, list[Shard]]) -> str:
    """sha256 over the content of every record of every shard."""
    content = [[split, [shard.digest for shard in shards[split]]] for split in SPLITS]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def totals(shards: Sequence[Shard]) -> dict[str, int]:
    """Sums over shards of documents, tokens (targets inside a document), bytes (UTF-8), records."""
    return {name: sum(getattr(s, name) for s in shards) for name in ("documents", "tokens", "bytes", "records")}


def bucket_of(key: bytes, validation_fraction: float, train: int, validation: int) -> int:
    """The bucket of a document whose text has sha256 `key`: train buckets first, then validation buckets."""
    place = int.from_bytes(key[8:16])
    if int.from_bytes(key[:8]) < validation_fraction * 2**64:
        return train + place % validation
    return place % train


def write_run(path: pathlib.Path, buckets: Sequence[Sequence[bytes]]) -> list[int]:
    """Writes the documents of each bucket, the buckets one after the other; returns where each begins, and the end."""
    offsets = [0]
    with places.whole_file(path) as partial, partial.open("wb") as file:
        for bucket in buckets:
            if bucket:
                file.write(zstandard.compress(b"".join(struct.pack("<Q", len(raw)) + raw for raw in bucket), 1))
            offsets.append(file.tell())
    return offsets


def read_run(path: pathlib.Path, start: int, stop: int) -> list[bytes]:
    """The documents of the bucket at [start, stop) of a file made by `write_run`."""
    if start == stop:
        return []
    with path.open("rb") as file:
        file.seek(start)
        packed = zstandard.decompress(file.read(stop - start))
    documents, at = [], 0
    while at < len(packed):
        (length,) = struct.unpack_from("<Q", packed, at)
        documents.append(packed[at + 8 : at + 8 + length])
        at += 8 + length
    return documents


def write_json(path: pathlib.Path, content: object) -> None:
    """Writes JSON whole or not at all."""
    with places.whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(directory: str | os.PathLike) -> dict:
    """The manifest of a prepared data set; anything else is a UserError."""
    path = epath.Path(directory) / MANIFEST
    if not path.is_file():
        partial = epath.Path(f"{epath.Path(directory)}.partial")
        hint = f" Preparation has not finished: {partial} exists, run its prepare command again."
        raise UserError(
            f"data {str(directory)!r} is not a prepared data set: no {path}.{hint if partial.is_dir() else ''} "
            f"Make one with python -m lmboost.prepare --out={directory}"
        )
    hint = "Prepare the data again."
    if (found := strict_json.read(path, {"format": int}, hint)["format"]) != FORMAT:
        raise UserError(f"{path} has format {found}, this version reads {FORMAT}: prepare the data again.")
    manifest = strict_json.read(path, _MANIFEST, hint)
    counts = [manifest["record_tokens"], manifest["vocab_size"], *(manifest["splits"][s]["tokens"] for s in SPLITS)]
    if min(counts) < 1:
        raise UserError(f"{path}: record_tokens, vocab_size and the splits' tokens must be at least 1. {hint}")
    for split in SPLITS:
        entries = [strict_json.make(Shard, entry, f"{path}: a shard", hint) for entry in manifest["shards"][split]]
        if not entries or any(pathlib.PurePath(entry.file).name != entry.file for entry in entries):
            raise UserError(f"{path}: shards.{split} are not names of files beside it. {hint}")
        if any(min(entry.records, entry.positions, entry.file_bytes) < 1 for entry in entries):
            raise UserError(f"{path}: shards.{split} has a file without records. {hint}")
        manifest["shards"][split] = entries
    return manifest


@contextlib.contextmanager
def disk_errors(directory: pathlib.Path) -> Iterator[None]:
    """A UserError where the disk is full or can't be written; ArrayRecord and TensorStore raise other errors."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            message = f"no space left for {directory}: free some and run the same command again, it continues."
            raise UserError(message) from error
        if isinstance(error, OSError) and str(error.filename).startswith(str(directory.parent)):
            message = f"{error.filename} can't be written: {error.strerror}. Choose another --out or its rights."
            raise UserError(message) from error
        raise
