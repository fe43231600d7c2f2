"""What a file holds, by its first bytes: compressed or not, text, lines of JSON, or what is no text at all."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from typing import IO

import pyarrow
import zstandard

from lmboost.data import files
from lmboost.errors import UserError

HEAD = 8192  # bytes by which a file is judged; as many as git takes
_COMPRESSED = {
    "gz": re.compile(rb"\x1f\x8b"), "zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\x00"), "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}  # fmt: skip
_SUFFIXES = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2", ".lz4": "lz4"}
_JSON_NAMES = (".json", ".jsonl", ".jl", ".ndjson", ".jsonlines")
_TABLES = (".csv", ".tsv", ".xlsx", ".xls")
_NO_TEXT = {
    b"PAR1": "a Parquet file (name it .parquet)", b"ARROW1": "an Arrow file", b"FEA1": "a Feather file",
    b"\xff\xff\xff\xff": "an Arrow stream", b"Obj\x01": "an Avro file",
    b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a RAR archive",
    b"!<arch>\n": "an ar archive", b"\x1f\x9d": "compressed by compress", b"%PDF-": "a PDF",
    b"\x89PNG": "an image", b"\xff\xd8\xff": "an image", b"GIF89a": "an image", b"II*\0": "an image",
    b"\x93NUMPY": "a NumPy array", b"\x89HDF": "an HDF5 file", b"SQLite format 3": "a database",
    b"\x7fELF": "a program",
    b"\xff\xfe": "text in UTF-16, not in UTF-8", b"\xfe\xff": "text in UTF-16, not in UTF-8",
}  # fmt: skip
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\ufffd]")


def bare_name(path: str) -> str:
    """The name in lower case without what compression adds to it."""
    name = os.path.basename(path).lower()
    stem, suffix = os.path.splitext(name)
    return stem if suffix in _SUFFIXES else name


def is_compressed(path: str) -> bool:
    """Whether the name says so."""
    return os.path.splitext(path)[1].lower() in _SUFFIXES


def is_json_lines(path: str) -> bool:
    """Whether the name says so."""
    return bare_name(path).endswith(_JSON_NAMES)


def is_parquet(path: str) -> bool:
    """Whether the name says so."""
    return path.lower().endswith((".parquet", ".pq"))


def refuse_tables(path: str) -> None:
    """Raises a UserError for tables whose bytes look like text."""
    if bare_name(path).endswith(_TABLES):
        raise UserError(
            f"{path} is a table, and its rows would be trained on with their commas: convert it to Parquet or lines of "
            "JSON with a text field."
        )


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """A UserError that names the file where it can't be read, or does not fit in memory."""
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"there is not enough memory for {path}: leave it out, divide it, or lower --max_document_bytes to find "
            "what is too long in it."
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pyarrow.ArrowException) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path} can't be read: {reason}. Mend, remove or exclude the file.") from error


def compression(head: bytes) -> str:
    """In what format a file that begins like this is compressed; "" for none."""
    return next((kind for kind, magic in _COMPRESSED.items() if magic.match(head)), "")


@contextlib.contextmanager
def open_text(path: str) -> Iterator[io.BufferedReader]:
    """The bytes of a file of text, decompressed as its first bytes say.

    Raises a UserError, naming the file, where that is no text, or not compressed as its name says.
    """
    with files.opened(path) as file:
        kind, first = compression(file.peek(HEAD)), file.peek(1)
        named = _SUFFIXES.get(os.path.splitext(path)[1].lower(), kind)
        if first and kind != named:
            raise OSError(f"it is not in the format {named} that its name says")
        with _decompressed(file, kind) as opened:
            if what := _no_text(opened.peek(HEAD)[:HEAD]):
                raise UserError(f"{path} is {what}, and only text is trained on. Convert, remove or exclude the file.")
            yield opened


def _decompressed(file: IO[bytes], kind: str) -> io.BufferedReader:
    match kind:
        case "gz":
            raw = gzip.GzipFile(fileobj=file)
        case "bz2":
            raw = bz2.BZ2File(file)
        case "xz":
            raw = lzma.LZMAFile(file)
        case "zst":
            raw = _Zstandard(file)
        case "lz4":
            raw = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "lz4")
        case _:
            raw = file
    return io.BufferedReader(raw, 1 << 18)


class _Zstandard(io.RawIOBase):
    """Frames one after the other, with windows of up to 2 GiB; a file that is cut off is an EOFError."""

    _INPUT = 2048  # bytes taken at once: a frame can grow 30,000 times

    def __init__(self, file: IO[bytes]):
        self._file, self._frame = file, None
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._packed, self._out = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:
        filled = 0
        while filled < len(target) and (self._out or self._more()):
            count = min(len(target) - filled, len(self._out))
            target[filled : filled + count] = self._out[:count]
            filled, self._out = filled + count, self._out[count:]
        return filled

    def _more(self) -> bool:
        """Decompresses until there is something; False at the end."""
        while not self._out:
            self._packed = self._packed or self._file.read(self._INPUT)
            if not self._packed:
                if self._frame:
                    raise EOFError("it ends inside of a frame")
                return False
            self._frame = self._frame or self._context.decompressobj()
            self._out = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        return True


def _no_text(head: bytes) -> str | None:
    """What the first bytes of a file show that is no text; None where it is text, perhaps with some bad bytes."""
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            return what
    if compression(head):
        return "compressed twice"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if b"\0" in head:
        return "binary (it has zero bytes)"
    text = head.decode("utf-8", "replace")
    if len(_CONTROLS.findall(text)) > max(0.3 * len(text), 16):
        return "not UTF-8, or binary"
    return None


def begins_with_json(file: io.BufferedReader, text_field: str) -> bool:
    """Whether a file is lines of JSON, whatever its name: the first with the text field, or two of them."""
    first, *rest = file.peek(HEAD).lstrip(b"\xef\xbb\xbf \t\r\n").split(b"\n")
    if not first.startswith(b"{"):
        return False
    if not rest:  # a line so long that only its beginning is here, or the only one
        return json.dumps(text_field).encode() in first
    second = rest[0] if len(rest) > 1 else b""  # whole, too
    return _is_object(first) and (text_field in json.loads(first) or _is_object(second))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
