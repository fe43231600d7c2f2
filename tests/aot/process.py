"""Python in a process of its own."""

import os
import subprocess
import sys

from tests.runs import ROOT


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A process of its own: libtpu reads its settings once, when it is loaded."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
