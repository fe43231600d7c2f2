"""From a document to its place in a record: what does not depend on who runs the passes.

`placed` says in which bucket a document goes, `shuffled` where in it, `make` writes a bucket as a shard, `describe`
makes the manifest of all. Whoever calls them, in whatever order and number of processes, gets the same bytes.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from lmboost import places
from lmboost.data import records, sources
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError

_BATCH_BYTES = 1_000_000  # of text that is tokenised at once
_NAMED = 3  # how many documents a report names
_LIBRARIES = ("array_record", "numpy", "sentencepiece", "tensorflow_datasets", "tokenizers")
TALLY = {
    "counts": dict.fromkeys(("invalid", "empty", "validation", "train"), int),
    "named": {"invalid": [list], "empty": [list]},
}
MADE = {"shard": dict | None, "empty": int}


def tally() -> dict:
    """Counts of documents, and of each problem the first ones by the number of their unit and their origin."""
    return {"counts": dict.fromkeys(TALLY["counts"], 0), "named": {name: [] for name in TALLY["named"]}}


def merged(tallies: Iterable[Mapping]) -> dict:
    """The tally of all; their order and grouping do not matter."""
    total = tally()
    for each in tallies:
        for name, count in each["counts"].items():
            total["counts"][name] += count
        for name, entries in each["named"].items():
            found = [*total["named"][name], *map(list, entries)]
            total["named"][name] = sorted(found, key=lambda entry: entry[0])[:_NAMED]
    return total


def placed(index: int, unit: sources.Unit, plan: Mapping, most: int, counted: dict) -> Iterator[tuple[int, bytes]]:
    """The documents of a unit as UTF-8, each with the number of its bucket: those of train first.

    Args:
      index: the unit's number.
      plan: see `prepare`.
      most: bytes of a document.
      counted: the tally in which they are counted on the way.
    """
    arguments, (train, validation) = plan["arguments"], plan["buckets"]
    counts, named = counted["counts"], counted["named"]
    for document in sources.read(unit, arguments["text_field"], arguments["validation_fraction"], most):
        problems = [name for name, there in (("invalid", not document.valid), ("empty", not document.text)) if there]
        if not document.valid and arguments["strict"]:
            raise UserError(f"{document.origin}: not valid UTF-8. Mend or exclude it, or leave out --strict.")
        for name in problems:
            counts[name] += 1
            named[name] = (named[name] + [[index, document.origin]])[:_NAMED]
        if not document.text:
            continue
        raw = document.text.encode("utf-8")
        share = {"train": 0.0, "validation": 1.0}.get(document.split, arguments["validation_fraction"])
        bucket = records.bucket_of(hashlib.sha256(raw).digest(), share, train, validation)
        counts["train" if bucket < train else "validation"] += 1
        yield bucket, raw


def done(partial: pathlib.Path, bucket: int) -> pathlib.Path:
    """The file that says what a bucket has become; the shard is beside it."""
    return partial / "shards" / f"{bucket:06d}.json"


def shuffled(raws: Iterable[bytes], seed: int) -> list[bytes]:
    """A bucket's documents in the order of a hash of seed and text."""
    salt = struct.pack("<Q", seed)
    return sorted(raws, key=lambda raw: hashlib.sha256(salt + raw).digest())


def make(path: os.PathLike, raws: Sequence[bytes], tokenizer: tokenizer_lib.Tokenizer, record_tokens: int) -> dict:
    """Tokenises a bucket's documents and writes them as the shard `path`; returns what `MADE` says of it."""
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    last = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    documents = []
    text_bytes = empty = 0
    for batch in sources.grouped(raws, len, _BATCH_BYTES):
        for raw, ids in zip(batch, tokenizer.encode_batch([raw.decode("utf-8") for raw in batch]), strict=True):
            if len(ids):
                documents.append(np.concatenate([first, ids, last]).astype(np.int32))
                text_bytes += len(raw)
            else:
                empty += 1
    shard = None
    if sum(map(len, documents)) > 1:
        shard = vars(records.write_shard(path, documents, text_bytes, record_tokens))
    return {"shard": shard, "empty": empty}


def make_once(partial: pathlib.Path, bucket: int, raws: Callable[[], Iterable[bytes]], plan: Mapping) -> None:
    """Makes a bucket of these documents its shard in a working directory, unless it has been made."""
    path, arguments = done(partial, bucket), plan["arguments"]
    if path.exists():
        return
    documents = shuffled(raws(), arguments["seed"])
    tokenizer = load_once(partial / "tokenizer")
    made = make(path.with_suffix(".array_record"), documents, tokenizer, arguments["record_tokens"])
    records.write_json(path, made)


def full(made: Sequence[Mapping], plan: Mapping) -> dict[str, list[records.Shard]]:
    """The shards of each split that have records, as they were written, from what `make` returned for each bucket."""
    train = plan["buckets"][0]
    shards = {}
    for split, entries in (("train", made[:train]), ("validation", made[train:])):
        shards[split] = [records.Shard(**entry["shard"]) for entry in entries if entry["shard"]]
        if not shards[split]:
            raise UserError(
                f"tokenizer={plan['arguments']['tokenizer']!r} turns every document of the {split} split to nothing."
            )
    return shards


def named(shards: Mapping[str, Sequence[records.Shard]]) -> dict[str, list[records.Shard]]:
    """The same shards under their names in the data set."""
    return {
        split: [
            dataclasses.replace(shard, file=records.shard_name(split, i, len(found))) for i, shard in enumerate(found)
        ]
        for split, found in shards.items()
    }


def describe(
    shards: Mapping[str, Sequence[records.Shard]],
    made: Sequence[Mapping],
    counted: Mapping,
    tokenizer: tokenizer_lib.Tokenizer,
    plan: Mapping,
) -> dict:
    """The manifest of a data set of these shards."""
    arguments = plan["arguments"]
    problems = {
        name: {"documents": counted["counts"][name], "first": [origin for _, origin in counted["named"][name]]}
        for name in ("invalid", "empty")
    }
    problems["without_tokens"] = {"documents": sum(entry["empty"] for entry in made)}
    manifest = {
        "format": records.FORMAT,
        "fingerprint": records.fingerprint(shards),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "record_tokens": arguments["record_tokens"],
        "splits": {split: records.totals(shards[split]) for split in records.SPLITS},
        "shards": {split: [vars(shard) for shard in shards[split]] for split in records.SPLITS},
        "arguments": arguments,
        "problems": problems,
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES}
        | {"python": platform.python_version()},
    }
    return manifest | ({"origins": plan["origins"]} if plan["origins"] else {})


@functools.lru_cache(maxsize=1)
def load_once(directory: os.PathLike) -> tokenizer_lib.Tokenizer:
    """The tokenizer of a working directory; a worker makes many shards with one."""
    with places.local_copy(directory) as local:
        return tokenizer_lib.load(local)
