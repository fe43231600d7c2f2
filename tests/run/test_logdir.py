"""The small files of a run: whole records whatever the disk does; a local workdir is its own log directory."""

import errno
import importlib.util
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost import places
from lmboost.errors import UserError
from lmboost.run import logdir
from lmboost.run.lines import Appender


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


def test_a_local_workdir_is_its_own_log_directory_and_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with logdir.LogDir("run") as directory:
        assert directory.path == str(tmp_path / "run")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
        directory.sync()
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == ["metrics.jsonl"]


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://", "gs:///"])
def test_a_directory_in_another_kind_of_store_is_refused(path):
    with pytest.raises(UserError, match=rf"resume.path='{path}': expected a local directory or gs://bucket/path"):
        places.find(path, "resume.path")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--workdir='gs://bucket/run': gs:// needs the package gcsfs: pip install"):
        logdir.LogDir("gs://bucket/run")
