"""From documents to token records, in parallel, resumable and in bounded memory.

Two passes over `OUT.partial`: `_spread` divides the documents by the hash of their text into buckets on disk, one
bucket per shard; `_make_shard` shuffles a bucket, tokenises it and writes its records. Each task leaves one JSON file
when it is done, so the same command continues where it was killed. The last act renames the result to OUT. What
comes out depends on the documents and the arguments, not on the documents' order or the number of workers.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import multiprocessing
import os
import pathlib
import platform
import shutil
import signal
import struct
import time
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np

from lmboost import orphans, places
from lmboost.data import records, sources, unfinished
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError

_RUN_BYTES = 64_000_000  # text that one task holds before it writes to disk
_SHARD_BYTES = 64_000_000
_SMALL_SHARD_BYTES = 2_000_000  # a small corpus still gets enough shards to keep some cores busy
_BATCH_BYTES = 1_000_000  # of text that is tokenised at once
_SPREAD = {
    "runs": [{"file": str, "offsets": [int]}],
    "counts": dict.fromkeys(("invalid", "empty", "validation", "train"), int),
    "named": {"invalid": [str], "empty": [str]},
}
_SHARD = {"shard": dict | None, "empty": int}
_NAMED = 3  # how many documents a report names
_LIBRARIES = ("array_record", "numpy", "sentencepiece", "tensorflow_datasets", "tokenizers")


def prepare(
    out: str | os.PathLike,
    source: Sequence[str],
    tokenizer: str,
    *,
    text_field: str = "text",
    validation_fraction: float = 0.01,
    record_tokens: int = 8192,
    seed: int = 0,
    shards: int = 0,
    strict: bool = False,
    validation_source: Sequence[str] = (),
    max_document_bytes: int = sources.MAX_DOCUMENT_BYTES,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> dict:
    """Makes the data set `out` and returns its manifest.

    Args:
      out: directory to make; work goes on in `out`.partial beside it.
      source: see `sources.find`.
      tokenizer: path for `tokenizer.load`, or "train:SIZE" to train one on the training documents.
      text_field: field of JSONL, Parquet and TFDS sources that holds the text.
      validation_fraction: share of documents in the validation split; the text's hash decides, so equal documents
        fall in one split, whatever else changes.
      record_tokens: targets per record.
      seed: of the documents' order.
      shards: files of the train split; 0 chooses by size.
      strict: invalid UTF-8 is an error instead of U+FFFD.
      validation_source: the documents of the validation split, where they are not a share of `source`. Without it, of
        a single text the end is the validation split.
      max_document_bytes: a longer document is an error.
      workers: processes.
      report: receives the progress lines.

    Raises:
      UserError: bad arguments or input, a full disk, or `out` was made with other arguments.
    """
    arguments = {
        "source": list(source),
        "tokenizer": tokenizer,
        "text_field": text_field,
        "validation_fraction": validation_fraction,
        "record_tokens": record_tokens,
        "seed": seed,
        "shards": shards,
        "strict": strict,
    }
    if validation_source:
        arguments["validation_source"] = list(validation_source)
    loaded = _check(out, arguments, workers, max_document_bytes)
    arguments["tokenizer_fingerprint"] = loaded.fingerprint if loaded else None
    out = pathlib.Path(os.path.realpath(os.path.expanduser(out)))
    partial = out.with_name(out.name + ".partial")
    if (out / records.MANIFEST).is_file():
        manifest = records.read_manifest(out)
        _check_same(out, manifest["arguments"], arguments, "choose another --out, or remove it to make it anew")
        unfinished.clear(partial)  # a kill between the last rename and the clearing up leaves it
        report(f"{out} is already prepared with these arguments: nothing to do.")
        return manifest
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={str(out)!r} exists and is not a prepared data set: choose another --out or remove it.")
    places.check_target(out, f"--out={str(out)!r}")
    units = _find(arguments, report)
    with records.disk_errors(partial), unfinished.locked(partial):
        plan = _plan(partial, arguments, units, report)
        tasks = [(partial, i, unit, plan, max_document_bytes) for i, unit in enumerate(units)]
        _run(_spread, tasks, workers, "read", report)
        spread = [unfinished.read(_spread_done(partial, i), _SPREAD) for i in range(len(units))]
        _check_spread(partial, spread, plan)
        _keep_tokenizer(partial, loaded, plan, report)
        report((loaded or tokenizer_lib.load(partial / "tokenizer")).borders)
        tasks = [(partial, bucket, plan) for bucket in range(sum(plan["buckets"]))]
        _run(_make_shard, tasks, workers, "tokenised", report)
        manifest = _assemble(partial, out, plan, spread)
        unfinished.clear(partial)
    return manifest


def _find(arguments: dict, report: Callable[[str], None]) -> list[sources.Unit]:
    """The units of the sources, each with the split that its documents belong to."""
    field = arguments["text_field"]
    units = sources.find(arguments["source"], field)
    if validation := arguments.get("validation_source"):
        parts = ((units, "train"), (sources.find(validation, field), "validation"))
        return [dataclasses.replace(unit, part=part) for units, part in parts for unit in units]
    if not sources.one_text(units, field):
        return units
    share = arguments["validation_fraction"]
    report(f"{units[0].paths[0]} is one text: its last {share:.1%} are the validation split")
    return [dataclasses.replace(units[0], part="ends")]


def _check(
    out: str | os.PathLike, arguments: dict, workers: int, max_document_bytes: int
) -> tokenizer_lib.Tokenizer | None:
    """Checks what can be checked without reading a source; returns the tokenizer, None where one is to be trained."""
    if "://" in str(out):
        raise UserError(f"out={str(out)!r}: expected a local directory; mount the bucket (gcsfuse) and name the mount.")
    if not arguments["source"]:
        raise UserError("source is empty: give at least one --source.")
    if not 0 < arguments["validation_fraction"] < 1:
        raise UserError(f"validation_fraction={arguments['validation_fraction']}: expected a number between 0 and 1.")
    numbers = arguments | {"workers": workers, "max_document_bytes": max_document_bytes}
    for name, low in (("record_tokens", 2), ("shards", 0), ("seed", 0), ("workers", 1), ("max_document_bytes", 1)):
        if numbers[name] < low:
            raise UserError(f"{name}={numbers[name]}: expected at least {low}.")
    if arguments["tokenizer"].startswith("train:"):
        _vocab_size(arguments["tokenizer"])
        return None
    loaded = tokenizer_lib.load(os.path.expanduser(arguments["tokenizer"]))
    if loaded.bos_id is None and loaded.eos_id is None:
        raise UserError(
            f"tokenizer={arguments['tokenizer']!r} has neither a begin nor an end token, so documents could not be "
            f"told apart: name one in tokenizer_config.json (bos_token, eos_token)."
        )
    return loaded


def _vocab_size(spec: str) -> int:
    size = spec.removeprefix("train:")
    if not size.isdecimal() or int(size) < 300:
        raise UserError(f"tokenizer={spec!r}: expected train:SIZE with a SIZE of at least 300, such as train:8192.")
    return int(size)


def _check_same(directory: pathlib.Path, made_with: dict, arguments: dict, remedy: str) -> None:
    differ = [name for name, value in arguments.items() if made_with.get(name) != value]
    if differ:
        changes = "; ".join(f"{name}={made_with.get(name)!r}, now {arguments[name]!r}" for name in differ)
        raise UserError(f"{directory} was made with other arguments ({changes}): {remedy}.")


def _plan(partial: pathlib.Path, arguments: dict, units: Sequence[sources.Unit], report: Callable) -> dict:
    """What the run will do, kept on disk; goes on with an earlier run's work where nothing has changed."""
    size = sum(unit.size for unit in units)
    train = arguments["shards"] or max(-(-size // _SHARD_BYTES), min(16, -(-size // _SMALL_SHARD_BYTES)), 1)
    validation = max(1, round(train * arguments["validation_fraction"]))
    digest = hashlib.sha256(repr(list(units)).encode()).hexdigest()
    plan = {"arguments": arguments, "buckets": [train, validation], "units": digest}
    path = partial / unfinished.PLAN
    if path.is_file():
        earlier = unfinished.read(path, {"arguments": dict})
        if earlier == plan:
            report(f"continuing the unfinished work in {partial}")
            return plan
        if any((partial / "spread").glob("*.json")):
            _check_same(
                partial, earlier["arguments"], arguments, "repeat those to continue, or remove it to start over"
            )
        report(f"sources or arguments have changed since {partial} was begun: starting over")
    unfinished.empty(partial)
    for name in ("spread", "shards"):
        (partial / name).mkdir()
    records.write_json(path, plan)
    return plan


def _run(task: Callable, arguments: list[tuple], workers: int, done: str, report: Callable) -> None:
    """Runs `task` on each of `arguments`; the first error ends it."""
    start, told = time.monotonic(), time.monotonic()

    def tell(count: int) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            report(f"{done} {count} of {len(arguments)} parts in {told - start:.0f} s")

    if workers == 1 or len(arguments) == 1:
        for count, each in enumerate(arguments, 1):
            task(*each)
            tell(count)
        return
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(min(workers, len(arguments)), context, _begin_worker)
    try:
        pending = [pool.submit(task, *each) for each in arguments]
        for count, future in enumerate(futures.as_completed(pending), 1):
            future.result()
            tell(count)
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    except futures.process.BrokenProcessPool as error:
        raise UserError(
            "a worker process died, most likely for want of memory: run the same command with fewer --workers; "
            "it continues where it stopped."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library would start a thread per core in each process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    orphans.end_with_parent()


def _spread_done(partial: pathlib.Path, index: int) -> pathlib.Path:
    return partial / "spread" / f"{index:06d}.json"


def _spread(partial: pathlib.Path, index: int, unit: sources.Unit, plan: dict, most: int) -> None:
    """Divides a unit's documents into buckets, in runs: one file each, the buckets one after the other in it."""
    if _spread_done(partial, index).is_file():
        return
    arguments, (train, validation) = plan["arguments"], plan["buckets"]
    buckets: list[list[bytes]] = [[] for _ in range(train + validation)]
    held, runs = 0, []
    counts = {"invalid": 0, "empty": 0, "validation": 0, "train": 0}
    named = {"invalid": [], "empty": []}

    def flush() -> None:
        path = partial / "spread" / f"{index:06d}-{len(runs):04d}.bin"
        runs.append({"file": path.name, "offsets": records.write_run(path, buckets)})
        for bucket in buckets:
            bucket.clear()

    for document in sources.read(unit, arguments["text_field"], arguments["validation_fraction"], most):
        problems = [name for name, there in (("invalid", not document.valid), ("empty", not document.text)) if there]
        if not document.valid and arguments["strict"]:
            raise UserError(f"{document.origin}: not valid UTF-8. Mend or exclude it, or leave out --strict.")
        for name in problems:
            counts[name] += 1
            named[name] = (named[name] + [document.origin])[:_NAMED]
        if not document.text:
            continue
        raw = document.text.encode("utf-8")
        share = {"train": 0.0, "validation": 1.0}.get(document.split, arguments["validation_fraction"])
        bucket = records.bucket_of(hashlib.sha256(raw).digest(), share, train, validation)
        buckets[bucket].append(raw)
        counts["train" if bucket < train else "validation"] += 1
        held += len(raw)
        if held >= _RUN_BYTES:
            flush()
            held = 0
    if held:
        flush()
    records.write_json(_spread_done(partial, index), {"runs": runs, "counts": counts, "named": named})


def _check_spread(partial: pathlib.Path, spread: Sequence[dict], plan: dict) -> None:
    counts = {split: sum(each["counts"][split] for each in spread) for split in records.SPLITS}
    total, fraction = sum(counts.values()), plan["arguments"]["validation_fraction"]
    for split in records.SPLITS:
        if not counts[split]:
            unfinished.clear(partial)  # nothing in it can serve other arguments
            if not total:
                raise UserError(f"source={plan['arguments']['source']}: every document is empty, there is no text.")
            raise UserError(
                f"validation_fraction={fraction}: none of the {total} documents falls in the {split} split. "
                f"{'Lower' if split == 'train' else 'Raise'} --validation_fraction, give more documents, or those of "
                "the validation split by themselves with --validation_source."
            )


def _bucket_documents(partial: pathlib.Path, bucket: int, seed: int) -> list[bytes]:
    """A bucket's documents as UTF-8, in the order of a hash of seed and text."""
    spread = [unfinished.read(path, _SPREAD) for path in sorted((partial / "spread").glob("*.json"))]
    documents = []
    for run in (run for each in spread for run in each["runs"]):
        start, stop = run["offsets"][bucket : bucket + 2]
        documents += records.read_run(partial / "spread" / run["file"], start, stop)
    salt = struct.pack("<Q", seed)
    return sorted(documents, key=lambda raw: hashlib.sha256(salt + raw).digest())


def _keep_tokenizer(
    partial: pathlib.Path, loaded: tokenizer_lib.Tokenizer | None, plan: dict, report: Callable
) -> None:
    """Puts the tokenizer in `partial`/tokenizer, trained on the training documents where it is asked for."""
    _load_once.cache_clear()  # this process may have made another data set in the same place
    path = partial / "tokenizer" / tokenizer_lib.FILE_NAMES["sentencepiece"]
    if loaded:
        loaded.save(partial / "tokenizer")
    elif not path.is_file():
        start = time.monotonic()
        texts = (
            raw.decode("utf-8")
            for bucket in range(plan["buckets"][0])
            for raw in _bucket_documents(partial, bucket, plan["arguments"]["seed"])
        )
        size = _vocab_size(plan["arguments"]["tokenizer"])
        tokenizer_lib.train(texts, size, path)
        report(f"trained a tokenizer of {size} pieces in {time.monotonic() - start:.0f} s")


def _make_shard(partial: pathlib.Path, bucket: int, plan: dict) -> None:
    """Shuffles and tokenises a bucket and writes it as a shard: `shards/BUCKET.array_record` and its `.json`."""
    done = partial / "shards" / f"{bucket:06d}.json"
    if done.is_file():
        return
    arguments = plan["arguments"]
    tokenizer = _load_once(partial / "tokenizer")
    raws = _bucket_documents(partial, bucket, arguments["seed"])
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
        path = done.with_suffix(".array_record")
        shard = vars(records.write_shard(path, documents, text_bytes, arguments["record_tokens"]))
    records.write_json(done, {"shard": shard, "empty": empty})


_load_once = functools.lru_cache(maxsize=1)(tokenizer_lib.load)  # a worker makes many shards with one tokenizer


def _assemble(partial: pathlib.Path, out: pathlib.Path, plan: dict, spread: Sequence[dict]) -> dict:
    """Builds the data set in `partial`/out and renames it to `out`; may be killed and called again at any point."""
    arguments, (train, validation) = plan["arguments"], plan["buckets"]
    target = partial / "out"
    target.mkdir(exist_ok=True)
    made = [unfinished.read(partial / "shards" / f"{i:06d}.json", _SHARD) for i in range(train + validation)]
    shards: dict[str, list[records.Shard]] = {}
    for split, entries in (("train", made[:train]), ("validation", made[train:])):
        full = [records.Shard(**entry["shard"]) for entry in entries if entry["shard"]]
        if not full:
            raise UserError(
                f"tokenizer={arguments['tokenizer']!r} turns every document of the {split} split to nothing."
            )
        shards[split] = []
        for i, shard in enumerate(full):
            name = records.shard_name(split, i, len(full))
            if (partial / "shards" / shard.file).is_file():
                os.replace(partial / "shards" / shard.file, target / name)
            shards[split].append(records.Shard(**vars(shard) | {"file": name}))
    tokenizer = tokenizer_lib.load(partial / "tokenizer")
    shutil.copytree(partial / "tokenizer", target / "tokenizer", dirs_exist_ok=True)
    records.write_tfds_metadata(target, shards, arguments["record_tokens"])
    problems = {
        name: {
            "documents": sum(each["counts"][name] for each in spread),
            "first": [origin for each in spread for origin in each["named"][name]][:_NAMED],
        }
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
    records.write_json(target / records.MANIFEST, manifest)
    places.sync_tree(target)
    os.rename(target, out)
    places.sync_directory(out.parent)
    return records.read_manifest(out)
