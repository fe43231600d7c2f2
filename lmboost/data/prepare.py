"""From documents to token records, in parallel, resumable and in bounded memory.

Two passes over `OUT.partial`: the first divides the documents by the hash of their text into buckets on disk, one
bucket per shard; the second shuffles each bucket, tokenises it and writes its records. Who runs them, processes of this
machine (`local`) or a cluster (`beam`), changes nothing of what comes out (`buckets`), nor does the documents' order.
What is done is kept, so the same command continues where it was killed. The last act renames the result to OUT.
"""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Protocol

from lmboost import places
from lmboost.data import buckets, hub, records, sources, unfinished
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.data.local import Local
from lmboost.errors import UserError, one_of

_SHARD_BYTES = 64_000_000
_SMALL_SHARD_BYTES = 2_000_000  # a small corpus still gets enough shards to keep some cores busy
RUNNERS = (Local.name, "DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner")
REMOTE = ("DataflowRunner",)  # whose workers have no disk in common with this machine


class Passes(Protocol):
    """Who runs the two passes over a working directory.

    `spread` divides the documents of all units into buckets there and returns their tally; `bucket` gives a bucket's
    documents as UTF-8, in some order; `make` makes each bucket a shard: `shards/BUCKET.array_record` and its `.json`.
    Each does what has not been done before.
    """

    name: str

    def spread(self, partial: pathlib.Path, units: Sequence[sources.Unit], plan: Mapping, most: int) -> dict: ...

    def bucket(self, partial: pathlib.Path, bucket: int) -> list[bytes]: ...

    def make(self, partial: pathlib.Path, plan: Mapping) -> None: ...


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
    runner: str = Local.name,
    beam_options: str = "",
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
      workers: processes of this machine, where it runs the passes.
      runner: who runs them, one of `RUNNERS`; the others are Beam's, and `out` may then be in a bucket.
      beam_options: the runner's own flags, as Beam's documentation has them.
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
    loaded = _check(arguments, workers, max_document_bytes)
    arguments["tokenizer_fingerprint"] = loaded.fingerprint if loaded else None
    out = _place(out, runner)
    passes = _passes(runner, beam_options, workers, report)
    partial = out.with_name(out.name + ".partial")
    if (out / records.MANIFEST).is_file():
        manifest = records.read_manifest(out)
        _check_same(out, manifest["arguments"], arguments, "choose another --out, or remove it to make it anew")
        unfinished.clear(partial)  # a kill between the last rename and the clearing up leaves it
        report(f"{out} is already prepared with these arguments: nothing to do.")
        return manifest
    begun = places.is_remote(out) and (partial / unfinished.PLAN).is_file()  # in a bucket it is built where it will be
    if not begun and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={str(out)!r} exists and is not a prepared data set: choose another --out or remove it.")
    places.check_target(out, f"--out={str(out)!r}")
    units = _find(arguments, report)
    if runner in REMOTE and (local := [path for unit in units for path in unit.paths if not places.is_remote(path)]):
        raise UserError(
            f"source: {runner}'s workers do not see this machine's disk, where {local[0]!r} is: give names that begin "
            f"with {places.SCHEME} or {hub.PREFIX}."
        )
    with records.disk_errors(partial), unfinished.locked(partial):
        plan = _plan(partial, arguments, units, passes, report)
        counted = passes.spread(partial, units, plan, max_document_bytes)
        _check_spread(partial, counted["counts"], plan)
        _keep_tokenizer(partial, loaded, plan, passes, report)
        tokenizer = buckets.load_once(partial / "tokenizer")
        report(f"{tokenizer.borders}; {tokenizer.encoder} makes their tokens")
        passes.make(partial, plan)
        manifest = _assemble(partial, out, plan, counted)
        unfinished.clear(partial)
    return manifest


def _find(arguments: dict, report: Callable[[str], None]) -> list[sources.Unit]:
    """The units of the sources, each with the split that its documents belong to."""
    field = arguments["text_field"]
    units = sources.find(arguments["source"], field)
    for origin in _origins(arguments):
        report(f"{origin['source']} is {hub.find(origin['source'])}")
    if validation := arguments.get("validation_source"):
        parts = ((units, "train"), (sources.find(validation, field), "validation"))
        return [dataclasses.replace(unit, part=part) for units, part in parts for unit in units]
    if not sources.one_text(units, field):
        return units
    share = arguments["validation_fraction"]
    report(f"{units[0].paths[0]} is one text: its last {share:.1%} are the validation split")
    return [dataclasses.replace(units[0], part="ends")]


def _origins(arguments: Mapping) -> list[dict[str, str]]:
    """Where the documents of corpora of the Hub come from, and their licence."""
    named = [*arguments["source"], *arguments.get("validation_source", ())]
    return [{"source": name} | hub.find(name).origin for name in named if name.startswith(hub.PREFIX)]


def _place(out: str | os.PathLike, runner: str) -> pathlib.Path:
    if not places.is_remote(out):
        if runner in REMOTE:
            raise UserError(
                f"out={str(out)!r}: {runner}'s workers do not see this machine's disk: give a {places.SCHEME} name."
            )
        return pathlib.Path(os.path.realpath(os.path.expanduser(out)))
    if runner == Local.name:
        raise UserError(
            f"out={str(out)!r}: expected a local directory; mount the bucket (gcsfuse) and name the mount, or have a "
            "--runner write to it."
        )
    place = places.find(str(out), "--out")
    if len(place.parts) < 3:
        raise UserError(f"out={str(out)!r}: expected a directory in the bucket, such as {out}/data.")
    return place


def has_beam() -> bool:
    """Whether Apache Beam is installed."""
    return importlib.util.find_spec("apache_beam") is not None


def _passes(runner: str, beam_options: str, workers: int, report: Callable[[str], None]) -> Passes:
    one_of("runner", runner, RUNNERS)
    if runner != Local.name:
        if not has_beam():
            raise UserError(f'runner={runner!r} needs the package apache-beam: pip install "lmboost[beam]".')
        if runner == "DataflowRunner" and not importlib.util.find_spec("apitools"):
            raise UserError(f'runner={runner!r} needs the packages of Google Cloud: pip install "lmboost[dataflow]".')
        from lmboost.data.beam import Beam  # only where it is asked for, as it may not be there

        return Beam(runner, beam_options, report)
    if beam_options:
        raise UserError(f"beam_options={beam_options!r} are a --runner's, and none is given: leave them out.")
    return Local(workers, report)


def _check(arguments: dict, workers: int, max_document_bytes: int) -> tokenizer_lib.Tokenizer | None:
    """Checks what can be checked without reading a source; returns the tokenizer, None where one is to be trained."""
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


def _plan(
    partial: pathlib.Path,
    arguments: dict,
    units: Sequence[sources.Unit],
    passes: Passes,
    report: Callable[[str], None],
) -> dict:
    """What the run will do, kept on disk; goes on with an earlier run's work where nothing has changed."""
    size = sum(unit.size for unit in units)
    train = arguments["shards"] or max(-(-size // _SHARD_BYTES), min(16, -(-size // _SMALL_SHARD_BYTES)), 1)
    validation = max(1, round(train * arguments["validation_fraction"]))
    digest = hashlib.sha256(repr(list(units)).encode()).hexdigest()
    plan = {
        "arguments": arguments,
        "buckets": [train, validation],
        "units": digest,
        "passes": passes.name,
        "origins": _origins(arguments),
    }
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
        report(f"sources, arguments or the runner have changed since {partial} was begun: starting over")
    unfinished.empty(partial)
    for name in ("spread", "shards"):
        (partial / name).mkdir(exist_ok=True)
    records.write_json(path, plan)
    return plan


def _check_spread(partial: pathlib.Path, found: Mapping[str, int], plan: Mapping) -> None:
    counts = {split: found[split] for split in records.SPLITS}
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


def _keep_tokenizer(
    partial: pathlib.Path,
    loaded: tokenizer_lib.Tokenizer | None,
    plan: Mapping,
    passes: Passes,
    report: Callable[[str], None],
) -> None:
    """Puts the tokenizer in `partial`/tokenizer, trained on the training documents where it is asked for."""
    buckets.load_once.cache_clear()  # this process may have made another data set in the same place
    directory = partial / "tokenizer"
    if loaded:
        with places.staged(directory) as local:
            loaded.save(local)
    elif not (directory / tokenizer_lib.FILE_NAMES["sentencepiece"]).is_file():
        start = time.monotonic()
        texts = (
            raw.decode("utf-8")
            for bucket in range(plan["buckets"][0])
            for raw in buckets.shuffled(passes.bucket(partial, bucket), plan["arguments"]["seed"])
        )
        size = _vocab_size(plan["arguments"]["tokenizer"])
        with places.staged(directory) as local:
            tokenizer_lib.train(texts, size, local / tokenizer_lib.FILE_NAMES["sentencepiece"])
        report(f"trained a tokenizer of {size} pieces in {time.monotonic() - start:.0f} s")


def _assemble(partial: pathlib.Path, out: pathlib.Path, plan: Mapping, counted: Mapping) -> dict:
    """Makes the data set of the shards; may be killed and called again at any point.

    A directory is built in `partial`/out and renamed; in a bucket the manifest, without which there is no data set,
    comes last.
    """
    paths = [buckets.done(partial, i) for i in range(sum(plan["buckets"]))]
    with futures.ThreadPoolExecutor(32) as pool:  # of a bucket each is a request
        made = list(pool.map(lambda path: unfinished.read(path, buckets.MADE), paths))
    written = buckets.full(made, plan)
    shards = buckets.named(written)
    target = out if places.is_remote(out) else partial / "out"
    target.mkdir(exist_ok=True)
    places.move(
        (partial / "shards" / old.file, target / new.file)
        for split in records.SPLITS
        for old, new in zip(written[split], shards[split], strict=True)
    )
    with places.local_copy(partial / "tokenizer") as tokenizer, places.staged(target) as local:
        shutil.copytree(tokenizer, local / "tokenizer", dirs_exist_ok=True)
        records.write_tfds_metadata(local, shards, plan["arguments"]["record_tokens"])
    tokenizer = buckets.load_once(partial / "tokenizer")
    manifest = buckets.describe(shards, made, counted, tokenizer, plan)
    records.write_json(target / records.MANIFEST, manifest)
    if target != out:
        places.sync_tree(target)
        os.rename(target, out)
        places.sync_directory(out.parent)
    return records.read_manifest(out)
