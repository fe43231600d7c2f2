"""Text to token records: `python -m lmboost.prepare --source='corpus/**/*.txt' --tokenizer=train:8192 --out=DIR`."""

import argparse
import os
from collections.abc import Iterator

from lmboost.data import prepare
from lmboost.errors import exit_on_user_error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lmboost.prepare",
        description="Tokenises documents into a TFDS data set of token records with a train and a validation split. "
        "Stop it at any moment: the same command continues.",
    )
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        help="a quoted glob ('**' descends) of text, code, .jsonl or .parquet files, also .gz and .zst; "
        "tfds:NAME[/config][:version][?data_dir=...&split=train]; a TFDS directory; or stdlib, the sources of "
        "Python's own library. May be given several times.",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="a SentencePiece .model, a tokenizer.json, a directory with one of them, or train:SIZE",
    )
    parser.add_argument("--out", required=True, help="directory to make; DIR.partial holds unfinished work")
    parser.add_argument(
        "--text_field", default="text", help="field with the text in JSONL, Parquet, TFDS (%(default)s)"
    )
    parser.add_argument(
        "--validation_fraction", type=float, default=0.01, help="share of documents in validation (%(default)s)"
    )
    parser.add_argument(
        "--record_tokens",
        type=int,
        default=8192,
        help="tokens per record; a training sequence length must divide it (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the documents (%(default)s)")
    parser.add_argument(
        "--shards", type=int, default=0, help="files of the train split; 0 chooses by size (%(default)s)"
    )
    parser.add_argument("--strict", action="store_true", help="invalid UTF-8 is an error instead of U+FFFD")
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (%(default)s)")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _summary(out: str, manifest: dict) -> Iterator[str]:
    """What was made, and what was wrong with the input."""
    yield f"{out}: vocabulary {manifest['vocab_size']}, records of {manifest['record_tokens']} tokens"
    for split, counts in manifest["splits"].items():
        yield (
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
            yield f"  {problem['documents']:,} documents {words}{first}"


def _prepare(out: str, flags: dict) -> None:
    for line in _summary(out, prepare.prepare(out, **flags)):
        print(line)


def main() -> None:
    flags = vars(_parser().parse_args())
    show_traceback = flags.pop("traceback")
    out = flags.pop("out")
    exit_on_user_error(lambda: _prepare(out, flags), show_traceback)


if __name__ == "__main__":
    main()
