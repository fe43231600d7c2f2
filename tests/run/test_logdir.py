"""The small files of a run: a local workdir is its own log directory, other places are checked."""

import importlib.util
import os
from contextlib import closing

import pytest

from lmboost import places
from lmboost.errors import UserError
from lmboost.run import logdir


def test_a_local_workdir_is_its_own_log_directory_and_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(logdir.LogDir("run")) as directory:
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
