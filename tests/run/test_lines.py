"""Files that are appended to: whole records in order, whatever the disk does and wherever a kill cuts them off."""

import errno
import json
import math
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost.errors import UserError
from lmboost.run import lines
from lmboost.run.lines import Appender

NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.none() | NUMBERS | st.text(max_size=8)
MORE = st.dictionaries(
    st.text(max_size=3), VALUES | st.dictionaries(st.text(max_size=3), VALUES, max_size=2), max_size=2
)
RECORDS = st.lists(st.builds(lambda step, more: more | {"step": step}, st.integers(0, 1 << 60), MORE), max_size=5)


def append(path, records):
    file = lines.Lines(str(path))
    for record in records:
        file.write(record)
    file.close()


def read(path, **kwargs):
    return list(lines.read(path, "a JSON object with a step", {"step": int}, **kwargs))


@settings(max_examples=200, deadline=None)
@given(before=RECORDS, after=RECORDS, cut=st.integers(0, 10_000))
def test_cut_at_any_byte_and_appended_to_whole_records_come_back_in_order(tmp_path_factory, before, after, cut):
    """And never a mix: of what was cut, what had been whole; nothing of a record that had not; then the new ones."""
    path = tmp_path_factory.mktemp("lines") / "file"
    append(path, before)
    content = path.read_bytes()
    cut = min(cut, len(content))
    path.write_bytes(content[:cut])
    ends = [end for end, byte in enumerate(content) if byte == ord("\n")]  # without it an object is whole, too
    kept = before[: sum(end <= cut for end in ends)]
    assert read(path) == kept
    append(path, after)
    assert read(path, torn=True) == kept + after
    if cut and cut not in ends and content[cut - 1] != ord("\n"):
        with pytest.raises(UserError, match=rf"file, line {len(kept) + 1}, is not a JSON object with a step .*: mend"):
            read(path)

    path.write_bytes(content[:cut])
    lines.rewrite(path, lines.read(path, "a record", {}))  # while it is read
    append(path, after)
    assert read(path) == kept + after
    lines.rewrite(path, read(path)[:3])
    assert read(path) == (kept + after)[:3] and os.listdir(path.parent) == ["file"]


def test_lines_are_strict_json():
    line = lines.encode({"loss": math.nan, "nested": {"x": -math.inf}, "text": "\n\u2028", "step": 1})
    assert line.count(b"\n") == 1 and b"NaN" not in line
    assert json.loads(line) == {"loss": None, "nested": {"x": None}, "text": "\n\u2028", "step": 1}


class Disk:
    """A file of an Appender in which only so many bytes have room."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        written = self.file.write(data[: min(len(data), max(self.room, 0), 7)])  # in small pieces, as it may
        self.room -= written
        if not written:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return written

    def truncate(self, size):
        self.room += os.fstat(self.file.fileno()).st_size - size
        self.file.truncate(size)

    def close(self):
        self.file.close()


def full(appender, room=0):
    appender._file = Disk(appender._file, room)
    return appender._file


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=30), st.integers(0, 40)), min_size=1, max_size=20))
def test_every_record_is_written_whole_and_in_order_when_room_comes_bit_by_bit(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("disk") / "file"
    appender = Appender(str(path))
    disk, whole = full(appender), b"".join(record for record, _ in records)
    for record, room in records:
        disk.room += room
        appender.append(record)
        assert whole.startswith(path.read_bytes())
    disk.room += len(whole)
    appender.close()
    assert path.read_bytes() == whole


def test_what_a_failed_write_left_of_a_line_is_cut_off_before_the_next(tmp_path, capsys):
    appender = Appender(str(tmp_path / "file"))
    appender.append(b"first\n")
    disk = full(appender, room=3)
    appender.append(b"second\n")
    assert (tmp_path / "file").read_bytes() == b"first\nsec"
    disk.room = 5
    appender.append(b"third\n")
    assert (tmp_path / "file").read_bytes() == b"first\nsecond\nt"
    appender.close()
    assert (tmp_path / "file").read_bytes() == b"first\nsecond\nt"
    err = capsys.readouterr().err
    assert err.count("cannot be written (Disk quota exceeded)") == 1
    assert "warning: 1 records of" in err and "could not be written and are lost" in err


def test_no_more_than_the_limit_is_kept_in_memory(tmp_path):
    appender = Appender(str(tmp_path / "file"), limit=3)
    full(appender)
    for _ in range(3):
        appender.append(b"line\n")
    with pytest.raises(UserError, match=r"file could not be written for 3 records.*Make room or mend the disk"):
        appender.append(b"line\n")


@pytest.mark.parametrize("how", ["removed", "moved", "with its directory", "replaced"])
def test_a_file_that_is_taken_away_is_said_and_goes_on_in_a_new_one(tmp_path, capsys, how):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    file = lines.Lines(str(path))
    file.write({"step": 1})
    file.check()
    assert not capsys.readouterr().err
    match how:
        case "removed":
            path.unlink()
        case "moved":
            path.rename(tmp_path / "elsewhere")
        case "with its directory":
            shutil.rmtree(path.parent)
        case "replaced":
            path.unlink()
            path.write_text('{"step": 7}')  # without an end of its line
    file.check()
    assert "metrics.jsonl was removed or replaced; it goes on" in capsys.readouterr().err
    file.write({"step": 2})
    file.close()
    assert [line["step"] for line in read(path)] == ([7, 2] if how == "replaced" else [2])
