"""Makes token records of text.

python -m lmboost.prepare --source='corpus/**/*.txt' --tokenizer=train:8192 --out=DIR
"""

import argparse
import contextlib
import os

from lmboost import places
from lmboost.data import hub, prepare
from lmboost.data.sources import MAX_DOCUMENT_BYTES
from lmboost.errors import UserError, run_flags


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lmboost.prepare",
        description="Tokenises documents into a TFDS data set of token records with a train and a validation split. "
        "Stop it at any moment: the same command continues.",
    )
    add = parser.add_argument
    sources = (
        "a quoted glob ('**' descends), also gs://, of text, code, lines of JSON or Parquet files, also compressed; "
        "tfds:NAME[/config][:version][?data_dir=...&split=train] or tfds:DIRECTORY; of the Hugging Face Hub "
        f"hub:USER/NAME[@revision][?config=...&split=train], or by name {', '.join(map('hub:{}'.format, hub.NAMES))}; "
        "or stdlib, the sources of Python's own library. May be given several times."
    )
    add("--source", action="append", required=True, help=sources)
    tokenizers = "a SentencePiece .model, a tokenizer.json, a directory with one of them, or train:SIZE"
    add("--tokenizer", required=True, help=tokenizers)
    add(
        "--out",
        required=True,
        help="directory to make, for a --runner also gs://...; beside it, OUT.partial holds unfinished work",
    )
    add("--text_field", default="text", help="field with the text in JSONL, Parquet, TFDS (%(default)s)")
    add("--validation_fraction", type=float, default=0.01, help="share of documents in validation (%(default)s)")
    validation = (
        "the documents of validation, where they are not a share of the others; of a single text, without this, it is "
        "the end. May be given several times."
    )
    add("--validation_source", action="append", default=[], help=validation)
    record = "tokens per record; a training sequence length must divide it (%(default)s)"
    add("--record_tokens", type=int, default=8192, help=record)
    add("--seed", type=int, default=0, help="of the order of the documents (%(default)s)")
    add("--shards", type=int, default=0, help="files of the train split; 0 chooses by size (%(default)s)")
    add("--strict", action="store_true", help="invalid UTF-8 is an error instead of U+FFFD")
    add("--max_document_bytes", type=int, default=MAX_DOCUMENT_BYTES, help="a longer one is an error (%(default)s)")
    runner = "who does the work: this machine (%(default)s), or a runner of Apache Beam, which may be a cluster"
    add("--runner", default="local", metavar="{" + ",".join(prepare.RUNNERS) + "}", help=runner)
    add("--beam_options", default="", help="the runner's own flags, in quotes: '--direct_num_workers=2 ...'")
    add("--workers", type=int, help="processes of this machine (one for each of its cores)")
    run_flags(_prepare, parser)


def _prepare(out: str, runner: str, workers: int | None, **flags) -> None:
    """The verb: says what was made, and what was wrong with the input."""
    if workers is not None and runner != "local":
        raise UserError(f"workers={workers} are of this machine: leave it out, and give {runner}'s in --beam_options.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.ExitStack() as held:
        if places.is_remote(out) and runner != "local":
            from lmboost.run.lock import Lock  # which imports jax

            held.callback(Lock(f"{out}.partial", "--out").close)
        manifest = prepare.prepare(out, runner=runner, workers=cores if workers is None else workers, **flags)
    print(f"{out}: vocabulary {manifest['vocab_size']}, records of {manifest['record_tokens']} tokens")
    for split, counts in manifest["splits"].items():
        print(
            f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes "
            f"({counts['bytes'] / counts['tokens']:.2f} per token), {counts['records']:,} records"
        )
    for name, words in (
        ("invalid", "with invalid UTF-8, replaced by U+FFFD"),
        ("empty", "empty, skipped"),
        ("without_tokens", "without tokens, skipped"),
    ):
        problem = manifest["problems"][name]
        if problem["documents"]:
            first = f", first: {', '.join(problem['first'])}" if problem.get("first") else ""
            print(f"  {problem['documents']:,} documents {words}{first}")


if __name__ == "__main__":
    main()
