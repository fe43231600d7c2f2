"""What a run may go on from, by whatever name it is given, and what is said of what begins again."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import checkpoint, config, going_on
from lmboost.data import records, windows
from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from tests import hub, runs
from tests.compare import losses


def configured(steps, **fields):
    c = config.base()
    c.update_from_flattened_dict({"steps": steps, "optimizer.warmup_steps": 1} | fields)
    return c


HELPED = {
    "objective.kd.weight": 0.5,
    "objective.kd.stop": 0.5,
    "objective.align.weight": 1.0,
    "objective.align.stop": 1.0,
}

MODEL = ModelConfig(
    vocab_size=320, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=64, max_seq_len=32,
    dtype="float32",
)  # fmt: skip


def test_help_that_had_ended_and_a_rate_that_rises_are_said():
    old = json.loads(configured(40, **HELPED).to_json())
    said = "\n".join(going_on.what_begins_again(old, configured(160, **HELPED), 40))
    assert "help by kd had ended before step 40 of 40, and begins again: its stop is a fraction of steps=160" in said
    assert "or its stop to at most 0.2500" in said and "align" not in said
    assert "the learning rate rises from 3.04e-05 to 0.0002" in said


def test_nothing_is_said_of_what_goes_on_as_it_was():
    constant = {"optimizer.schedule": "constant"}
    old = json.loads(configured(40, **HELPED, **constant).to_json())
    shorter = HELPED | {"objective.kd.stop": 0.125}
    assert going_on.what_begins_again(old, configured(160, **shorter, **constant), 40) == []
    assert going_on.what_begins_again(old, configured(40, **HELPED, **constant), 10) == []
    names = {"teacher": {"from": "x"}} | {k: v for k, v in old.items() if k != "teacher"}
    assert going_on.what_begins_again(names, configured(40, **HELPED, **constant), 10) == []


@pytest.mark.parametrize(
    "change", [{"steps": "many"}, {"objective": {"kd": {"stop": "x"}}}, {"optimizer": {"schedule": "no such"}}]
)
def test_a_config_that_cannot_be_compared_is_said(change):
    old = json.loads(configured(40).to_json()) | change
    said = going_on.what_begins_again(old, configured(160), 40)
    assert said and "cannot be compared" in said[0]


@pytest.fixture(scope="module")
def ended(home, recipe, data):
    """A run that is finished, on data of its own."""
    shutil.copytree(data.partition("=")[2], home / "data")
    runs.run(recipe, home / "run", f"--config.data.train={home / 'data'}", "--noconfig.log.tensorboard")
    return home / "run"


def test_the_same_data_under_other_names_is_the_same(ended, home, recipe, monkeypatch):
    (home / "link").symlink_to("data")
    monkeypatch.chdir(home)
    for name in (f"{home}/data/", f"{home}/./data", "data", f"{home}/link"):
        runs.run(recipe, ended, f"--config.data.train={name}", "--noconfig.log.tensorboard")


def test_validation_data_made_anew_is_refused(tmp_path, home, recipe, data, ended):
    other = runs.write_data(tmp_path, seed=1, tokenizer=f"{home}/data/tokenizer")
    shutil.copytree(home / "data", tmp_path / "valid")
    flags = (data, f"--config.data.validation={tmp_path / 'valid'}", "--noconfig.log.tensorboard")
    runs.run(recipe, tmp_path / "run", *flags, "--config.steps=2")
    shutil.rmtree(tmp_path / "valid")
    shutil.copytree(other, tmp_path / "valid")
    before = losses(tmp_path / "run", "val_loss")
    with pytest.raises(
        UserError, match=r"validated on other data .*data.validation='.*' -> |data.validation has changed"
    ):
        runs.run(recipe, tmp_path / "run", *flags, "--config.steps=2")
    assert losses(tmp_path / "run", "val_loss") == before


def test_places_that_are_no_runs_are_refused_and_untouched(tmp_path, recipe, data, ended):
    prepared = tmp_path / "data"
    shutil.copytree(data.partition("=")[2], prepared)
    hub.write(tmp_path / "hub")
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.json").write_text("{}")
    places = {
        prepared: "the field config is missing", tmp_path / "hub": "is a Hugging Face Hub directory, not a run's",
        tmp_path / "search": "is a search, not a run's", ended / "checkpoints" / "8": "is a checkpoint, not a run's",
    }  # fmt: skip
    for place, message in places.items():
        before = sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*"))
        with pytest.raises(UserError, match=message):
            runs.run(recipe, place, data)
        assert sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*")) == before


def test_what_differs_is_a_line_a_field_with_the_way_out(ended, home, recipe):
    flags = ("--config.seed=3", "--config.optimizer.learning_rate=0.5", f"--config.data.train={home / 'data'}")
    with pytest.raises(UserError) as caught:
        runs.run(recipe, ended, *flags)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  optimizer.learning_rate: 0.01 -> 0.5", "  seed: 0 -> 3"]
    assert f"resume.path={ended}" in lines[3] and f"init.path={ended}" in lines[3]
    with pytest.raises(UserError, match="\n  seed: 0 -> 3\n.*start from its parameters alone with init.path"):
        runs.run(recipe, home / "other", *flags, f"--config.resume.path={ended}", "--config.resume.step=6")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_parameter_that_is_not_finite_is_named(value, dtype):
    params = {"a": {"b": jnp.ones((8, 3), dtype)}, "c": jnp.zeros(8, dtype).at[5].set(value)}
    with pytest.raises(UserError, match=r"^here has values that are not finite in parameter 'c'"):
        checkpoint.check_finite(params, "here")
    with jax.set_mesh(mesh := hub.one_device()):
        placed = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        with pytest.raises(UserError, match="parameter 'c'"):
            checkpoint.check_finite(placed, "here")
        checkpoint.check_finite(placed["a"], "here")


def test_models_with_values_that_are_not_finite_neither_teach_nor_start_a_run(tmp_path, recipe, data):
    hub.write(tmp_path / "hub", MODEL)
    shutil.copytree(data.partition("=")[2] + "/tokenizer", tmp_path / "hub", dirs_exist_ok=True)
    (tmp_path / "hub" / "tokenizer.json").unlink()
    path = tmp_path / "hub" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    offset = start + json.loads(raw[8:start])["model.norm.weight"]["data_offsets"][0]
    raw[offset : offset + 4] = np.float32("nan").tobytes()
    path.write_bytes(raw)
    given = f"hf:{tmp_path / 'hub'}"
    message = r"='hf:.*: the model in .*hub has values that are not finite in parameter 'final_norm/scale'"
    for flags in (
        [f"--config.init.path={given}"],
        [f"--config.teacher.path={given}", "--config.objective.kd.weight=0.5", "--config.objective.kd.stop=0.5"],
        [f"--config.objective.select.scorer={given}", "--config.objective.select.candidates=2",
         "--config.objective.select.stop=0.5"],
    ):  # fmt: skip
        with pytest.raises(UserError, match=flags[0].removeprefix("--config.").partition("=")[0] + message):
            runs.run(recipe, tmp_path / "run", data, "--config.teacher.dtype=float32", *flags)


def test_a_token_beyond_the_vocabulary_is_an_error_at_its_record(tmp_path, data):
    shutil.copytree(data.partition("=")[2], tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"vocab_size": 200}))
    rows = windows.Windows(str(tmp_path / "data"), "train", 32)
    with pytest.raises(UserError, match=r"array_record.* is damaged .*record 0 of the split has a token beyond"):
        rows[0]
    assert records.read_manifest(tmp_path / "data")["vocab_size"] == 200
