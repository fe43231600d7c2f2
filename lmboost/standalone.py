"""A model as a directory of its own, which no run of training writes: all of it, or nothing."""

import contextlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from lmboost import checkpoint
from lmboost.data import records
from lmboost.data import tokenizer as tokenizers
from lmboost.errors import UserError
from lmboost.hf import reader, tokenizer_files


def find_target(out: str) -> pathlib.Path:
    """The directory that `--out` names, to be made; it may exist if it is empty."""
    if "://" in out:
        raise UserError(f"--out={out!r}: expected a local directory.")
    target = pathlib.Path(out.removeprefix(reader.PREFIX)).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out={out!r} exists and is not empty: choose another directory, or remove it.")
    return target


@contextlib.contextmanager
def whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """The name of a directory to make and fill, which becomes `target` at the end; after an error nothing is left.

    Raises a UserError where the disk is full or can't be written.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with records.disk_errors(partial):
            yield partial
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(
    directory: pathlib.Path, params: Any, manifest: dict[str, Any], tokenizer: tokenizers.Tokenizer | None
) -> None:
    """Makes `directory` a checkpoint of parameters and a manifest, with the tokenizer in it."""
    checkpoint.save_params(directory, params, manifest | {"versions": checkpoint.versions(), "command": sys.argv})
    if tokenizer:
        tokenizer_files.copy(tokenizer, directory / "tokenizer")
