"""A run's small files: appended to on a local disk, full or not, and copied from there to a bucket.

An object store has no appending. So with `--workdir=gs://bucket/run` metrics.jsonl, goodput.jsonl and the trackers'
files are written to a temporary directory, and those that have changed are uploaded whole, in a thread: a `sync` takes
the loop microseconds, a few milliseconds where a thread begins. It costs one request to the store for each file that
has changed, and as much traffic as these files are large; a run of a million logged steps has some 400 MB of them.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import threading
import time

import jax

from lmboost import places
from lmboost.run.lines import tell

KEPT = ("metrics.jsonl", "goodput.jsonl", "trackers.json")  # go on from what earlier starts have written


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
        root = places.find(workdir)
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
            tell(
                f"warning: {', '.join(sorted(left))} could not be uploaded to {self._remote}: the newest version stays "
                f"in {self.path}."
            )
        else:
            shutil.rmtree(self.path, ignore_errors=True)

    def _read_kept(self) -> dict[str, bytes]:
        kept = {}
        with places.refusing("--workdir", os.fspath(self._remote)):
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
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    status = os.stat(path)
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
                tell(
                    f"warning: {name} could not be uploaded to {self._remote} ({places.brief(error)}). The run goes "
                    "on; this is tried again."
                )
            self._failing = True
            return
        if self._failing:
            tell(f"{self._remote} can be written again.")
        self._failing = False
