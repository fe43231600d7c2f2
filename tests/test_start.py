"""Runs that start with layers of another model, checkpoints that are made of them, and the rounds of Inheritune."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmboost import checkpoint, convert, evaluate, rounds, standalone
from lmboost.config import load
from lmboost.errors import UserError
from tests import hub, runs
from tests.compare import assert_same

DEPTH = "--config.model.num_layers=4"


@pytest.fixture(scope="module")
def reference(home, recipe, data):
    runs.run(recipe, home / "reference", data, DEPTH)
    return str(home / "reference")


def params_of(directory):
    return checkpoint.Saved.find(str(directory)).load(hub.one_device())


def test_a_run_inherits_layers_and_goes_on_where_it_stopped(home, recipe, data, reference, capsys):
    still = ["--config.optimizer.learning_rate=0", "--config.mesh.fsdp=2"]  # nothing moves: the end is the start
    start = [f"--config.init.path={reference}", "--config.init.kind=inherit", "--config.init.layers=0,3"]
    runs.run(recipe, home / "child", data, *start, *still)
    said = capsys.readouterr().out
    assert "init.path: layers: of the parent's 0,3" in said and "init.path: embedding: inherited" in said
    parent, child = params_of(reference), params_of(home / "child")
    assert_same(child["layers"], jax.tree.map(lambda x: x[np.array([0, 3])], parent["layers"]))
    assert_same({k: v for k, v in child.items() if k != "layers"}, {k: v for k, v in parent.items() if k != "layers"})
    runs.run(recipe, home / "child", data, *start, *still)
    assert "start: own checkpoint, step 8" in capsys.readouterr().out


@pytest.mark.slow
def test_stacking_and_fresh_parts(home, recipe, data, reference):
    start = [f"--config.init.path={reference}", "--config.init.kind=stack", "--config.init.layers=0-1"]
    more = [DEPTH, "--config.init.fresh=head", "--config.optimizer.learning_rate=0"]
    runs.run(recipe, home / "stacked", data, *start, *more)
    parent, child = params_of(reference), params_of(home / "stacked")
    assert_same(child["layers"], jax.tree.map(lambda x: x[np.array([0, 1, 0, 1])], parent["layers"]))
    assert_same(child["embed"], parent["embed"])
    assert np.abs(np.asarray(child["head"]) - np.asarray(parent["head"])).max() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.init.kind=inherit"], "init.kind='inherit', but init.path is empty"),
        (["--config.init.path=REFERENCE", "--config.init.kind=inherits"], r"did you mean 'inherit'\?"),
        (["--config.init.path=REFERENCE", "--config.init.layers=0-1"], "need init.kind='inherit', 'stack' or"),
        (["--config.init.path=REFERENCE", "--config.init.kind=inherit", "--config.model.num_layers=5"], "4 of the par"),
        (["--config.init.path=REFERENCE", "--config.init.step=3"], "init.path='.*', step 3: it has steps"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, recipe, data, reference, overrides, message):
    overrides = [o.replace("REFERENCE", reference) for o in overrides]
    with pytest.raises(UserError, match=message):
        runs.run(recipe, tmp_path / "run", data, *overrides)


def manifest_of(directory):
    return checkpoint.Saved.find(str(directory)).manifest


@pytest.mark.slow
def test_a_checkpoint_of_layers_is_what_a_run_starts_with(home, recipe, data, reference):
    """Random parts, too, are those of a run with the same seed."""
    said = []
    some = {"layers": "0,3", "fresh": "head,final_norm", "seed": 5}
    convert.convert(reference, str(home / "made"), **some, report=said.append)
    assert said == [
        "layers: of the parent's 0,3", "embedding: inherited", "final_norm: random", "head: random",
        f"{reference} -> {home / 'made'}",
    ]  # fmt: skip
    start = [f"--config.init.path={reference}", "--config.init.kind=inherit", "--config.init.layers=0,3"]
    more = ["--config.init.fresh=head,final_norm", "--config.seed=5", "--config.optimizer.learning_rate=0"]
    runs.run(recipe, home / "by-run", data, *start, *more, "--config.steps=2")
    assert_same(params_of(home / "made"), params_of(home / "by-run"))
    manifest = manifest_of(home / "made")
    assert manifest["model"] == manifest_of(reference)["model"] | {"num_layers": 2}
    assert manifest["data"] == {"tokenizer": manifest_of(reference)["data"]["tokenizer"]}
    assert manifest["source"] == {
        "directory": str(checkpoint.find(reference)), "kind": "inherit", "layers": "0,3",
        "fresh": ["final_norm", "head"], "seed": 5,
    }  # fmt: skip


@pytest.mark.slow
def test_all_layers_are_the_parent_and_it_stands_wherever_a_checkpoint_can(home, recipe, data, reference):
    convert.convert(reference, str(home / "whole"), layers="0-3", report=lambda _: None)
    assert_same(params_of(home / "whole"), params_of(reference))
    spec = data.removeprefix("--config.data.train=")
    expected = evaluate.evaluate(reference, batches=2, seq_len=32)
    assert evaluate.evaluate(str(home / "whole"), spec, batches=2, seq_len=32) == expected
    convert.convert(str(home / "whole"), f"hf:{home / 'published'}", report=lambda _: None)
    assert_same(params_of(f"hf:{home / 'published'}"), params_of(reference))
    still = [f"--config.init.path={home / 'whole'}", "--config.optimizer.learning_rate=0", "--config.steps=2"]
    runs.run(recipe, home / "trained-on", data, DEPTH, *still)
    assert_same(params_of(home / "trained-on"), params_of(reference))


@pytest.mark.slow
def test_layers_of_a_hub_directory(tmp_path):
    params = hub.write(tmp_path / "hub", dataclasses.replace(hub.LLAMA, num_layers=3, vocab_multiple=8))
    convert.convert(f"hf:{tmp_path / 'hub'}", str(tmp_path / "out"), layers="0,2", report=lambda _: None)
    child = params_of(tmp_path / "out")
    assert_same(child["layers"], jax.tree.map(lambda x: x[np.array([0, 2])], params["layers"]))
    assert_same(child["embed"]["embedding"], params["embed"]["embedding"][: hub.VOCAB])
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()
    assert manifest_of(tmp_path / "out")["data"] == manifest_of(f"hf:{tmp_path / 'hub'}")["data"]
    convert.convert(f"hf:{tmp_path / 'hub'}", f"hf:{tmp_path / 'back'}", layers="0,2", report=lambda _: None)
    assert_same(params_of(f"hf:{tmp_path / 'back'}"), child)


@pytest.mark.slow
def test_layers_in_another_dtype_with_a_part_at_random(tmp_path):
    """What is inherited is rounded once, what is drawn too."""
    params, out = hub.write(tmp_path / "hub", hub.LLAMA), str(tmp_path / "out")
    some = {"layers": "1", "fresh": "head", "dtype": "bfloat16"}
    convert.convert(f"hf:{tmp_path / 'hub'}", out, **some, report=lambda _: None)
    saved = checkpoint.Saved.find(out)
    stored = checkpoint.tree_metadata(saved.directory, "params")
    assert {str(x.dtype) for x in jax.tree.leaves(stored)} == {"bfloat16"}
    child = jax.device_get(saved.load(hub.one_device(), "bfloat16"))
    assert_same(child["layers"], jax.tree.map(lambda x: np.asarray(x[1:2], "bfloat16"), params["layers"]))
    assert np.abs(child["head"] - np.asarray(params["head"], "bfloat16")).max() > 1e-3


@pytest.mark.slow
def test_layers_of_unequal_sizes(tmp_path):
    model = dataclasses.replace(hub.LLAMA, num_layers=4, layer_sizes="4/2/8/48,2*2/1/8/32,4/2/8/40").validate()
    params = hub.random_params(model)
    manifest = {"model": dataclasses.asdict(model), "data": {"tokenizer": None}}
    checkpoint.save_params(tmp_path / "parent", params, manifest)
    convert.convert(str(tmp_path / "parent"), str(tmp_path / "out"), layers="1-3", report=lambda _: None)
    child, made = params_of(tmp_path / "out"), manifest_of(tmp_path / "out")["model"]
    assert_same(child["layers"], {"0": params["layers"]["1"], "1": params["layers"]["2"]})
    assert made == manifest["model"] | {"num_layers": 3, "layer_sizes": "2*2/1/8/32,4/2/8/40", "mlp_dim": 40}
    done = verb("rank", f"--checkpoint={tmp_path / 'out'}", f"--out={tmp_path / 'rank'}")
    assert done.returncode == 2 and "has layers of 2, 4 heads" in done.stderr and "Traceback" not in done.stderr


def verb(name, *arguments):
    command = [sys.executable, "-m", f"lmboost.{name}", *arguments]
    return subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "0-4"}, "--layers='0-4': there is no layer 4; the parent has layers 0 to 3"),
        ({"layers": "2,1"}, "--layers='2,1': layers must be named once, in the parent's order"),
        ({"layers": "1,1"}, "--layers='1,1': layers must be named once"),
        ({"layers": ","}, "--layers=',': '' is neither a layer nor a range"),
        ({"layers": "", "fresh": "head"}, "--source='.*' and --out='.*' are both checkpoints"),
        ({"layers": "", "fresh": "head", "out": "hf:out"}, "--fresh='head' needs --layers"),
        ({"fresh": "heads"}, r"--fresh='heads' is not known \(did you mean 'head'\?\)"),
        ({"step": 3}, "--source='.*', step 3: it has steps"),
        ({"source": "/nowhere"}, "--source='/nowhere' is neither a run"),
        ({"out": "REFERENCE"}, "exists and is not empty"),
        ({"tokenizer": "OTHER"}, "is not the one that the model"),
    ],
)
def test_what_no_checkpoint_is_made_of_is_named(tmp_path, reference, changes, message):
    fields = {"source": reference, "layers": "0-1", "out": str(tmp_path / "out")} | changes
    if changes.get("tokenizer"):
        fields["tokenizer"] = str(hub.write_tokenizer(tmp_path / "other"))
    fields["out"] = fields["out"].replace("REFERENCE", reference)
    with pytest.raises(UserError, match=message):
        convert.convert(**fields)
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_nothing(tmp_path, reference, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(standalone.tokenizer_files, "copy", full)
    with pytest.raises(UserError, match=f"no space left for {tmp_path / 'out'}"):
        convert.convert(reference, str(tmp_path / "out"), layers="0-1")
    assert not list(tmp_path.iterdir())


def test_the_verb(tmp_path, reference):
    command = ["convert", f"--source={reference}", "--layers=0-1", f"--out={tmp_path / 'out'}", "--step=6"]
    done = verb(*command)
    assert done.returncode == 0 and done.stdout.startswith("layers: of the parent's 0-1\nembedding: inherited\n")
    done = verb(*command)
    assert done.returncode == 2 and "error: --out=" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("old", "new"), [("grow", "rounds"), ("rank", "rank"), ("inherit", "convert")])
def test_the_old_verbs_name_the_new_ones(old, new):
    done = verb("surgery", old, "--anything=1")
    assert done.returncode == 2 and done.stderr.count("python -m lmboost.") == 1 and done.stdout == ""
    assert f"python -m lmboost.{new} " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_rounds_until_the_reference_is_met(tmp_path, recipe, data, reference):
    def until(target):
        workdir = tmp_path / f"grown{target}"
        flags = [f"--config={recipe}", f"--workdir={workdir}", data]  # of two layers; the reference has four
        rounds.main([*flags, f"--reference={reference}", "--by=1", f"--target={target}"])
        log = json.loads((workdir / "rounds.json").read_text())
        return log[-1]["layers"], log, sorted(p.name for p in workdir.glob("layers*"))

    layers, log, runs_made = until(100.0)
    assert layers == 2 and runs_made == ["layers-2"] and log[0]["val_loss"] < 100
    layers, log, runs_made = until(0.0)
    assert layers == 4 and runs_made == ["layers-2", "layers-3", "layers-4"]
    assert until(0.0) == (layers, log, runs_made)  # nothing is trained again
    config, _ = load([f"--config={recipe}", "--workdir=x", data, DEPTH])
    own = [json.loads(line) for line in open(f"{reference}/metrics.jsonl")]
    last = [line["val_loss"] for line in own if line.get("val_loss")][-1]
    np.testing.assert_allclose(rounds.reference_loss(config, reference), last, rtol=1e-5)


def test_grow_names_what_does_not_fit(tmp_path, recipe, data, reference):
    config, _ = load([f"--config={recipe}", f"--workdir={tmp_path}", data, DEPTH])
    for arguments, message in (
        ({"first": 5}, "the reference has 4 layers"),
        ({"by": 0}, "--by=0"),
        ({"last": 9}, "--last=9"),
    ):
        with pytest.raises(UserError, match=message):
            rounds.grow(config, str(tmp_path / "grown"), reference, target=100.0, say=lambda *_: None, **arguments)


def test_the_rank_verb_writes_table_numbers_and_plot(tmp_path, reference):
    command = ["rank", f"--checkpoint={reference}", f"--out={tmp_path}"]
    assert verb(*command, "--rows=8", "--tokens=16").returncode == 0
    numbers = json.loads((tmp_path / "rank.json").read_text())
    assert np.shape(numbers["rank"]) == np.shape(numbers["columns"]) == (4, 2)
    assert "To inherit: layers 0 to" in (tmp_path / "rank.md").read_text()
    assert (tmp_path / "rank.png").stat().st_size > 5_000
    done = verb(*command, "--rows=8000")
    assert done.returncode == 2 and "Ask for fewer or shorter ones" in done.stderr
