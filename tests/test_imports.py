"""Every module can be imported, with the oldest and the newest of the libraries."""

import importlib
import importlib.util
import pkgutil

import lmboost

OPTIONAL = {  # modules of packages that are not always there
    "lmboost.harness": "lm_eval",
    "lmboost.data.beam": "apache_beam",
    **{f"lmboost.run.trackers.{name}": name for name in ("wandb", "mlflow", "trackio")},
}


def test_every_module_is_imported():
    names = {module.name for module in pkgutil.walk_packages(lmboost.__path__, "lmboost.")}
    for name in names - {name for name, package in OPTIONAL.items() if importlib.util.find_spec(package) is None}:
        importlib.import_module(name)
