"""Recipes are found by name, in a checkout and in a wheel; `lmboost VERB` is light, and the same as `python -m`."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from lmboost import __main__ as command
from lmboost import config, shipped
from lmboost.errors import UserError
from tests import hub, runs

QUICKSTART = runs.ROOT / "configs" / "quickstart.py"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["quickstart.py", "configs/quickstart.py"])
def test_a_recipe_is_found_by_its_name_and_ones_own_file_comes_first(elsewhere, name):
    assert pathlib.Path(shipped.recipe(name, "")) == QUICKSTART
    assert config.load_recipe(f"{name}:plain,tiny").seq_len == 64
    mine = elsewhere / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text(QUICKSTART.read_text().replace("= 700, 8, 128", "= 7, 8, 128"))
    assert config.load_recipe(f"{name}:plain").steps == 7


def test_recipes_that_import_others_are_found_by_name(elsewhere):
    for name in ("grow_124m.py", "inheritune_gpt2_xl.py:tiny", "subnet_smollm2.py:tiny"):
        assert config.load_recipe(name).steps


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quickstrat.py", r"no file 'quickstrat.py', and no recipe .*did you mean 'quickstart.py'.*salt_2p8b.py"),
        ("quickstart:plain", r"--config=quickstart:plain: there is no file 'quickstart'.*did you mean 'quickstart.py'"),
        ("runs/quickstart.py", r"there is no file 'runs/quickstart.py'\.$"),
        ("configs/../quickstart.py", r"there is no file"),
    ],
)
def test_a_misspelt_recipe_suggests_the_right_one(elsewhere, recipe, message):
    with pytest.raises(UserError, match=message):
        config.load_recipe(recipe)


def python(*words, **environment):
    env = os.environ | {"PYTHONPATH": str(runs.ROOT)} | environment
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)


def test_help_names_every_verb_and_imports_no_jax():
    code = "import sys; sys.argv = ['lmboost', '--help']; from lmboost.__main__ import main; main(); "
    done = python("-c", code + "print(sorted({'jax', 'numpy', 'absl'} & {*sys.modules}))")
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    told = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert tuple(told) == command.VERBS and all(len(line.split()) > 3 for line in told.values())


def test_every_module_that_is_a_program_is_a_verb():
    package = runs.ROOT / "lmboost"
    programs = {path for path in package.rglob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    names = {path.parent.name if path.name == "__main__.py" else path.stem for path in programs}
    assert names - {"lmboost", "surgery"} == {*command.VERBS}  # surgery says where its verbs went


def test_a_verb_runs_as_its_module_does():
    ours, theirs = python("-m", "lmboost", "where", "configs"), python("-m", "lmboost.where", "configs")
    assert ours.stdout == theirs.stdout == f"{runs.ROOT / 'configs'}\n" and ours.returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the verb is missing"),
        (["trian"], "VERB='trian' is not known (did you mean 'train'?)"),
        (["--version"], "VERB='--version' is not known"),
        (["where", "lunch"], "FOLDER='lunch' is not known (did you mean 'launch'?)"),
        (["where", "launch", "configs"], "unexpected argument 'configs'"),
    ],
)
def test_a_misspelt_verb_is_one_line(words, message):
    done = python("-m", "lmboost", *words)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert message in done.stderr


@pytest.mark.parametrize("checkout", [True, False])
def test_the_quickstart_of_a_wheel_takes_the_environment_as_it_is(elsewhere, checkout):
    """In a checkout it works in its virtual environment, which is there already here."""
    root, told = elsewhere / "root", elsewhere / "told"
    (root / "launch").mkdir(parents=True)
    shutil.copy(runs.ROOT / "launch" / "quickstart.sh", root / "launch")
    stand_in = f'#!/bin/bash\necho "$0 $*" >>{told}\n'
    for path in (elsewhere / "mine", root / ".venv" / "bin" / "python"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stand_in)
        path.chmod(0o755)
    (root / ".venv" / "installed").touch()
    if checkout:
        (root / "setup.py").touch()
    subprocess.run(["bash", "root/launch/quickstart.sh"], env=os.environ | {"PYTHON": f"{elsewhere}/mine"}, check=True)
    _, prepare, *trained, report = told.read_text().splitlines()
    out = root if checkout else elsewhere
    assert f"--out={out}/runs/quickstart/data" in prepare and "lmboost.report" in report
    assert {line.split()[0] for line in (prepare, *trained, report)} == {
        ".venv/bin/python" if checkout else f"{elsewhere}/mine"
    }
    assert [line.split()[3] for line in trained] == [
        f"--config={root}/configs/quickstart.py:{arm}" for arm in ("teacher", "plain", "helped")
    ]


@pytest.mark.parametrize(("name", "more"), [("newest", set()), ("oldest", {"jax==0.7.2", "flax==0.11.2"})])
def test_constraints_have_a_version_of_every_requirement(name, more):
    requirements = pytest.importorskip("packaging.requirements")
    plain = lambda name: name.lower().replace("_", "-")  # noqa: E731
    lines = (runs.ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
    pinned = dict(map(plain, line.split("==")) for line in lines)
    for line in [*(runs.ROOT / "requirements.txt").read_text().splitlines(), *more]:
        needed = requirements.Requirement(line)
        assert needed.specifier.contains(pinned[plain(needed.name)]), line


# ---------------------------------------------------------------- a wheel, without the checkout


@pytest.fixture(scope="module")
def installed(home):
    """A directory with an installed wheel alone, made of what an sdist has; the console script is in its bin/."""
    pytest.importorskip("setuptools", "70.1")  # which makes wheels by itself
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    checkout, source = home / "checkout", home / "source"
    for name in ("lmboost", "configs", "launch", "constraints"):
        shutil.copytree(runs.ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(runs.ROOT / name, checkout)
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(home)!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True, text=True)
    source.mkdir()
    subprocess.run(["tar", "-xzf", home / made.stdout.split()[-1], "-C", source, "--strip-components=1"], check=True)
    assert (source / "constraints" / "newest.txt").exists()
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", home, source], check=True)
    (wheel,) = home.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", home / "site", wheel], check=True)
    return home / "site"


@pytest.fixture
def lmboost(installed, elsewhere):
    """A function of a verb's words: what it says, run in an empty directory with the wheel alone."""

    def run(*words):
        env = runs.environment(1) | {"PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, installed / "bin" / "lmboost", *words], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_a_wheel_is_all_that_a_new_user_needs(lmboost, elsewhere, installed):
    """Own text and a model of the Hub: data, a plain and a helped run, their comparison, a model for the Hub."""
    hub.write("teacher")
    (elsewhere / "text").mkdir()
    for i in range(40):
        (elsewhere / "text" / f"{i}.txt").write_text(f"{i} sheep and {i + 1} goats, " * 60)
    lmboost("prepare", "--source=text/*.txt", "--tokenizer=teacher", "--out=data", "--validation_fraction=0.2",
            "--record_tokens=256", "--workers=1")  # fmt: skip
    train = ["--config.data.train=data", "--config.model.vocab_size=301", "--config.optimizer.warmup_steps=1"]
    lmboost("train", "--config=quickstart.py:plain,tiny", "--workdir=plain", *train)
    said = lmboost(
        "train", "--config=quickstart.py:helped,tiny", "--workdir=helped", "--config.teacher.path=hf:teacher", *train
    )
    assert "training with align, kd" in said
    assert "helped" in lmboost("report", "--baseline=plain", "--run=helped", "--out=report")
    assert (elsewhere / "report" / "report.png").exists()
    lmboost("convert", "--source=helped", "--out=hf:mine")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*os.listdir("mine")}
    launchers = pathlib.Path(lmboost("where", "launch").strip())
    assert launchers == installed / "lmboost" / "launch" and (launchers / "tpu_vm_worker.sh").exists()
    dry = subprocess.run(
        ["bash", launchers / "tpu_vm.sh", "up", "n", "--accelerator=v6e-8", "--config=quickstart.py",
         "--workdir=gs://b/r"], capture_output=True, text=True,
    )  # fmt: skip
    assert dry.returncode == 2 and "--source is missing, as this is no checkout" in dry.stderr
