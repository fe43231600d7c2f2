"""TensorBoard: files in WORKDIR/tensorboard."""

import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping

from lmboost.run import lines
from lmboost.run.trackers.tracker import About, Tracker


@contextlib.contextmanager
def _absent(package: str) -> Iterator[None]:
    """Within, the package is as if it were not installed, unless it has been imported before."""
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]


with _absent("torch"):  # which tensorboardX would import to know tensors of it: seconds of every start, and none comes
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c


class TensorBoard(Tracker):
    """A file of TensorBoard's, with the numbers of a step in one record. A full disk does as to `lines.Appender`.

    tensorboardX's own writer is left out: its thread dies on a full disk, and its callers then wait for ever.

    Raises an OSError where the file cannot be made.
    """

    def __init__(self, about: About, directory: str, start: int, id: str = ""):
        self.where = os.path.join(directory, "tensorboard")
        os.makedirs(self.where, exist_ok=True)
        now = time.time_ns()  # named by the second alone, a quick restart would go on in the same file
        self.id = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
        self._file = lines.Appender(os.path.join(self.where, self.id))
        self._append(Event(file_version="brain.Event:2"))
        purge = start + 1 if start else 0  # from this step on, TensorBoard hides what earlier files hold
        self._append(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = [number for k, v in values.items() for number in summary.scalar(k, v).value]
        self._append(Event(step=step, summary=Summary(value=numbers)))

    def check(self) -> None:
        """See `lines.Appender.check`."""
        self._file.check()

    def close(self, whole: bool = False) -> None:
        self._file.close()

    def _append(self, event: Event) -> None:
        """A record is length, checksum, bytes, checksum."""
        event.wall_time = time.time()
        data = event.SerializeToString()
        head = struct.pack("<Q", len(data))
        check = lambda part: struct.pack("<I", masked_crc32c(part))  # noqa: E731
        self._file.append(head + check(head) + data + check(data))
