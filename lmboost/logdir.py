"""A run's small files: appended to on a local disk, full or not, and copied from there to a bucket.

An object store has no appending. So with `--workdir=gs://bucket/run` metrics.jsonl, goodput.jsonl and TensorBoard's
files are written to a temporary directory, and those that have changed are uploaded whole. That happens in a thread:
the loop pays for listing the directory, well under a millisecond, and the bucket gets an object or two at each `sync`.
"""

import collections
import errno
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
import time

import jax
from etils import epath

from lmboost.errors import UserError

KEPT = ("metrics.jsonl", "goodput.jsonl")  # go on from what earlier starts have written
SCHEME = "gs://"


def find(path: str, field: str = "--workdir") -> epath.Path:
    """A directory that the user names, absolute; gs:// names stay as they are.

    Raises a UserError for other stores, and where the package that reads gs:// is missing.
    """
    if "://" not in path:
        return epath.Path(os.path.abspath(path))
    if not path.startswith(SCHEME) or not path.removeprefix(SCHEME).strip("/"):
        raise UserError(f"{field}={path!r}: expected a local directory or {SCHEME}bucket/path.")
    if not any(map(importlib.util.find_spec, ("gcsfs", "tensorflow"))):
        raise UserError(f'{field}={path!r}: {SCHEME} needs the package gcsfs: pip install "lmboost[gcs]".')
    return epath.Path(path)


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
        self.path = tempfile.mkdtemp(prefix="lmboost-") if self._remote else os.fspath(root)
        self._first = jax.process_index() == 0
        self._uploaded: dict[str, tuple[int, int]] = {}  # name -> size and time of change
        self._thread: threading.Thread | None = None
        self._started = time.monotonic()
        self._failing = False
        if self._remote and self._first:
            self._download()

    def sync(self, at_least: float = 0.0) -> None:
        """Begins to upload what has changed, and returns; the first of several failures is reported on stderr.

        What fails is tried again by the next call. Nothing is done while an upload is still running, or if the last
        one began less than `at_least` seconds ago.
        """
        now = time.monotonic()
        busy = self._thread is not None and self._thread.is_alive()
        if not (self._remote and self._first) or busy or now - self._started < at_least:
            return
        self._started = now
        self._thread = threading.Thread(target=self._upload, name="logdir", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 60.0) -> None:
        """Uploads what is left and removes the temporary directory.

        If that fails or is not done within `timeout` seconds, the directory stays, and stderr says so.
        """
        if not self._remote:
            return
        until = time.monotonic() + timeout
        for begin in (lambda: None, self.sync):  # the running one was begun before the last changes
            begin()
            if self._thread:
                self._thread.join(max(until - time.monotonic(), 0.0))
        left = self._changed() if self._first else ()
        if left:
            _tell(
                f"warning: {', '.join(sorted(left))} could not be uploaded to {self._remote}: the newest version stays "
                f"in {self.path}."
            )
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        self._remote = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _download(self) -> None:
        try:
            for name in KEPT:
                if (self._remote / name).exists():
                    (self._remote / name).copy(os.path.join(self.path, name))
        except Exception as error:  # each store has its own
            shutil.rmtree(self.path, ignore_errors=True)
            raise UserError(f"--workdir={self._remote} cannot be read ({_brief(error)}).") from error
        self._uploaded = self._changed()

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

    def _upload(self) -> None:
        name = "what has changed"
        try:
            for name, mark in self._changed().items():
                target = self._remote / name
                target.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(self.path, name).copy(target, overwrite=True)  # an object is there whole, or as it was
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
