"""Files that a run appends to, record by record: what is read of them after a kill are whole records."""

import collections
import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from lmboost import places, strict_json
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
      OSError: the file cannot be opened, or is a link.
    """

    def __init__(self, path: str, limit: int = 100_000):
        self._path, self._limit = path, limit
        self._waiting: collections.deque[bytes] = collections.deque()
        self._failing = False
        self._open()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = open(os.open(self._path, flags, 0o666), "a+b", buffering=0)  # noqa: SIM115
        self._whole = self._file.seek(0, os.SEEK_END)  # bytes of whole records

    def append(self, record: bytes) -> None:
        """Writes a record, or keeps it. Raises a UserError if `limit` of them are kept already."""
        if len(self._waiting) >= self._limit:
            raise UserError(
                f"{self._path} could not be written for {self._limit:,} records, and no more are kept in memory. "
                "Make room or mend the disk, and start the same command again."
            )
        self._waiting.append(record)
        self._write()

    def check(self) -> None:
        """Goes on in a new file where the old one was removed, moved or replaced, and says so."""
        try:
            if os.path.samestat(os.stat(self._path, follow_symlinks=False), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            pass
        old = self._file
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._open()
        except OSError as error:
            tell(f"WARNING: {self._path} was removed or replaced, and cannot be made again ({error.strerror}).")
            return
        old.close()
        tell(f"WARNING: {self._path} was removed or replaced; it goes on from here, without what it held before.")

    def close(self) -> None:
        """Tries for a last time, and reports how many records are lost."""
        if self._waiting:
            self._write()
        try:
            self._file.close()
        except OSError as error:  # some file systems tell only now
            tell(f"warning: {self._path}: its last records may be missing ({error.strerror}).")
        if self._waiting:
            tell(f"warning: {len(self._waiting)} records of {self._path} could not be written and are lost.")
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
                tell(
                    f"warning: {self._path} cannot be written ({error.strerror}). The run goes on; what belongs there "
                    "is kept in memory and written when it can be."
                )
            self._failing = True
            return
        if self._failing:
            tell(f"{self._path} can be written again: {kept} records that were kept are in it.")
        self._failing = False

    def _write_whole(self, record: bytes) -> None:
        left = memoryview(record)
        while left:
            written = self._file.write(left)
            if not written:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            left = left[written:]


class Lines(Appender):
    """Appends objects to a file, one a line of strict JSON. A line that a kill left half written is ended first."""

    def __init__(self, path: str):
        super().__init__(path)

    def _open(self) -> None:
        super()._open()
        if self._whole and os.pread(self._file.fileno(), 1, self._whole - 1) != b"\n":
            self.append(b"\n")

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends an object, see `encode`."""
        self.append(encode(values))


def encode(values: Mapping[str, Any]) -> bytes:
    """An object as a line of strict JSON: NaN and infinities become null."""
    return json.dumps(_strict(values), allow_nan=False).encode() + b"\n"


def read(
    path: str | os.PathLike, what: str, expected: Mapping[str, Any], torn: bool = False
) -> Iterator[dict[str, Any]]:
    """The objects of a file in order; a last line that is half written is left out. Reads gs://, too.

    Args:
      what: a line is, for the error.
      expected: the fields of every object, see `strict_json`.
      torn: whether lines that are no JSON are passed over: kills left them, and `Lines` went on after them.

    Raises a UserError naming the line where another one is not such an object.
    """
    with epath.Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # of UTF-8, too
                if torn:
                    continue
                wrong = "it is no JSON"
            else:
                wrong = strict_json.mismatch(values, expected)
            if not wrong:
                yield values
            elif line.endswith(b"\n"):
                raise UserError(
                    f"{path}, line {number}, is not {what} ({wrong}): mend or remove that line, or move the file away."
                )


def rewrite(path: str | os.PathLike, objects: Iterable[Mapping[str, Any]]) -> int:
    """Makes the file anew of these objects, which may be read from it meanwhile: the old one is whole until then.

    Returns how many they are.
    """
    with places.whole_file(path) as partial, partial.open("wb") as file:
        return sum(bool(file.write(encode(each))) for each in objects)


def tell(text: str) -> None:
    """Prints a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def _strict(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {k: _strict(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
