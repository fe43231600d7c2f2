"""A run's small files: appended to on a local disk, full or not, and copied from there to a bucket.

An object store has no appending. So with `--workdir=gs://bucket/run` metrics.jsonl, goodput.jsonl and TensorBoard's
files are written to a temporary directory, and those that have changed are uploaded whole, in a thread: a `sync` takes
the loop microseconds, a few milliseconds where a thread begins. It costs one request to the store for each file that
has changed, and as much traffic as these files are large; a run of a million logged steps has some 400 MB of them.
"""

import collections
import contextlib
import errno
import functools
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import fsspec
import jax
from etils import epath

from lmboost.errors import UserError

KEPT = ("metrics.jsonl", "goodput.jsonl")  # go on from what earlier starts have written
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


class Appender:
    """Appends to a file, whole records only; a full disk does not end the run.

    What cannot be written is kept in memory and written in order, as soon as there is room again. That is tried at
    every further record; what a failed attempt has left of a record is cut off first. Only the first failure of a row
    is reported, on stderr. For use from one thread.

    Args:
      path: the file; made if it is missing.
      limit: of records in memory.

    Raises:
      OSError: the file cannot be opened.
    """

    def __init__(self, path: str, limit: int = 100_000):
        self._path, self._limit = path, limit
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._whole = self._file.seek(0, os.SEEK_END)  # bytes of whole records
        self._waiting: collections.deque[bytes] = collections.deque()
        self._failing = False

    def append(self, record: bytes) -> None:
        """Writes a record, or keeps it. Raises a UserError if `limit` of them are kept already."""
        if len(self._waiting) >= self._limit:
            raise UserError(
                f"{self._path} could not be written for {self._limit:,} records, and no more are kept in memory. "
                "Make room or mend the disk, and start the same command again."
            )
        self._waiting.append(record)
        self._write()

    def close(self) -> None:
        """Tries for a last time, and reports how many records are lost."""
        if self._waiting:
            self._write()
        try:
            self._file.close()
        except OSError as error:  # some file systems tell only now
            _tell(f"warning: {self._path}: its last records may be missing ({error.strerror}).")
        if self._waiting:
            _tell(f"warning: {len(self._waiting)} records of {self._path} could not be written and are lost.")
        self._waiting.clear()

    def _write(self) -> None:
        try:
            if self._failing:
                self._file.truncate(self._whole)
            kept = len(self._waiting)
            while self._waiting:
                self._write_whole(self._waiting[0])
                self._whole += len(self._waiting.popleft())
        except OSError as error:
            if not self._failing:
                _tell(
                    f"warning: {self._path} cannot be written ({error.strerror}). The run goes on; what belongs there "
                    "is kept in memory and written when it can be."
                )
            self._failing = True
            return
        if self._failing:
            _tell(f"{self._path} can be written again: {kept} records that were kept are in it.")
        self._failing = False

    def _write_whole(self, record: bytes) -> None:
        left = memoryview(record)
        while left:
            written = self._file.write(left)
            if not written:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            left = left[written:]


class LogDir:
    """The local directory to which a run's small files are written, and its way to a remote workdir.

    A local workdir is that directory itself, and `sync` and `close` do nothing. For a remote one it is a temporary
    directory, into which the files named in `KEPT` have been copied. Of several processes only the first one uploads,
    the others' temporary directories are thrown away.

    Attributes:
      path: the local directory.

    Raises:
      UserError: the remote workdir cannot be read.
    """

    def __init__(self, workdir: str):
        root = find(workdir)
        self._remote = root if "://" in workdir else None
        self._first = jax.process_index() == 0
        self._uploaded: dict[str, tuple[int, int]] = {}  # name -> size and time of change
        self._lock, self._wanted = threading.Lock(), False
        self._thread: threading.Thread | None = None  # that uploads as long as it is wanted
        self._started = time.monotonic()
        self._failing = self._closed = False
        self.path = os.fspath(root)
        if self._remote:
            kept = self._read_kept() if self._first else {}
            self.path = tempfile.mkdtemp(prefix="lmboost-")
            for name, content in kept.items():
                pathlib.Path(self.path, name).write_bytes(content)
            self._uploaded = self._changed()

    def sync(self, at_least: float = 0.0) -> None:
        """Has what has changed uploaded, and returns at once; the first of several failures is reported on stderr.

        What fails is tried again by the next call. Nothing is done if the last call that did something is less than
        `at_least` seconds ago. What was written before a call is uploaded after it, even if an upload was running.
        """
        now = time.monotonic()
        if self._closed or not (self._remote and self._first) or now - self._started < at_least:
            return
        self._started = now
        with self._lock:
            self._wanted = True
            if not self._thread:
                self._thread = threading.Thread(target=self._work, name="logdir", daemon=True)
                self._thread.start()

    def close(self, timeout: float = 60.0) -> None:
        """Uploads what is left and removes the temporary directory.

        If that fails or is not done within `timeout` seconds, the directory stays, and stderr says so.
        """
        if self._closed or not self._remote:
            return
        self.sync()
        self._closed = True
        if thread := self._thread:
            thread.join(timeout)
        left = self._changed() if self._first else ()
        if left:
            _tell(
                f"warning: {', '.join(sorted(left))} could not be uploaded to {self._remote}: the newest version stays "
                f"in {self.path}."
            )
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read_kept(self) -> dict[str, bytes]:
        kept = {}
        with _refusing("--workdir", os.fspath(self._remote)):
            for name in KEPT:
                with contextlib.suppress(FileNotFoundError):
                    kept[name] = (self._remote / name).read_bytes()
        return kept

    def _changed(self) -> dict[str, tuple[int, int]]:
        """Files, as paths below the directory, that are not as they were uploaded, with their size and time."""
        found = {}
        for directory, _, names in os.walk(self.path):
            for name in names:
                path = os.path.join(directory, name)
                try:
                    status = os.stat(path)
                except FileNotFoundError:  # renamed meanwhile
                    continue
                found[os.path.relpath(path, self.path)] = (status.st_size, status.st_mtime_ns)
        return {k: v for k, v in found.items() if not k.endswith(".tmp") and self._uploaded.get(k) != v}

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                self._wanted = False
            self._upload()

    def _upload(self) -> None:
        name = "what has changed"
        try:
            for name, mark in self._changed().items():
                content = pathlib.Path(self.path, name).read_bytes()
                (self._remote / name).write_bytes(content)  # the object is new in one moment, or stays as it was
                self._uploaded[name] = mark
        except Exception as error:  # each store has its own
            if not self._failing:
                _tell(
                    f"warning: {name} could not be uploaded to {self._remote} ({_brief(error)}). The run goes on; "
                    "this is tried again."
                )
            self._failing = True
            return
        if self._failing:
            _tell(f"{self._remote} can be written again.")
        self._failing = False


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
