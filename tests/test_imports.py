"""Every module can be imported, with the oldest and the newest of the libraries."""

import importlib
import importlib.util
import os
import pkgutil
import subprocess
import sys

import lmboost
from tests import runs

OPTIONAL = {  # modules of packages that are not always there
    "lmboost.harness": "lm_eval",
    "lmboost.data.beam": "apache_beam",
    **{f"lmboost.run.trackers.{name}": name for name in ("wandb", "mlflow", "trackio")},
}
NAMES = {module.name for module in pkgutil.walk_packages(lmboost.__path__, "lmboost.")}


def test_every_module_is_imported():
    for name in NAMES - {name for name, package in OPTIONAL.items() if importlib.util.find_spec(package) is None}:
        importlib.import_module(name)


def test_torch_is_not_imported_where_it_happens_to_be(tmp_path):
    """It takes seconds of every start, and a run has no use for it."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    imports = [f"import {name}" for name in sorted(NAMES - OPTIONAL.keys()) if not name.endswith("__main__")]
    is_there = ["try:", "    import torch", "except AssertionError:", "    sys.exit(0)", "sys.exit(1)"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(runs.ROOT)])}
    code = "\n".join(["import sys", *imports, *is_there])
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
