"""Asks lmboost.aot, in a process of its own as libtpu wants it, and keeps what it says."""

import json
import os
import pathlib
import subprocess
import sys

HOME = pathlib.Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """Of a process that finds this project, and its own libtpu: jax names the one of this process to its children."""
    return {name: x for name, x in os.environ.items() if name != "TPU_LIBRARY_PATH"} | {"PYTHONPATH": str(HOME)}


def aot(path: pathlib.Path, *flags: str, python: str = sys.executable) -> dict:
    """The report that `python -m lmboost.aot` writes to `path` with these flags; what is there is not made again."""
    if not path.exists():
        command = [python, "-m", "lmboost.aot", *flags, f"--out={path}"]
        subprocess.run(command, cwd=HOME, env=environment(), check=True, stdout=sys.stderr)
    return json.loads(path.read_text())
