"""A run becomes a Hub directory, and that stands wherever a checkpoint can."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmboost import checkpoint, convert, evaluate, train
from lmboost.errors import UserError
from lmboost.hf import card, reader
from lmboost.run import metrics
from tests import hub, runs
from tests.compare import assert_same

SHORT = "--config.steps=2"


@pytest.fixture(scope="module")
def data(home):
    return runs.write_data(home)


@pytest.fixture(scope="module")
def workdir(home, recipe, data):
    """A run with a padded vocabulary."""
    runs.run(recipe, home / "run", f"--config.data.train={data}", "--config.model.vocab_multiple=128", SHORT)
    return home / "run"


@pytest.fixture(scope="module")
def published(home, workdir):
    """That run as a Hub directory."""
    convert.convert(str(workdir), f"hf:{home / 'hub'}")
    return home / "hub"


def load(path, **changes):
    saved = checkpoint.Saved.find(str(path))
    return jax.device_get(saved.load(hub.one_device(), model=dataclasses.replace(saved.model, **changes)))


def test_a_run_is_written_without_what_only_training_needs(workdir, published):
    """Without padded rows; the same numbers otherwise."""
    names = {path.name for path in published.iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    manifest = checkpoint.Saved.find(f"hf:{published}").manifest
    there = json.loads((workdir / "manifest.json").read_text())
    assert manifest["data"]["tokenizer"] == there["data"]["tokenizer"] and "config" not in manifest
    card = (published / "README.md").read_text()
    assert "2 steps" in card and "alone" in card and there["data"]["train"] in card
    assert str(workdir.parent) not in card and there["config"]["data"]["train"].rpartition("/")[2] in card
    params = load(workdir)
    params["embed"]["embedding"] = params["embed"]["embedding"][:320]
    params["head"] = params["head"][:, :320]
    assert_same(load(f"hf:{published}"), params)


def front_matter(card):
    """The YAML in front of a card."""
    return dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())


def test_the_card_says_what_the_run_was(home, workdir, published):
    card = (published / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": '"transformers"', "pipeline_tag": '"text-generation"', "tags": '["lmboost"]',
    }  # fmt: skip
    manifest = json.loads((workdir / "manifest.json").read_text())
    last = [line for line in metrics.read(str(workdir)) if "val_loss" in line][-1]
    for row in (
        "| start | random parameters |", f"| training data | `{manifest['data']['train']}` |", "| tokens | 512 |",
        f"| validation loss | {last['val_loss']:.4f} on `{manifest['data']['fingerprint']}` |",
    ):  # fmt: skip
        assert row in card, row
    assert "| teacher" not in card and "recipe" not in front_matter(card)


def test_the_card_names_teacher_start_and_recipe_and_an_unfinished_run():
    hub_cache = "/home/me/hub/models--owner--small/snapshots/0123"
    config = {"steps": 40, "batch_size": 8, "seq_len": 32, "init": {"path": f"hf:{hub_cache}", "kind": "copy"}}
    manifest = {
        "config": config, "data": {"train": "a1", "tokenizer": None}, "command": ["-m", "--config=my/r.py:tiny"],
        "teacher": {"directory": "/runs/helper/checkpoints/8"}, "scorer": None,
    }  # fmt: skip
    text = card.text("LlamaForCausalLM", hub.LLAMA, manifest, {"step": 10, "tokens": 1e6, "flops": 2e9}, "mit")
    assert front_matter(text)["license"] == '"mit"' and front_matter(text)["base_model"] == '"owner/small"'
    for words in (
        "for 10 of 40 steps", "with the help of a teacher", "| recipe | `r.py:tiny` |", "| teacher | `helper` |",
        "| start | `owner/small`, copy |", "| tokens | 1,000,000 |", "| FLOPs | 2e+09 |",
    ):  # fmt: skip
        assert words in text, words
    assert "/home" not in text and "/runs" not in text and "validation loss" not in text


def test_there_and_back_it_is_a_checkpoint(home, workdir, published):
    said = []
    convert.convert(f"hf:{published}", str(home / "back"), report=said.append)
    assert_same(load(home / "back"), load(f"hf:{published}"))
    assert any("layers.*.self_attn.q_proj.weight [32, 32] F32 x 2 -> layers/attn/q/kernel" in line for line in said)
    convert.convert(str(home / "back"), f"hf:{home / 'again'}")
    assert (home / "again" / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_bfloat16_and_shards(home, published):
    convert.convert(f"hf:{published}", f"hf:{home / 'short'}", "bfloat16", max_shard_size=3e-5)
    assert len(list((home / "short").glob("model-*-of-*.safetensors"))) > 2
    long = load(f"hf:{published}")
    rounded = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x, "bfloat16"), np.float32), long)
    assert_same(load(f"hf:{home / 'short'}"), rounded)
    convert.convert(f"hf:{published}", str(home / "short-checkpoint"), "bfloat16")
    assert_same(load(home / "short-checkpoint"), rounded)


def test_training_starts_from_it_and_is_helped_by_it(home, recipe, data, published, capsys):
    """Init, teacher and scorer; its parameters are those of the checkpoint that it is converted to."""
    where = [f"--config.{field}=hf:{published}" for field in ("init.path", "teacher.path", "objective.select.scorer")]
    helps = [f"--config.objective.{x}" for x in ("kd.weight=0.5", "kd.stop=1", "select.candidates=2", "select.stop=1")]
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", SHORT]
    runs.run(recipe, home / "from-hub", f"--config.data.train={data}", *where, *helps, *mesh)
    said = capsys.readouterr().out
    assert f"start: init.path {published}" in said and "training with kd, select" in said
    manifest = json.loads((home / "from-hub" / "manifest.json").read_text())
    if not (home / "back").exists():
        convert.convert(f"hf:{published}", str(home / "back"))
    there = jax.tree.map(lambda x: jax.numpy.asarray(x, "bfloat16"), load(home / "back"))
    assert manifest["teacher"]["fingerprint"] == checkpoint.fingerprint(there)
    assert manifest["teacher"]["model"]["num_layers"] == 2


def test_it_is_evaluated_as_the_run(workdir, data, published):
    expected = evaluate.evaluate(str(workdir), batches=2)
    assert evaluate.evaluate(f"hf:{published}", data, batches=2) == pytest.approx(expected, rel=1e-5)


def test_a_start_from_it_is_the_model(home, recipe, data, published, monkeypatch, capsys):
    """Before the first step; what the student computes otherwise is said."""
    seen = []

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.teacher, "load", stop)
    started = train._start
    monkeypatch.setattr(train, "_start", lambda *a: seen.append(started(*a)) or seen[-1])
    with pytest.raises(KeyboardInterrupt):
        runs.run(
            recipe, home / "start", f"--config.data.train={data}", f"--config.init.path=hf:{published}",
            "--config.model.rope_theta=500", "--config.model.vocab_multiple=128",
        )  # fmt: skip
    params = jax.device_get(seen[0][0].params["model"])
    assert not params["embed"]["embedding"][320:].any() and params["head"].shape == (32, 384)
    params["embed"]["embedding"], params["head"] = params["embed"]["embedding"][:320], params["head"][:, :320]
    assert_same(params, load(f"hf:{published}"))
    assert "init.path: the student has rope_theta=500.0, the model it starts from 10000.0" in capsys.readouterr().out


MISTAKES = {
    "nothing there": ("hf:/nowhere/at/all", "out", r"no directory /nowhere/at/all.*hf download OWNER/NAME"),
    "no directory of the Hub": ("hf:RUN", "out", "is no Hub directory: .* given without 'hf:'"),
    "no prefix": ("HUB", "hf:out", "is a Hugging Face Hub directory: give it as hf:"),
    "two checkpoints": ("RUN", "out", "are both checkpoints"),
    "out is there": ("RUN", "hf:HUB", "exists and is not empty"),
    "step of a directory": ("hf:HUB", "out", "a Hub directory has no steps", {"step": 3}),
    "dtype": ("hf:HUB", "out", "--dtype='float16' is not known", {"dtype": "float16"}),
    "shard": ("RUN", "hf:out", "--max_shard_size=0 must be above 0", {"max_shard_size": 0}),
    "bucket": ("RUN", "hf:gs://x", "expected a local directory"),
    "another tokenizer": ("RUN", "hf:out", "is not the one that the model", {"tokenizer": "OTHER"}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(name, tmp_path, workdir, published):
    source, out, message, *more = MISTAKES[name]
    places = {"RUN": str(workdir), "HUB": str(published), "OTHER": str(hub.write_tokenizer(tmp_path / "other"))}
    for word, place in places.items():
        source, out = source.replace(word, place), out.replace(word, place)
    out = out if "://" in out else out.replace("out", str(tmp_path / "out"))
    options = {k: places.get(v, v) if isinstance(v, str) else v for k, v in (more[0] if more else {}).items()}
    with pytest.raises(UserError, match=message):
        convert.convert(source, out, **options)
    assert not list(tmp_path.glob("out*"))


def test_what_no_architecture_computes_is_named_before_it_is_read(tmp_path):
    model = dataclasses.replace(hub.LLAMA, norm="layernorm_nobias")
    checkpoint.save_params(
        tmp_path / "odd", {"nothing": np.zeros(1)}, {"model": vars(model), "data": {"tokenizer": None}}
    )
    with pytest.raises(UserError, match="norm='layernorm_nobias'"):
        convert.convert(str(tmp_path / "odd"), f"hf:{tmp_path / 'out'}")


@pytest.fixture
def without_tokenizer(tmp_path, published):
    shutil.copytree(published, tmp_path / "hub")
    for path in (tmp_path / "hub").glob("tokenizer*"):
        path.unlink()
    return tmp_path / "hub"


def test_a_tokenizer_is_asked_for_where_one_is_needed(tmp_path, home, recipe, data, without_tokenizer):
    source = f"hf:{without_tokenizer}"
    with pytest.raises(UserError, match="--tokenizer is empty, and no tokenizer was found"):
        convert.convert(source, f"hf:{tmp_path / 'out'}")
    with pytest.raises(UserError, match="teacher.path: .* has neither a tokenizer.json nor a tokenizer.model"):
        runs.run(
            recipe, tmp_path / "run", f"--config.data.train={data}", f"--config.teacher.path={source}",
            "--config.objective.kd.weight=0.5",
        )  # fmt: skip
    convert.convert(source, str(tmp_path / "bare"))
    assert checkpoint.Saved.find(str(tmp_path / "bare")).tokenizer_fingerprint is None
    convert.convert(source, str(tmp_path / "given"), tokenizer=f"{data}/tokenizer")
    given = checkpoint.Saved.find(str(tmp_path / "given"))
    assert len(given.tokenizer_fingerprint) == 64 and (tmp_path / "given" / "tokenizer").is_dir()
    hub.write_tokenizer(tmp_path / "large", 330)
    with pytest.raises(UserError, match="has 330 pieces, more than the model's vocab_size=320"):
        convert.convert(source, str(tmp_path / "out"), tokenizer=str(tmp_path / "large"))


def test_nothing_can_be_resumed_from_it(home, recipe, data, published, tmp_path):
    with pytest.raises(UserError, match=r"has parameters alone.*give it as init.path"):
        runs.run(recipe, tmp_path, f"--config.data.train={data}", f"--config.resume.path=hf:{published}")


def test_a_student_of_another_size_is_refused(home, recipe, data, published, tmp_path):
    start = (f"--config.data.train={data}", f"--config.init.path=hf:{published}")
    with pytest.raises(UserError, match="model.vocab_size=384, but the model in .* has 320"):
        runs.run(recipe, tmp_path / "a", *start, "--config.model.vocab_size=384")
    with pytest.raises(UserError, match=r"mlp/down/kernel' has shape \(2, 64, 32\)"):
        runs.run(recipe, tmp_path / "b", *start, "--config.model.mlp_dim=32")


def test_the_verb(tmp_path, published):
    command = [sys.executable, "-m", "lmboost.convert", f"--source=hf:{published}"]
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 0 and "-> head [32, 320]" in done.stdout
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, cwd=runs.ROOT)
    assert done.returncode == 2 and "error: --out=" in done.stderr and "Traceback" not in done.stderr
    assert reader.PREFIX == "hf:" and checkpoint.find(str(tmp_path / "out")).name == "out"
