"""Runs that start as a cut of a larger model (init.kind='subnet'), learn from it, and go out to the Hub's format."""

import jax
import numpy as np
import pytest

from lmboost import checkpoint
from lmboost.convert import convert
from lmboost.errors import UserError
from lmboost.surgery import subnet
from tests import hub, runs

SMALLER = ("--config.model.d_model=24", "--config.model.num_heads=1", "--config.model.head_dim=8")
UNEQUAL = ("--config.model.layer_sizes=2/1/16/40,1/1/16/64", "--config.model.d_model=24")
STILL = "--config.optimizer.learning_rate=0"  # nothing moves: the end is the start


@pytest.fixture(scope="module")
def parent(home, recipe, data):
    runs.run(recipe, home / "parent", data, "--config.model.num_layers=3")
    return str(home / "parent")


def load(directory):
    saved = checkpoint.Saved.find(str(directory))
    return saved.model, saved.load(hub.one_device())


def start(parent: str, *more: str) -> list[str]:
    return [f"--config.init.path={parent}", "--config.init.kind=subnet", *more]


@pytest.mark.parametrize("sizes", [pytest.param(SMALLER, marks=pytest.mark.slow), UNEQUAL], ids=["uniform", "unequal"])
def test_a_run_starts_with_the_first_entries(sizes, home, recipe, data, parent, tmp_path, capsys):
    flags = start(parent, "--config.init.layers=0,2", "--config.mesh.fsdp=2", STILL)
    runs.run(recipe, tmp_path / "child", data, *sizes, *flags)
    assert "init.path: width: the first 24 of 32" in capsys.readouterr().out
    (large, params), (small, child) = load(parent), load(tmp_path / "child")
    cut = subnet.first_entries(large, small, (0, 2))
    assert [layer.layer for layer in cut.layers] == [0, 2] and cut.width == tuple(range(24))
    jax.tree.map(np.testing.assert_array_equal, child, subnet.extract(large, params, cut))
    runs.run(recipe, tmp_path / "child", data, *sizes, *flags)
    assert "start: own checkpoint, step 8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cut_of_unequal_layers_learns_from_its_parent_and_is_exported(recipe, data, parent, tmp_path):
    kd = {"weight": 0.7, "ce_weight": 0.3, "temperature": 0.9, "temperature_on": "both", "handover": "constant"}
    flags = [*(f"--config.objective.kd.{k}={v}" for k, v in kd.items()), f"--config.teacher.path={parent}"]
    runs.run(recipe, tmp_path / "child", data, *UNEQUAL, *flags, *start(parent), "--config.teacher.dtype=float32")
    convert(str(tmp_path / "child"), f"hf:{tmp_path / 'hub'}", report=lambda _: None)
    (small, child), (wide, read) = load(tmp_path / "child"), load(f"hf:{tmp_path / 'hub'}")
    assert wide.layer_sizes == "" and (wide.num_heads, wide.mlp_dim) == (2, 64)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 16)).astype(np.int32)
    theirs = hub.logits(wide, read, tokens)
    np.testing.assert_allclose(theirs, hub.logits(small, child, tokens), atol=2e-6)


BAD = {
    "deeper": (["--config.model.num_layers=4"], r"model.num_layers=4, but the parent has 3"),
    "wider": (["--config.model.d_model=40"], "model.d_model=40, but the parent has 32"),
    "groups": (["--config.model.num_heads=4"], "4 query heads for each key/value head, but the parent has 2"),
    "order": (["--config.init.layers=2,0"], "layers must be named once, in the parent's order"),
    "other": (["--config.model.mlp=gelu"], "mlp is 'gelu', the parent's 'silu_gated'"),
    "count": (["--config.init.layers=0-2"], "are 3 layers, but model.num_layers=2"),
    "fresh": (["--config.init.fresh=head"], "init.fresh='head': with init.kind='subnet' all comes from the parent"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name, tmp_path, recipe, data, parent):
    overrides, message = BAD[name]
    with pytest.raises(UserError, match=message):
        runs.run(recipe, tmp_path / "run", data, *start(parent), *overrides)
