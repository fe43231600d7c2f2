"""Places that the user names: local directories and gs:// buckets, checked."""

import contextlib
import functools
import importlib.util
import os
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
    with _refusing(field, path):
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
def _refusing(field: str, path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each store has its own
        raise UserError(
            f"{field}={path!r} cannot be read ({_brief(error)}). Check the network and your credentials "
            "(gcloud auth application-default login)."
        ) from error


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
