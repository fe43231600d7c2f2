"""Every module can be imported, with the oldest and the newest of the libraries."""

import importlib
import importlib.util
import pkgutil

import lmboost


def test_every_module_is_imported():
    names = {module.name for module in pkgutil.walk_packages(lmboost.__path__, "lmboost.")}
    if importlib.util.find_spec("lm_eval") is None:
        names.remove("lmboost.harness")  # is of lm-eval
    if importlib.util.find_spec("apache_beam") is None:
        names.remove("lmboost.data.beam")
    for name in names:
        importlib.import_module(name)
