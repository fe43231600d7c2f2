"""Standard output and error that end no program: words are never worth a run.

A disk that is full (`> log`) and a reader that has gone (`| head`) make every print raise, and the interpreter's last
flush, too, with an exit status of its own.
"""

import errno
import io
import os
import sys


class _Unfailing(io.FileIO):
    """A file descriptor; what cannot be written is lost."""

    failed: OSError | None = None  # the first time

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            return memoryview(data).nbytes


def protect() -> None:
    """Has whatever is printed never fail. What a test or a notebook has put in the place of a stream stays."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            raw = _Unfailing(stream.fileno(), "w", closefd=False)
            lines = stream.line_buffering or name == "stderr"
            text = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=lines)
            setattr(sys, name, text)


def lost_output() -> str | None:
    """Why something of standard output is lost; None where nothing is, and where nobody reads on, which is no error."""
    sys.stdout.flush()
    failed = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failed", None)
    return failed.strerror if failed and failed.errno != errno.EPIPE else None
