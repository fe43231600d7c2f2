"""The command line fills the config tree, or says what is wrong with it."""

import dataclasses
import json
import re
import runpy
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from lmboost import config
from lmboost.errors import UserError

RECIPE = """
from lmboost import config

def get_config(variant=""):
    c = config.base()
    c.steps = 7
    if variant:
        c.batch_size = int(variant)
    return c
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return str(path)


def load(recipe, *flags):
    return config.load([f"--config={recipe}", "--workdir=w", *flags])[0]


def test_recipe_variant_overrides_and_workdir(recipe):
    c, workdir = config.load(
        [
            f"--config={recipe}:64", "--config.optimizer.learning_rate=1e-3", "--config.seq_len=128",
            "--config.teacher.path=a=b", "--config.model.norm=layernorm", "--workdir", "runs/x",
        ]
    )  # fmt: skip
    assert (c.steps, c.batch_size, c.seq_len, workdir) == (7, 64, 128, "runs/x")
    assert c.optimizer.learning_rate == 1e-3 and c.teacher.path == "a=b" and c.model.norm == "layernorm"


def test_config_and_workdir_take_either_form(recipe):
    assert config.load(["--config", recipe, "--workdir", "w"]) == config.load([f"--config={recipe}", "--workdir=w"])


def test_values_take_the_type_of_the_default(recipe):
    c = load(recipe, "--config.optimizer.learning_rate=1", "--config.mesh.fsdp=-1", "--config.data.train=123")
    assert isinstance(c.optimizer.learning_rate, float) and c.mesh.fsdp == -1 and c.data.train == "123"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--config.log.tensorboard", True), ("--noconfig.log.tensorboard", False),
        ("--config.log.tensorboard=true", True),
        ("--config.log.tensorboard=False", False), ("--config.log.tensorboard=0", False),
        ("--config.log.tensorboard=1", True),
    ],
)  # fmt: skip
def test_forms_of_a_bool(recipe, flag, value):
    assert load(recipe, flag).log.tensorboard is value


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config.optimizer.learnig_rate=1",
            r"no field 'optimizer.learnig_rate' \(did you mean 'optimizer.learning_rate'\?\)",
        ),
        ("--config.optimizer=1", "no field 'optimizer'"),
        ("--config.steps=many", r"config.steps=many: expected a value of type int, as the default 7"),
        ("--config.steps=1.5", "expected a value of type int"),
        ("--config.steps", "steps is of type int; give its value, as in --config.steps=VALUE"),
        ("--noconfig.steps", "steps is of type int"),
        ("--noconfig.steps=3", "steps is of type int"),
        ("--config.optimizer.b1=high", "expected a value of type float"),
        ("--config.log.tensorboard=yes", "expected true or false, as the default True"),
        ("--confg.steps=1", r"unknown flag --confg.steps \(did you mean 'config.steps'\?\)"),
        ("--config.steps=", "config.steps=: expected a value of type int, as the default 7"),
        ("--config.steps=1e3", "config.steps=1e3: expected a value of type int"),
        ("--config.steps=a=b: c", "config.steps=a=b: c: expected a value of type int"),
        ("--config.optimizer.b1=", "config.optimizer.b1=: expected a value of type float, as the default 0.9"),
        ("--noconfig.log.tensorboard=true", "--noconfig.log.tensorboard=true does not take an argument"),
        ("--config.teacher.pth=x", r"no field 'teacher.pth' \(did you mean 'teacher.path'\?\)"),
        ("--config.teacher.frm=x", r"no field 'teacher.frm'"),
        ("--config.seed.from=x", "no field 'seed.from'"),
        ("--config.items=1", "no field 'items'"),
        ("--config.=1", "no field ''"),
        ("config.steps=1", "unexpected argument 'config.steps=1'"),
        ("--workdir", "Missing value for flag --workdir"),
        ("--wrkdir=x", r"unknown flag --wrkdir \(did you mean 'workdir'\?\)"),
        ("steps=1", "unexpected argument 'steps=1'"),
    ],
)
def test_errors_of_flags(recipe, flag, message):
    with pytest.raises(UserError, match=message):
        load(recipe, flag)


@pytest.mark.parametrize("after", ["--config.seed=3", "-1", "x"])
def test_a_field_without_its_value_does_not_take_what_follows(recipe, after):
    for field in ("teacher.path", "steps"):
        with pytest.raises(
            UserError, match=rf"--config.{field}: {field} is of type (str|int); give|unexpected|unknown"
        ):
            load(recipe, f"--config.{field}", after)


FIELDS = config.flatten(config.base())
TEXTS = ["", "a=b", "[x] (y)", "{'a': 1}", "-1", "--x", "None"]
VALUES = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False) | st.integers(-100, 100).map(float),
    str: st.text(st.characters(codec="utf-8")) | st.sampled_from(TEXTS),
}
AUTO_FIELDS, AUTO = (
    ("objective.kd.stop", "objective.align.stop"),
    st.floats(allow_nan=False, allow_infinity=False) | st.just("auto"),
)


@pytest.fixture(scope="module")
def base_recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "recipe.py"
    path.write_text("from lmboost.config import base as get_config")
    return str(path)


@settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({f: AUTO if f in AUTO_FIELDS else VALUES[type(value)] for f, value in FIELDS.items()}))
def test_every_field_can_be_set(base_recipe, values):
    flags = [f"--config.{field}={str(v).lower() if isinstance(v, bool) else v}" for field, v in values.items()]
    read = config.flatten(load(base_recipe, *flags))
    assert read == values and all(type(read[field]) is type(value) for field, value in values.items())


@settings(max_examples=100, deadline=None, database=None)
@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_every_misspelling_by_a_letter_is_refused_with_the_right_name(base_recipe, field, data):
    at = data.draw(st.integers(0, len(field) - 1))
    letter = data.draw(st.sampled_from(["", *"abcdefghijklmnopqrstuvwxyz_"]))
    wrong = field[:at] + letter + field[at + data.draw(st.integers(0, 1)) :]
    near = {name for name in FIELDS if len(name) - len(wrong) in (-1, 0, 1) and one_letter(name, wrong)}
    if wrong in FIELDS or not field[at].isalnum():
        return
    with pytest.raises(UserError, match=re.escape(f"the config has no field {wrong!r}")) as caught:
        load(base_recipe, f"--config.{wrong}=1")
    assert re.search(r"did you mean '(.*)'\?", str(caught.value))[1] in near


def one_letter(a, b):
    """Whether one letter more, less or other makes b of a."""
    skips = [(i, more, less) for i in range(len(a) + 1) for more in (0, 1) for less in (0, 1)]
    return any(a[:i] + a[i + more :] == b[:i] + b[i + less :] for i, more, less in skips)


@dataclasses.dataclass(frozen=True, kw_only=True)
class More(config.Flags):
    reference: str = config.required("a run")
    count: int = 3
    target: float | None = None
    fast: bool = False


def test_flags_of_a_verb_of_its_own(recipe):
    argv = [f"--config={recipe}:64", "--workdir=w", "--config.seq_len=8"]
    c, flags = config.read([*argv, "--reference", "r", "--fast"], More)
    assert (c.batch_size, c.seq_len) == (64, 8)
    assert flags == More(config=f"{recipe}:64", workdir="w", reference="r", fast=True)
    flags = config.read([*argv, "--reference=r", "--count=-1", "--target=3", "--nofast", "--traceback"], More)[1]
    assert (flags.count, flags.target, flags.fast, flags.traceback) == (-1, 3.0, False, True)
    for flag, message in (
        ("--count=two", "--count=two: expected a value of type int, as the default 3."),
        ("--target=low", "--target=low: expected a value of type float."),
        ("--fast=yes", "--fast=yes: expected true or false, as the default False."),
        ("--refrence=r", r"unknown flag --refrence \(did you mean 'reference'\?\)"),
        ("--count=4", "--reference is missing: give a run."),
    ):
        with pytest.raises(UserError, match=message):
            config.read([*argv, flag], More)


def test_nothing_is_left_of_one_command_line_in_the_next(recipe):
    load(recipe, "--config.steps=3")
    assert load(recipe).steps == 7


@pytest.mark.parametrize("name", ["teacher", "init", "resume"])
def test_the_older_name_of_a_field_is_understood_and_the_newer_told(recipe, capsys, name):
    assert load(recipe, f"--config.{name}.from=x.from")[name].path == "x.from"
    assert capsys.readouterr().err == f"--config.{name}.from is now --config.{name}.path\n"
    load(recipe, f"--config.{name}.path=--config.init.from")
    assert capsys.readouterr().err == ""


def older(c):
    """The config as a manifest.json had it before the fields had the names that they have."""
    values = json.loads(c.to_json())
    for name in ("teacher", "init", "resume"):
        values[name]["from"] = values[name].pop("path")
    return values


def test_a_config_that_was_saved_under_older_names_is_the_same(recipe):
    flags = ["--config.teacher.path=t", "--config.init.path=i", "--config.resume.path=r"]
    old = ConfigDict(older(load(recipe, *flags)))
    assert config.differences(old, load(recipe, *flags)) == []
    assert config.differences(old, load(recipe)) == ["init.path: 'i' -> ''", "teacher.path: 't' -> ''"]


def test_a_recipe_that_sets_a_field_by_its_older_name_is_told_so(tmp_path):
    path = tmp_path / "winner.py"
    lines = (
        "from lmboost import config",
        "def get_config():",
        " c = config.base()",
        f" c.update({older(config.base())})",
    )
    path.write_text("\n".join([*lines, " return c"]))
    with pytest.raises(UserError, match='winner.py does not load: Key "from" does not exist .*path'):
        load(str(path))


def test_missing_flags(recipe):
    with pytest.raises(UserError, match="--config is missing"):
        config.load(["--workdir=w"])
    with pytest.raises(UserError, match="--workdir is missing"):
        config.load([f"--config={recipe}"])


def test_missing_file():
    with pytest.raises(UserError, match=r"no file 'configs/nowhere.py'"):
        load("configs/nowhere.py:plain")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.stpes = 3", "does not load: .*stpes"),
        ("c.optimizer.b3 = 0.9", "does not load: .*b3"),
        ("c.steps = 'many'", "does not load: .*(int|str)"),
        ("c['stpes']", "does not load: .*stpes"),
    ],
)
def test_recipe_that_breaks_the_locked_tree(tmp_path, line, message):
    path = tmp_path / "broken.py"
    path.write_text(f"from lmboost import config\ndef get_config():\n    c = config.base()\n    {line}\n    return c\n")
    with pytest.raises(UserError, match=message) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "def get_config():\n    pass"])
def test_recipe_without_a_config(tmp_path, text):
    path = tmp_path / "empty.py"
    path.write_text(text)
    with pytest.raises(UserError, match="does not load: .*get_config"):
        load(str(path))


def test_variants():
    known = ("plain", "rkd", "tiny")
    assert config.variants("", known) == set()
    assert config.variants("rkd, tiny", known) == {"rkd", "tiny"}
    with pytest.raises(
        UserError, match=r"variant='rdk' is not known \(did you mean 'rkd'\?\): expected one of plain, rkd, tiny"
    ):
        config.variants("rdk", known)
    with pytest.raises(UserError, match="several arms"):
        config.variants("rkd,plain", known)


def test_differences_names_what_changes_the_result():
    old, new = config.base(), config.base()
    assert config.differences(old, new) == []
    new.steps, new.objective.kd.weight, new.model.norm = 2000, 0.5, "layernorm"
    assert config.differences(old, new) == [
        "model.norm: 'rmsnorm' -> 'layernorm'", "objective.kd.weight: 0.0 -> 0.5", "steps: 1000 -> 2000"
    ]  # fmt: skip


def test_differences_ignores_what_does_not():
    old, new = config.base(), config.base()
    for name in config.FREE:
        assert name in config.flatten(old) or any(leaf.startswith(name + ".") for leaf in config.flatten(old))
    new.mesh.fsdp, new.log.every, new.checkpoint.every, new.eval.batches = 8, 1, 5, 1
    new.data.workers, new.objective.block_tokens, new.resume.path = 4, 64, "x"
    assert config.differences(old, new) == []


def test_differences_sees_fields_that_only_one_has():
    old, new = config.base().copy_and_resolve_references(), config.base()
    with old.unlocked():
        old.gone = 1
    assert config.differences(old, new) == ["gone: 1 -> None"]


def test_differences_takes_a_field_that_there_was_not_for_its_default():
    old, new = config.base().copy_and_resolve_references(), config.base()
    with old.unlocked():
        del old.init["kind"]
    assert config.differences(old, new) == []
    new.init.kind = "inherit"
    assert config.differences(old, new) == ["init.kind: 'copy' -> 'inherit'"]


def test_flatten_names_every_leaf_once():
    flat = config.flatten(config.base())
    assert flat["teacher.path"] == "" and flat["objective.align.scale"] == "ratio" and "objective" not in flat


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # imported by other tests before
@pytest.mark.parametrize("verb", ["train", "search", "rounds", "aot"])
@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["--config=x", "--help"], 0, "--traceback  "),
        ([], 2, "error: --config is missing: give a recipe"),
        (["--wrkdir=x"], 2, "error: unknown flag --wrkdir (did you mean 'workdir'?)."),
        (["--wrkdir=x", "--traceback"], None, "unknown flag --wrkdir"),
    ],
    ids=["help", "nothing", "mistake", "traceback"],
)
def test_every_verb_with_a_recipe_ends_alike(monkeypatch, capsys, verb, argv, status, says):
    monkeypatch.setattr(sys, "argv", [verb, *argv])
    with pytest.raises((SystemExit, UserError)) as end:
        runpy.run_module(f"lmboost.{verb}", run_name="__main__")
    told = capsys.readouterr()
    if status is None:
        assert says in str(end.value) and not told.err
    else:
        assert (end.value.code or 0) == status and says in (told.err if status else told.out)
        assert len(told.err.splitlines()) == (1 if status else 0)
