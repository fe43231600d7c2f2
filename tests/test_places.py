"""Files that are written whole or not at all."""

import os
import subprocess
import sys
import threading

import pytest

from lmboost import places
from lmboost.errors import UserError

KILLED = """
import os, signal, sys
from lmboost import places
from lmboost.errors import UserError
with places.whole_file(sys.argv[1]) as partial:
    partial.write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_old_file_stays_until_the_new_one_is_written_and_after_an_error(tmp_path):
    path = tmp_path / "file"
    with places.whole_file(path) as partial:
        partial.write_text("old")
        assert not path.exists() and partial.parent == tmp_path and partial.name.endswith(".tmp")
    with pytest.raises(ZeroDivisionError), places.whole_file(str(path)) as partial:
        partial.write_text("new")
        1 / 0  # noqa: B018
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_the_old_file_outlives_a_kill(tmp_path):
    (tmp_path / "file").write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "file")]).returncode < 0
    assert (tmp_path / "file").read_text() == "old"


def test_many_write_one_file_and_none_is_in_anothers_way(tmp_path):
    texts = [str(i) * 10_000 for i in range(8)]

    def write(text):
        for _ in range(20):
            with places.whole_file(tmp_path / "file") as partial:
                partial.write_text(text)
            assert (tmp_path / "file").read_text() in texts

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "name", ["run[0]", "a[b]c/run", "back\\slash", "s3:/x", "gs:", "nul\0", "caf\udce9", "f\u00e4lle"]
)
def test_names_under_which_checkpoints_are_not_found_again_are_refused(tmp_path, name):
    if name == "f\u00e4lle":
        assert places.find(f"{tmp_path}/{name}").name == name
        return
    with pytest.raises(
        UserError, match=r"--out='.* holds .*: checkpoints with that in their path cannot be read again"
    ):
        places.find(f"{tmp_path}/{name}", "--out")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(places.find("~/runs/a")) == f"{tmp_path}/runs/a"


def test_what_is_there_is_not_made_and_not_followed(tmp_path):
    path = places.find(str(tmp_path / "x"))
    places.create(path, b"one")
    (tmp_path / "link").symlink_to("nowhere")
    for there in ("x", "link"):
        with pytest.raises(FileExistsError):
            places.create(places.find(str(tmp_path / there)), b"two")
    assert (tmp_path / "x").read_bytes() == b"one" and not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match=r"--workdir=.*link is a link to 'nowhere'"):
        places.refuse_links(places.find(str(tmp_path)), "--workdir")


def test_a_tree_is_synced_file_by_file(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_text("x")
    (tmp_path / "y").write_text("y")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    places.sync_tree(tmp_path)
    assert set(synced) == {str(path) for path in (tmp_path, *tmp_path.rglob("*"))}
