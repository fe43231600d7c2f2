"""Tests run on eight CPU devices, unless the environment says otherwise; equal programs are compiled once."""

import atexit
import os
import shutil
import tempfile

import pytest

# jax reads these when it is imported, so what imports it is imported in the fixtures.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lmboost-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers end at about the same time.

    --no-loadscope-reorder keeps this order; without it, xdist begins with the files of the most tests.
    """
    longest = ("test_restarts.py", "test_faults.py", "test_hosts.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory for a module's runs."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def recipe(home):
    """The recipe of tiny runs."""
    from tests import runs

    return runs.write_recipe(home)


@pytest.fixture(scope="module")
def data(home):
    """The flag that gives a tiny run its data."""
    from tests import runs

    return "--config.data.train=" + runs.write_data(home)


@pytest.fixture(scope="module")
def teacher(home, recipe, data):
    """The flag that gives a tiny run its trained helper."""
    from tests import runs

    runs.run(recipe, home / "teacher", data, "--config.model.num_layers=1", "--config.model.d_model=16")
    return f"--config.teacher.path={home / 'teacher'}"
