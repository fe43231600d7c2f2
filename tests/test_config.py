"""The command line fills the config tree, or says what is wrong with it."""

import pytest

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
        ("--confg.steps=1", r"unknown flag --confg.steps"),
        ("--wrkdir=x", r"unknown flag --wrkdir \(did you mean 'workdir'\?\)"),
        ("steps=1", "unexpected argument 'steps=1'"),
    ],
)
def test_errors_of_flags(recipe, flag, message):
    with pytest.raises(UserError, match=message):
        load(recipe, flag)


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


def test_recipe_without_get_config(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("")
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
