"""The files that a source names, here, in a bucket or on the Hub, and how they are opened."""

import contextlib
import fnmatch
import glob
import hashlib
import io
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator
from typing import IO

import fsspec

from lmboost import places
from lmboost.errors import UserError

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"})

_LISTED: dict[str, dict] = {}  # what the last listing said of objects: to ask for each again would take its time


def matches(pattern: str) -> list[str]:
    """The files that a glob matches, in order; a UserError where there are none, or a link leads nowhere."""
    if places.is_remote(pattern):
        return _in_bucket(pattern)
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        tfds = os.path.isfile(os.path.join(expanded, "features.json"))
        advice = f"tfds:{pattern}" if tfds else f"a glob of its files, such as '{pattern}/**/*.txt'"
        raise UserError(f"source={pattern!r} is a directory: give {advice}.")
    # A name with brackets in it is no glob where there is such a file.
    found = [expanded] if os.path.isfile(expanded) else sorted(_expand(expanded))
    if dangling := [path for path in found if not os.path.exists(path)]:
        raise UserError(f"source={pattern!r}: {dangling[0]} is a link to what is not there. Remove or exclude it.")
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        raise UserError(
            f"source={pattern!r} matches no file. Give a glob (quote it, '**' descends), hub:NAME, tfds:NAME or stdlib."
        )
    return found


def _in_bucket(pattern: str) -> list[str]:
    places.find(pattern.partition("*")[0], "--source")  # the bucket is there, and what reads it
    with places.refusing("--source", pattern):
        store, name = fsspec.core.url_to_fs(pattern)
        listed = {path: about for path, about in store.glob(name, detail=True).items() if about["type"] == "file"}
    found = sorted(listed)
    if not found:
        raise UserError(f"source={pattern!r} matches no object. Give a glob in quotes; '**' descends.")
    _LISTED.update({places.SCHEME + path: listed[path] for path in found})
    return [places.SCHEME + path for path in found]


def opened(path: str) -> io.BufferedReader:
    """The bytes of a file, wherever it is; what goes wrong is an OSError."""
    if not places.is_remote(path):
        return open(path, "rb")
    with _os_errors():
        store, name = fsspec.core.url_to_fs(path)
        return io.BufferedReader(_Remote(store.open(name, "rb")), 1 << 20)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # each store has its own
        raise OSError(places.brief(error)) from error


class _Remote(io.RawIOBase):
    """A file of a store."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        with _os_errors():
            raw = self._file.read(len(target))
        target[: len(raw)] = raw
        return len(raw)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def size(path: str) -> int:
    """Bytes of a file, wherever it is."""
    return _about(path)["size"] if places.is_remote(path) else os.path.getsize(path)


def stamp(path: str) -> tuple[int, int]:
    """The size of a file and a number that another content has not: the time of its change, here."""
    if not places.is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    about = _about(path)
    mark = next((str(about[name]) for name in ("etag", "ETag", "generation", "md5Hash") if about.get(name)), "")
    return about["size"], int.from_bytes(hashlib.sha256(mark.encode()).digest()[:7])


def _about(path: str) -> dict:
    if path in _LISTED:
        return _LISTED[path]
    store, name = fsspec.core.url_to_fs(path)
    return store.info(name)


def _expand(pattern: str) -> Iterator[str]:
    """As glob.glob, but that `**` goes into each directory once, however many links lead there."""
    found = re.fullmatch(r"(|.*?/)\*\*/(.+)", pattern + "/*" * (pattern.split("/")[-1] == "**"), re.DOTALL)
    if not found:
        yield from glob.glob(pattern)
        return
    top, wanted = found[1], found[2].split("/")
    for base in glob.glob(top) if top else [""]:
        been = set()
        for directory, below, names in os.walk(base or ".", followlinks=True):
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in been:
                below.clear()
                continue
            been.add((status.st_dev, status.st_ino))
            below[:] = sorted(name for name in below if not name.startswith("."))
            inside = os.path.relpath(directory, base or ".").split("/")
            inside = [] if inside == ["."] else inside
            for name in (*names, *below):
                if _fits([*inside, name], wanted):
                    yield os.path.join(base, *inside, name)


def _fits(parts: list[str], wanted: list[str]) -> bool:
    """Whether the last parts of a path are as a pattern wants them; "**" in it are any number of parts."""
    if "**" in wanted:
        at = wanted.index("**")
        return any(_fits(parts[:n], wanted[:at]) and _fits(parts[n:], wanted[at + 1 :]) for n in range(len(parts)))
    ends = parts[len(parts) - len(wanted) :] if len(wanted) <= len(parts) else []
    return len(ends) == len(wanted) and all(
        fnmatch.fnmatchcase(part, want) and (want.startswith(".") or not part.startswith("."))
        for part, want in zip(ends, wanted, strict=True)
    )


def standard_library() -> list[str]:
    """The sources of Python's own library, in order, without its tests."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_LIBRARY]
        found += [pathlib.Path(directory, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(f"source='stdlib': {root} holds no .py files; this interpreter ships without its sources.")
    return [str(path) for path in sorted(found)]
