"""Places that the user names: local directories and gs:// buckets, checked; files that are whole or not there."""

import contextlib
import functools
import importlib.util
import os
import secrets
from collections.abc import Iterator

import fsspec
from etils import epath

from lmboost.errors import UserError

SCHEME = "gs://"


def find(path: str, field: str = "--workdir") -> epath.Path:
    """A directory that the user names, absolute; gs:// names stay as they are.

    Raises a UserError for other stores, where the package that reads gs:// is missing, and for a bucket that is not
    there or cannot be reached.
    """
    if "://" not in path:
        return epath.Path(os.path.abspath(path))
    if not path.startswith(SCHEME) or not path.removeprefix(SCHEME).strip("/"):
        raise UserError(f"{field}={path!r}: expected a local directory or {SCHEME}bucket/path.")
    if not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
        raise UserError(f'{field}={path!r}: {SCHEME} needs the package gcsfs: pip install "lmboost[gcs]".')
    # gcsfs remembers what a directory holds, but what tensorstore or another host writes there is seen, too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    bucket = SCHEME + path.removeprefix(SCHEME).partition("/")[0]
    with refusing(field, path):
        exists = _bucket_exists(bucket)
    if not exists:
        raise UserError(
            f"{field}={path!r}: there is no {bucket}, or it is empty and your credentials do not let you ask for it "
            "(storage.buckets.get). Mend its name, or make it first."
        )
    return epath.Path(path)


@functools.cache
def _bucket_exists(bucket: str) -> bool:
    """Asked once. Directories need no making in a bucket, but gcsfs would make one whose name is misspelt."""
    return epath.Path(bucket).exists()


@contextlib.contextmanager
def refusing(field: str, path: str) -> Iterator[None]:
    """A UserError, naming the field, where a store can't be read."""
    try:
        yield
    except Exception as error:  # each store has its own
        raise UserError(
            f"{field}={path!r} cannot be read ({brief(error)}). Check the network and your credentials "
            "(gcloud auth application-default login)."
        ) from error


def brief(error: Exception) -> str:
    """An error in a line: its kind, and how its message begins."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[epath.Path]:
    """The name of a file to write, which becomes `path` at the end; after an error nothing is left of it.

    Readers, a kill and a power cut find the old file or the new one. Several processes may write the same path: each
    writes a file of its own beside it, whose name ends in .tmp. In a bucket an object is whole or not there by itself.
    """
    path = epath.Path(path)
    if "://" in os.fspath(path):
        yield path
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
