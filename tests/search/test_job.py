"""The search: better than chance, compiled once, resumed to the same end, and its winner ready to be trained."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lmboost import checkpoint, config, evaluate, sharding
from lmboost.config import load
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.run import lock
from lmboost.search import evolution, fitness, notation
from lmboost.search import job as searches
from lmboost.surgery import subnet, view
from tests import hub, runs
from tests.test_compiled import topology_mesh

SEARCH = {
    "search.params": "70K-80K", "search.layers": "2-3", "search.d_model": "24-48:4", "search.num_kv_heads": "1-2",
    "search.group_heads": "1-2", "search.head_dim": "8,16", "search.mlp_dim": "8-128:8", "search.population": 8,
    "search.elites": 4, "search.candidates": 40, "search.batch": 4, "search.rows": 8, "mesh.data": 4, "mesh.fsdp": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def parent(home, recipe, data):
    """A trained run of six layers, 200,000 parameters."""
    sizes = {"num_layers": 6, "d_model": 48, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 128}
    values = {f"model.{name}": size for name, size in sizes.items()}
    values |= {"steps": 60, "checkpoint.every": 60, "eval.every": 0, "optimizer.learning_rate": 6e-3}
    runs.run(recipe, home / "parent", data, *(f"--config.{name}={value}" for name, value in values.items()))
    return str(home / "parent")


def flags(parent: str, data: str, recipe: str, workdir, **changes) -> list[str]:
    values = SEARCH | {"init.path": parent} | {k.replace("__", "."): v for k, v in changes.items()}
    return [f"--config={recipe}", f"--workdir={workdir}", data, *(f"--config.{k}={v}" for k, v in values.items())]


def run(*args, **changes):
    return searches.search(*load(flags(*args, **changes)), say=lambda *_: None)


@pytest.fixture(scope="module")
def finished(parent, data, recipe, home):
    """A finished search."""
    best = run(parent, data, recipe, home / "search")
    return home / "search", best


@pytest.fixture(scope="module")
def evaluator(parent, data, recipe):
    """(space, its fitness) of the layer-wise cuts of the trained parent."""
    changes = {"search.params": "90K-100K", "search.layers": "2-6"}
    config, _ = load(flags(parent, data, recipe, "unused", **changes))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    spec = config.data.train
    with jax.set_mesh(mesh):
        loaded = searches.load_parent(config, spec, mesh)
        space = searches.Space.from_config(config.search, loaded.model, searches.Orders.natural(loaded.model))
        hull = view.hull_config(loaded.model, searches.largest(space))
        rows = fitness.put_rows(fitness.read_rows(spec, config.seq_len, 8, mesh), mesh)
        yield space, fitness.Fitness(loaded.model, loaded.params, hull, rows, 16, 1024)


def best_of(method, evaluate, candidates: int) -> float:
    for _ in range(candidates // 16):
        cuts = method.ask()
        method.tell(cuts, evaluate(cuts))
    return method.best[1]


@pytest.mark.slow
def test_evolution_beats_as_many_random_draws_with_one_compilation(evaluator):
    space, evaluate = evaluator
    options = {"population": 16, "elites": 4, "mutation": 0.15, "crossover": 0.5, "fresh": 0.1}
    wins = 0
    for seed in range(5):
        ends = [
            best_of(evolution.Search(method=m, space=space, seed=seed, **options), evaluate, 192)
            for m in ("evolution", "random")
        ]
        wins += ends[0] < ends[1]
    assert wins >= 4, wins
    assert evaluate.losses._cache_size() == 1


def test_a_candidates_loss_is_that_of_the_extracted_model(evaluator):
    space, evaluate = evaluator
    draw = np.random.default_rng(0)
    cuts = [space.sample(draw) for _ in range(2)]
    np.testing.assert_allclose(evaluate(cuts), [evaluate.alone(cut) for cut in cuts], rtol=1e-5)


def test_the_log_has_every_candidate_in_the_bin(finished, parent):
    directory, (cut, loss) = finished
    lines = [json.loads(line) for line in (directory / "candidates.jsonl").read_text().splitlines()]
    model = checkpoint.Saved.find(parent).model
    assert [line["candidate"] for line in lines] == list(range(40))
    for line in lines:
        made = subnet.child_config(model, notation.from_json(line["cut"]))
        assert 70_000 <= line["params"] == made.num_params() <= 80_000
    best = min(lines, key=lambda line: line["loss"])
    assert (notation.from_json(best["cut"]), best["loss"]) == (cut, loss)
    assert (directory / "best.png").stat().st_size > 1000


def test_the_winner_is_a_checkpoint_and_a_config_to_train(finished, home, data):
    directory, (cut, loss) = finished
    model = checkpoint.Saved.find(str(directory / "winner")).model.validate()
    assert model.num_layers == len(cut.layers) and model.d_model == len(cut.width)
    whole = evaluate.evaluate(str(directory / "winner"), data.split("=")[1], batches=1, batch_size=8, seq_len=32)
    assert whole["val_loss"] == pytest.approx(loss, rel=1e-4)
    winner = directory / "winner.py"
    state = runs.run(str(winner), home / "trained", "--config.steps=4", "--config.eval.every=2")
    assert int(state.step) == 4
    lines = [json.loads(line) for line in (home / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert next(line["ce"] for line in lines if "ce" in line) < loss + 0.3  # it starts as the cut, not at random


@pytest.mark.slow
def test_killed_and_resumed_it_writes_the_same(finished, parent, data, recipe, home):
    directory, _ = finished
    workdir, again = home / "killed", home / "killed" / "candidates.jsonl"
    command = [sys.executable, "-m", "lmboost.search", *flags(parent, data, recipe, workdir)]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(runs.ROOT)}, cwd=runs.ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.time() + 300
    while time.time() < until and process.poll() is None and not (again.exists() and again.read_text().count("\n") > 9):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    whole = (directory / "candidates.jsonl").read_bytes()
    assert whole.startswith(again.read_bytes()) and again.stat().st_size < len(whole)
    torn = random.Random(0).randrange(len(again.read_bytes()) // 2, len(again.read_bytes()))
    again.write_bytes(again.read_bytes()[:torn])  # what a full disk or a power cut may leave
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(runs.ROOT)}, cwd=runs.ROOT, check=True)
    assert again.read_bytes() == whole
    values = [_params(place / "winner") for place in (directory, workdir)]
    jax.tree.map(np.testing.assert_array_equal, *values)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_the_evaluation_compiles_for_tpus(sizes):
    mesh = topology_mesh(sizes)
    model = ModelConfig(
        vocab_size=4096, num_layers=4, d_model=256, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=512,
        max_seq_len=256, attention="splash",
    )  # fmt: skip
    sizes = {"num_layers": 3, "d_model": 192, "num_kv_heads": 2, "group_heads": 2, "head_dim": 128, "mlp_dim": 512}
    hull = view.hull_config(model, sizes)

    def abstract(x, place):
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=place)

    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
        params = jax.tree.map(abstract, params, sharding.tree_sharding(params, mesh))
        one = view.place(model, hull, subnet.first_entries(model, hull))
        views = jax.tree.map(lambda x: abstract(np.stack([x] * 4), sharding.replicated(mesh)), one)
        rows = NamedSharding(mesh, sharding.spec((None, "batch", "length")))
        batch = {"weights": abstract(np.zeros((2, 8, 256), np.float32), rows)}
        batch |= dict.fromkeys(
            ("tokens", "targets", "segment_ids", "positions"), abstract(np.zeros((2, 8, 256), np.int32), rows)
        )
        evaluate = fitness.Fitness(model, params, hull, batch, 4, 64)
        assert evaluate.losses.lower(params, views, batch).compile().memory_analysis().temp_size_in_bytes < 100e6


def _params(directory):
    return checkpoint.Saved.find(str(directory)).load(hub.one_device())


def test_more_candidates_go_on_where_it_stopped(finished, parent, data, recipe, home):
    directory, _ = finished
    shutil.copytree(directory, home / "more")
    run(parent, data, recipe, home / "more", search__candidates=48)
    lines = (home / "more" / "candidates.jsonl").read_text()
    assert lines.startswith((directory / "candidates.jsonl").read_text()) and lines.count("\n") == 48


def test_a_search_that_was_written_under_older_names_goes_on(finished, parent, data, recipe, home):
    directory, best = finished
    shutil.copytree(directory, home / "older")
    about = json.loads((home / "older" / "search.json").read_text())
    about["config"]["init.from"] = about["config"].pop("init.path")
    (home / "older" / "search.json").write_text(json.dumps(about))
    assert run(parent, data, recipe, home / "older") == best


@pytest.mark.slow
def test_the_layers_of_a_hub_directory_are_searched(recipe, home, tmp_path):
    model = ModelConfig(
        vocab_size=hub.VOCAB, num_layers=3, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=64,
        max_seq_len=64, norm="layernorm", position="learned", mlp="gelu_tanh", qkv_bias=True, attn_out_bias=True,
        mlp_bias=True, tie_embeddings=True, dtype="float32",
    )  # fmt: skip
    hub.write(tmp_path / "hub", model)
    data = "--config.data.train=" + runs.write_data(tmp_path, tokenizer=str(tmp_path / "hub"))
    changes = {"search.params": "20K-26K", "search.group_heads": "", "search.head_dim": "", "search.layers": "1-3"}
    changes |= {"search.candidates": 8, "search.sort": "activation", "search.num_kv_heads": "1-4"}
    changes |= {"search.d_model": "16-32:4", "search.mlp_dim": "8-64:8"}
    cut, loss = run(f"hf:{tmp_path / 'hub'}", data, recipe, home / "of-hub", **changes)
    assert np.isfinite(loss) and 1 <= len(cut.layers) <= 3


BAD = {
    "no parent": ({"init.path": ""}, "init.path is empty: give the model to cut"),
    "no bin": ({"search.params": ""}, "search.params"),
    "empty bin": ({"search.params": "1M-2M"}, "search.params=1000000-2000000: no model of this search has so many"),
    "rows": ({"search.rows": 9}, "search.rows=9 must be a multiple of 8"),
    "too many rows": ({"search.rows": 8000}, "search.rows=8000, but the validation split"),
    "sizes": ({"search.mlp_dim": "129"}, "search.mlp_dim='129'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_fields_are_named(name, parent, data, recipe, tmp_path):
    changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        run(parent, data, recipe, tmp_path / "search", **changes)


def test_another_search_in_the_workdir_is_refused(finished, parent, data, recipe):
    with pytest.raises(UserError, match=r"holds another search \(search.elites: 4 -> 5\)"):
        run(parent, data, recipe, finished[0], search__elites=5)


def test_another_tokenizer_is_refused(parent, recipe, home, tmp_path):
    other = "--config.data.train=" + runs.write_data(tmp_path, seed=1, tokenizer="train:310")
    with pytest.raises(UserError, match="init.path: the model in .* was trained with another tokenizer"):
        run(parent, other, recipe, tmp_path / "search")


@pytest.mark.parametrize(
    "name", ['x"""+__import__("os").system("touch pwned")+"""', "it's", "f\u00e4lle\u2028{0}", "\\N{BULLET}"]
)
def test_a_winners_config_is_data_whatever_its_texts_are(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = config.base()
    c.update_from_flattened_dict({"init.path": name, "data.train": name, "watchdog.seconds": float("inf")})
    text = searches.RECIPE.format(parent=ascii(name), params=5, loss=1.5, values=searches._literal(c.to_dict()))
    (tmp_path / "winner.py").write_text(text, encoding="ascii")
    found = config.load_recipe(str(tmp_path / "winner.py"))
    assert (found.init.path, found.data.train, found.watchdog.seconds) == (name, name, float("inf"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["winner.py"]


def test_a_workdir_that_another_search_or_something_else_holds_is_refused(parent, data, recipe, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds notes, but no search.json"):
        run(parent, data, recipe, tmp_path)
    (tmp_path / "notes").unlink()
    in_use = pytest.raises(UserError, match="is in use by a run that is alive")
    with contextlib.closing(lock.Lock(str(tmp_path))), in_use:
        run(parent, data, recipe, tmp_path)
