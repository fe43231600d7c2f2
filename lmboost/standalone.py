"""A model as a directory of its own, which no run of training writes: all of it, or nothing."""

import contextlib
import os
import pathlib
import secrets
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from lmboost import checkpoint, places
from lmboost.data import records
from lmboost.data import tokenizer as tokenizers
from lmboost.errors import UserError
from lmboost.hf import reader, tokenizer_files


def find_target(out: str) -> pathlib.Path:
    """The directory that `--out` names, to be made; it may exist if it is empty. Of a link it is where that leads."""
    if "://" in out:
        raise UserError(f"--out={out!r}: expected a local directory.")
    if out.startswith(reader.PREFIX):
        target = pathlib.Path(os.path.expanduser(out.removeprefix(reader.PREFIX))).resolve()
    else:
        target = pathlib.Path(places.find(out, "--out")).resolve()
    places.check_target(target, f"--out={out!r}")
    return target


def find_file(out: str) -> pathlib.Path:
    """The file that `--out=KIND:FILE` names, to be made, in a directory that is there."""
    path = out.partition(":")[2]
    target = pathlib.Path(os.path.expanduser(path)).resolve()
    if not path or "://" in path or target.is_dir():
        raise UserError(f"--out={out!r}: expected the name of a local file after {out.partition(':')[0]}:")
    if os.path.lexists(target):
        raise UserError(f"--out={out!r} exists: choose another name, or remove it.")
    if not target.parent.is_dir():
        raise UserError(f"--out={out!r}: there is no directory {target.parent}: make it first.")
    return target


@contextlib.contextmanager
def whole(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """The name of a directory to make and fill, which becomes `target` at the end; after an error nothing is left.

    Raises a UserError where the disk is full or can't be written.
    """
    partial = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with records.disk_errors(partial):
            yield partial
            places.sync_tree(partial)
            places.check_target(target, str(target))  # it was free before; another may have been faster
            os.replace(partial, target)
            places.sync_directory(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_checkpoint(
    directory: pathlib.Path, params: Any, manifest: dict[str, Any], tokenizer: tokenizers.Tokenizer | None
) -> None:
    """Makes `directory` a checkpoint of parameters and a manifest, with the tokenizer in it."""
    checkpoint.save_params(directory, params, manifest | {"versions": checkpoint.versions(), "command": sys.argv})
    if tokenizer:
        tokenizer_files.copy(tokenizer, directory / "tokenizer")
