"""A model as a directory of its own: all of it or nothing, and nothing of the user's is touched."""

import errno
import os
import pathlib

import pytest

from lmboost import standalone
from lmboost.errors import UserError


def make(out):
    target = standalone.find_target(str(out))
    with standalone.whole(target) as partial:
        partial.mkdir(parents=True)
        (partial / "model").write_text("new")


def test_it_is_made_and_a_link_to_an_empty_directory_is_followed(tmp_path):
    make(tmp_path / "new")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link")
    for name in ("new", "real", "link"):
        assert (tmp_path / name / "model").read_text() == "new"
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 3


def test_what_is_there_is_refused_and_stays(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "link").symlink_to("full")
    for name in ("full", "link", "full/notes"):
        with pytest.raises(UserError, match=f"--out='.*{name}' exists and is not empty"):
            make(tmp_path / name)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    make(tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine"


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "mount").mkdir()

    def busy(old, new):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), old)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(UserError, match=r"mount' is a mount point: name a directory inside it"):
        standalone.find_target(str(tmp_path / "mount"))


def test_of_two_that_make_one_directory_the_second_is_refused_and_leaves_nothing(tmp_path):
    target = standalone.find_target(str(tmp_path / "out"))
    with pytest.raises(UserError, match="exists and is not empty"), standalone.whole(target) as partial:
        partial.mkdir()
        (partial / "model").write_text("second")
        make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert pathlib.Path(target, "model").read_text() == "new"


def test_after_an_error_nothing_is_left(tmp_path):
    with pytest.raises(ZeroDivisionError), standalone.whole(tmp_path / "out") as partial:
        partial.mkdir()
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
