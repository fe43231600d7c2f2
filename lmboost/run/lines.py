"""Files that a run appends to, record by record."""

import collections
import errno
import os
import sys

from lmboost.errors import UserError


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


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
