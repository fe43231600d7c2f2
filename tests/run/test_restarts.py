"""A hundred restarts of one run: nothing changes, and nothing is left over."""

import json
import os
import subprocess

import pytest

from lmboost import checkpoint
from tests import runs
from tests.compare import losses
from tests.runs import finish

pytestmark = pytest.mark.slow


def test_a_hundred_restarts_change_nothing_and_leave_nothing(tmp_path, home, recipe, data, teacher, monkeypatch):
    """A run that dies after two steps on average, by SIGKILL or SIGTERM at any moment, and then ends in peace."""
    flags = (
        "--config.steps=200", "--config.checkpoint.every=1", "--config.eval.every=50", "--noconfig.log.tensorboard",
    )  # fmt: skip
    given = (f"{recipe}:helped", tmp_path / "run", data, teacher, *flags)
    finish(runs.launch(1, 1, f"{recipe}:helped", home / "long", data, teacher, *flags))
    monkeypatch.setenv("HARM", "die:2")
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    process = runs.launch(1, 1, *given, own=("--module=tests.harm", "--max_crashes=200", "--pause=0"))
    output, seen = [], []
    for line in process.stdout:
        output.append(line)
        if line.startswith("launch:") and "; restart " in line and process.poll() is None:
            seen.append(len(os.listdir(f"/proc/{process.pid}/fd")))
            if len(seen) == 100:
                (tmp_path / "mark").touch()
            assert len(list((tmp_path / "run" / "checkpoints").glob("*"))) <= 5
    assert process.wait() == 0, output[-50:]
    attempts = [json.loads(line)["attempt"] for line in (tmp_path / "run" / "goodput.jsonl").read_text().splitlines()]
    assert len(set(attempts)) > 60 and len(seen) >= 100
    assert min(seen[-20:]) <= max(seen[:20]) and max(seen[-20:]) < min(seen[:20]) + 20, "open files"
    newest = [checkpoint.find(str(path)) for path in (tmp_path / "run", home / "long")]
    ends = [json.loads((path / "position" / "metadata").read_text()) for path in newest]
    assert ends[0] == ends[1] and ends[0]["step"] == 200
    assert losses(tmp_path / "run") == losses(home / "long")
    assert size(tmp_path / "run") < 1.5 * size(home / "long")
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout.split()
    assert not left


def size(directory):
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
