"""Tests run on eight CPU devices, unless the environment says otherwise; equal programs are compiled once."""

import atexit
import gc
import importlib.util
import mmap
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

import hypothesis
import pytest

# Machine code that is made quickly and runs slowly: making it would take most of the tests' time, running it takes
# little. The programs are the same up to the compiler's last passes.
CHEAP = (
    "--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)  # fmt: skip


def known(flags):
    """The flags that the installed jaxlib knows; it would abort on others, which come and go."""
    found = set()
    for library in pathlib.Path(*importlib.util.find_spec("jaxlib").submodule_search_locations).glob("libjax_common*"):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found |= {flag for flag in flags if content.find(flag[2:].partition("=")[0].encode()) >= 0}
    return sorted(found)


# jax reads these when it is imported, so what imports it is imported in the fixtures; so do processes of tests.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *known(CHEAP)])
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lmboost-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


hypothesis.settings.register_profile("lmboost", deadline=None)  # a busy machine is slow, and not wrong
hypothesis.settings.load_profile("lmboost")

# Longest first, so that two workers end at about the same time; the others take seconds.
LONGEST = (
    "aot/test_recipes.py", "run/test_restarts.py", "run/test_faults.py", "test_hosts.py", "test_train.py",
    "test_train_step.py", "search/test_job.py", "test_start.py", "surgery/test_init_subnet.py",
    "surgery/test_subnet.py", "docs/test_commands.py", "test_notebooks.py", "test_stages.py", "test_compiled.py",
    "test_score.py", "test_other_tokens.py", "test_strangers.py", "aot/test_aot.py", "benchmarks/test_track.py",
    "hf/test_as_teacher.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {str(pathlib.Path(__file__).parent / name): i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))


def pytest_collection_finish():
    gc.freeze()  # what has been imported stays
    gc.set_threshold(100_000, 20, 20)  # tracing makes many objects and few cycles


@pytest.fixture(autouse=True)
def interruptible():
    """Programs that a test starts can be interrupted, also where the tests run in the background, or under nohup."""
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGHUP, hang_up)


@pytest.fixture(scope="module", autouse=True)
def forget():
    """What a module has compiled is kept on disk, not in memory."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory for a module's runs."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A function (name, make) -> make(directory): done once for all workers; nobody writes into the directory later."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return lambda name, make: _once(base / name, make)


def _once(directory: pathlib.Path, make) -> str:
    """What make(directory) gives to whichever process comes first; the others wait for it."""
    result, until = directory.with_suffix(".result"), time.monotonic() + 600
    while not result.exists():
        try:
            directory.mkdir()
        except FileExistsError:
            assert time.monotonic() < until, f"{directory} has not been made"
            time.sleep(0.1)
            continue
        try:
            made = make(directory)
        except BaseException:
            shutil.rmtree(directory)  # the next one tries for itself
            raise
        part = directory.with_suffix(".part")
        part.write_text(made)
        part.rename(result)
    return result.read_text()


@pytest.fixture(scope="session")
def recipe(shared):
    """The recipe of tiny runs."""
    from tests import runs

    return shared("recipe", runs.write_recipe)


@pytest.fixture(scope="session")
def data(shared):
    """The flag that gives a tiny run its data."""
    from tests import runs

    return "--config.data.train=" + shared("data", runs.write_data)


@pytest.fixture(scope="session")
def teacher(shared, recipe, data):
    """The flag that gives a tiny run its trained helper."""
    from tests import runs

    def train(directory):
        runs.run(recipe, directory / "run", data, "--config.model.num_layers=1", "--config.model.d_model=16")
        return f"--config.teacher.path={directory / 'run'}"

    return shared("teacher", train)


@pytest.fixture(scope="session")
def other(shared, recipe):
    """The flag that gives a tiny run a trained helper whose tokenizer is another one than that of `data`."""
    from tests import hub, runs

    def train(directory):
        text = runs.write_data(directory, tokenizer=str(hub.write_tokenizer(directory / "tokenizer")))
        small = ("--config.model.num_layers=1", "--config.model.d_model=16", "--config.eval.every=0")
        runs.run(recipe, directory / "run", f"--config.data.train={text}", *small)
        return f"--config.teacher.path={directory / 'run'}"

    return shared("other", train)
