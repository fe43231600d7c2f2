"""Places that the user names: local directories and gs:// buckets, checked; files that are whole or not there."""

import contextlib
import errno
import functools
import importlib.util
import os
import pathlib
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from concurrent import futures

import fsspec
from etils import epath

from lmboost.errors import UserError

SCHEME = "gs://"
# What TensorStore reads as a pattern or as another store, so that a checkpoint is written and not found again.
_UNREADABLE = re.compile(r"\[.*\]|\\|[a-z][a-z0-9+.-]*:(?:/|$)", re.IGNORECASE | re.DOTALL)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether it is a place in a bucket."""
    return "://" in os.fspath(path)


def find(path: str, field: str = "--workdir") -> epath.Path:
    """A directory that the user names, absolute, with `~` for the home directory; gs:// names stay as they are.

    Raises a UserError for names under which checkpoints cannot be read again, for other stores, where the package that
    reads gs:// is missing, and for a bucket that is not there or cannot be reached.
    """
    if "://" not in path:
        path = os.path.abspath(os.path.expanduser(path))
        _check_readable(path, path, field)
        return epath.Path(path)
    if not path.startswith(SCHEME) or not path.removeprefix(SCHEME).strip("/"):
        raise UserError(f"{field}={path!r}: expected a local directory or {SCHEME}bucket/path.")
    if not importlib.util.find_spec("gcsfs"):
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
    _check_readable(path.removeprefix(SCHEME), path, field)
    return epath.Path(path)


def name_of(path: str) -> str:
    """The last part of a path, local or remote, also of "." and ".."."""
    return epath.Path(path if is_remote(path) else os.path.abspath(os.path.expanduser(path))).name


def _check_readable(name: str, path: str, field: str) -> None:
    try:
        name.encode("utf-8")
        wrong = _UNREADABLE.search(name)
    except UnicodeEncodeError:
        wrong = True
    if wrong or "\0" in name:
        what = repr(wrong[0]) if isinstance(wrong, re.Match) else "bytes that are not UTF-8"
        raise UserError(
            f"{field}={path!r} holds {what}: checkpoints with that in their path cannot be read again. Give a path "
            "without brackets, backslashes, colons before a slash, and bytes that are not UTF-8."
        )


def refuse_links(directory: epath.Path, field: str) -> None:
    """Raises a UserError where an entry of a directory that is written to is a link: it may lead anywhere.

    The directory itself may be one. A link that a user has made on purpose can be a mount, or the whole directory.
    """
    if is_remote(directory) or not os.path.isdir(directory):
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise UserError(
                    f"{field}={directory}: {entry.path} is a link to {os.readlink(entry.path)!r}, and what is written "
                    "to a directory must not land elsewhere. Remove the link, or make the whole directory one."
                )


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


def check_target(target: pathlib.Path, given: str) -> None:
    """Raises a UserError where a directory cannot be put in the place of `target`, which is no link."""
    if not os.path.lexists(target):
        return
    if not target.is_dir() or any(target.iterdir()):
        raise UserError(f"{given} exists and is not empty: choose another directory, or remove it.")
    aside = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:  # what will be done at the end
        os.rename(target, aside)
        os.rename(aside, target)
    except OSError as error:
        why = "is a mount point" if error.errno in (errno.EBUSY, errno.EXDEV) else f"cannot be replaced ({error})"
        raise UserError(f"{given} {why}: name a directory inside it, such as {target / 'made'}.") from error


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[epath.Path]:
    """The name of a file to write, which becomes `path` at the end; after an error nothing is left of it.

    Readers, a kill and a power cut find the old file or the new one. Several processes may write the same path: each
    writes a file of its own beside it, whose name ends in .tmp. In a bucket an object is whole or not there by itself.
    """
    path = epath.Path(path)
    if is_remote(path):
        yield path
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    create(partial, b"")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def local_file(path: str | os.PathLike) -> Iterator[os.PathLike]:
    """As `whole_file`, for libraries that write local files only: an object of a bucket is sent when it is whole."""
    if not is_remote(path):
        with whole_file(path) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory() as directory:
        local = pathlib.Path(directory, epath.Path(path).name)
        yield local
        _send(local, epath.Path(path))


@contextlib.contextmanager
def staged(directory: os.PathLike) -> Iterator[pathlib.Path]:
    """A local directory whose files come to be in `directory`: itself, or one that is sent to a bucket at the end."""
    if not is_remote(directory):
        yield pathlib.Path(directory)
        return
    with tempfile.TemporaryDirectory() as local:
        yield pathlib.Path(local)
        for path in sorted(path for path in pathlib.Path(local).rglob("*") if path.is_file()):
            _send(path, epath.Path(directory) / path.relative_to(local).as_posix())


@contextlib.contextmanager
def local_copy(directory: os.PathLike) -> Iterator[pathlib.Path]:
    """A local directory with the files of `directory`, which has no others in it: itself, or what a bucket has."""
    if not is_remote(directory):
        yield pathlib.Path(directory)
        return
    with tempfile.TemporaryDirectory() as local:
        for path in epath.Path(directory).iterdir():
            pathlib.Path(local, path.name).write_bytes(path.read_bytes())
        yield pathlib.Path(local)


def _send(local: pathlib.Path, path: epath.Path) -> None:
    store, name = fsspec.core.url_to_fs(os.fspath(path))
    store.put_file(os.fspath(local), name)


def move(pairs: Iterable[tuple[pathlib.Path, pathlib.Path]]) -> None:
    """Gives files other names in the same file system or bucket; those that are gone by now have theirs already."""

    def one(pair: tuple[pathlib.Path, pathlib.Path]) -> None:
        source, target = pair
        if not source.is_file():
            return
        if is_remote(source):
            (store, old), (_, new) = (fsspec.core.url_to_fs(os.fspath(path)) for path in pair)
            store.mv(old, new)
        else:
            os.replace(source, target)

    pairs = list(pairs)
    if pairs and is_remote(pairs[0][0]):  # each is a request, or several
        with futures.ThreadPoolExecutor(32) as pool:
            list(pool.map(one, pairs))
    else:
        for pair in pairs:
            one(pair)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file whole; where a link is in its place it is replaced, not followed."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def create(path: epath.Path, content: bytes) -> None:
    """Makes a file that is not there yet, not even as a link; a FileExistsError where it is. In a bucket, too."""
    if not is_remote(path):
        with open(path, "xb") as file:
            file.write(content)
        return
    store, name = fsspec.core.url_to_fs(os.fspath(path))
    store.pipe_file(name, content, mode="create")  # a precondition of the request: of several askers one succeeds


def sync_tree(directory: str | os.PathLike) -> None:
    """Has all that is in a local directory outlive a power cut; before it is renamed to what others look for."""
    for here, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(here, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(here)


def sync_directory(directory: str | os.PathLike) -> None:
    """Has the names in a local directory outlive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
