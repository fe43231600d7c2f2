"""Runs that start with layers of another model, and the rounds of Inheritune."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmboost import checkpoint, sharding
from lmboost.config import load
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.transformer import ModelConfig
from lmboost.surgery import grow
from tests import runs

DEPTH = "--config.model.num_layers=4"


@pytest.fixture(scope="module")
def reference(home, recipe, data):
    runs.run(recipe, home / "reference", data, DEPTH)
    return str(home / "reference")


def params_of(directory):
    found = checkpoint.find(str(directory))
    model = ModelConfig(**checkpoint.read_manifest(found)["model"])
    like = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    return checkpoint.load_params(found, like, sharding.make_mesh(devices=jax.devices()[:1]))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_inherits_layers_and_goes_on_where_it_stopped(home, recipe, data, reference, capsys):
    still = ["--config.optimizer.learning_rate=0", "--config.mesh.fsdp=2"]  # nothing moves: the end is the start
    start = [f"--config.init.from={reference}", "--config.init.kind=inherit", "--config.init.layers=0,3"]
    runs.run(recipe, home / "child", data, *start, *still)
    said = capsys.readouterr().out
    assert "init.from: layers: of the parent's 0,3" in said and "init.from: embedding: inherited" in said
    parent, child = params_of(reference), params_of(home / "child")
    same(child["layers"], jax.tree.map(lambda x: x[np.array([0, 3])], parent["layers"]))
    same({k: v for k, v in child.items() if k != "layers"}, {k: v for k, v in parent.items() if k != "layers"})
    runs.run(recipe, home / "child", data, *start, *still)
    assert "start: own checkpoint, step 8" in capsys.readouterr().out


def test_stacking_and_fresh_parts(home, recipe, data, reference):
    start = [f"--config.init.from={reference}", "--config.init.kind=stack", "--config.init.layers=0-1"]
    more = [DEPTH, "--config.init.fresh=head", "--config.optimizer.learning_rate=0"]
    runs.run(recipe, home / "stacked", data, *start, *more)
    parent, child = params_of(reference), params_of(home / "stacked")
    same(child["layers"], jax.tree.map(lambda x: x[np.array([0, 1, 0, 1])], parent["layers"]))
    same(child["embed"], parent["embed"])
    assert np.abs(np.asarray(child["head"]) - np.asarray(parent["head"])).max() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.init.kind=inherit"], "init.kind='inherit', but init.from is empty"),
        (["--config.init.from=REFERENCE", "--config.init.kind=inherits"], r"did you mean 'inherit'\?"),
        (["--config.init.from=REFERENCE", "--config.init.layers=0-1"], "need init.kind='inherit' or 'stack'"),
        (["--config.init.from=REFERENCE", "--config.init.kind=inherit", "--config.model.num_layers=5"], "4 of the par"),
        (["--config.init.from=REFERENCE", "--config.init.step=3"], "init.from='.*', step 3: it has steps"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, recipe, data, reference, overrides, message):
    overrides = [o.replace("REFERENCE", reference) for o in overrides]
    with pytest.raises(UserError, match=message):
        runs.run(recipe, tmp_path / "run", data, *overrides)


def test_rounds_until_the_reference_is_met(tmp_path, recipe, data, reference):
    def rounds(target):
        workdir = tmp_path / f"grown{target}"
        config, _ = load([f"--config={recipe}", f"--workdir={workdir}", data])  # of two layers; the reference has four
        layers = grow.grow(config, str(workdir), reference, by=1, target=target, say=lambda *_: None)
        return (
            layers,
            json.loads((workdir / "rounds.json").read_text()),
            sorted(p.name for p in workdir.glob("layers*")),
        )

    layers, log, runs_made = rounds(100.0)
    assert layers == 2 and runs_made == ["layers-2"] and log[0]["val_loss"] < 100
    layers, log, runs_made = rounds(0.0)
    assert layers == 4 and runs_made == ["layers-2", "layers-3", "layers-4"]
    assert rounds(0.0) == (layers, log, runs_made)  # nothing is trained again
    config, _ = load([f"--config={recipe}", "--workdir=x", data, DEPTH])
    own = [json.loads(line) for line in open(f"{reference}/metrics.jsonl")]
    last = [line["val_loss"] for line in own if line.get("val_loss")][-1]
    np.testing.assert_allclose(grow.reference_loss(config, reference), last, rtol=1e-5)


def test_grow_names_what_does_not_fit(tmp_path, recipe, data, reference):
    config, _ = load([f"--config={recipe}", f"--workdir={tmp_path}", data, DEPTH])
    for arguments, message in (
        ({"first": 5}, "the reference has 4 layers"),
        ({"by": 0}, "--by=0"),
        ({"last": 9}, "--last=9"),
    ):
        with pytest.raises(UserError, match=message):
            grow.grow(config, str(tmp_path / "grown"), reference, target=100.0, say=lambda *_: None, **arguments)


def test_the_rank_verb_writes_table_numbers_and_plot(tmp_path, reference):
    command = [sys.executable, "-m", "lmboost.surgery", "rank", f"--checkpoint={reference}", f"--out={tmp_path}"]
    subprocess.run([*command, "--rows=8", "--tokens=16"], cwd=runs.ROOT, check=True)
    numbers = json.loads((tmp_path / "rank.json").read_text())
    assert np.shape(numbers["rank"]) == np.shape(numbers["columns"]) == (4, 2)
    assert "To inherit: layers 0 to" in (tmp_path / "rank.md").read_text()
    assert (tmp_path / "rank.png").stat().st_size > 5_000
    done = subprocess.run([*command, "--rows=8000"], cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Ask for fewer or shorter ones" in done.stderr
