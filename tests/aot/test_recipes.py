"""Recipes compiled for TPU pods that are not here, by the verb."""

import json
import pathlib

import pytest

from lmboost import config, flops
from lmboost.aot import problems
from lmboost.models.model_config import ModelConfig
from tests.aot.process import python

pytestmark = pytest.mark.slow


def compiled(recipe: str, topology: str, tmp_path: pathlib.Path, *flags: str) -> dict:
    """What the verb writes."""
    pytest.importorskip("libtpu")
    out = tmp_path / "report.json"
    done = python("-m", "lmboost.aot", f"--config={recipe}", f"--topology={topology}", f"--out={out}", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def check(phase: dict) -> None:
    """What holds for every step on every pod."""
    memory = phase["memory"]
    assert 0 < memory["total"] < memory["limit"], memory
    assert memory["outputs"] < 0.01 * memory["arguments"] + 2**20, "the state is not donated"
    assert not {name: phase[name] for name in problems.PROBLEMS if phase[name]}


def test_a_tiny_recipe_on_a_pod(tmp_path):
    report = compiled("configs/salt_2p8b.py:tiny", "v5e-8", tmp_path, "--disk")
    c = config.load_recipe("configs/salt_2p8b.py:tiny")
    helped, alone = report["phases"]
    assert (helped["helps"], helped["end"], alone["helps"], alone["end"]) == (["kd"], alone["first"], [], c.steps)
    student = ModelConfig(**c.model)
    assert alone["flops"] == pytest.approx(flops.step_flops(student, c.batch_size, c.seq_len))
    assert helped["flops"] > alone["flops"]
    assert helped["memory"]["arguments"] > alone["memory"]["arguments"]  # the teacher's parameters
    disk = report["disk"]
    assert alone["cycles"] < disk["cycles"] < helped["cycles"] and disk["flops"] == alone["flops"]
    assert disk["memory"]["arguments"] < helped["memory"]["arguments"]
    hours = report["chip_hours"]
    assert 0 < hours["plain"] < hours["helped from disk"] < hours["helped"]
    assert hours["plain"] == pytest.approx(c.steps * alone["estimate"]["seconds"] * 8 / 3600)
    check(disk)
    for phase in report["phases"]:
        check(phase)
        # The parameters are spread over 8 chips, all but the norms: they are gathered, and gradients are summed up.
        width = {"float32": 4, "bfloat16": 2}[student.dtype]
        assert phase["collectives"]["all-gather"] > 0.9 * student.num_params() * width * 7 / 8
        assert {"all-reduce", "reduce-scatter"} & set(phase["collectives"])


def test_slices_exchange_gradients_only(tmp_path):
    flags = ("--slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=8", "--config.batch_size=32", "--phases=first")
    flags += ("--config.model.dtype=bfloat16",)  # its gradients are added up in float32 all the same
    (phase,) = compiled("configs/salt_2p8b.py:tiny", "v5e:2x4", tmp_path, *flags)["phases"]
    check(phase)
    between = {kind: n for kind, n in phase["collectives"].items() if kind.endswith("between slices")}
    assert set(between) == {"all-reduce between slices"}
    # A chip has an eighth of the gradient, in float32 at most, besides tables that it may exchange in full.
    student = ModelConfig(**config.load_recipe("configs/salt_2p8b.py:tiny").model)
    tables = 2 * student.vocab_rows * student.d_model
    assert 0 < between["all-reduce between slices"] < 1.1 * 4 * (student.num_params() / 8 + tables)


@pytest.mark.parametrize(
    "recipe, topology, budget",
    [("salt_2p8b", "v5e:16x16", 13.8), ("salt_8p6b", "v6e:16x16", 15.4), ("let_7b", "v5p:4x4x4", 15.9)],
)
def test_full_size_recipes_fit_pods(recipe, topology, budget, tmp_path):
    """The phase with the most help, in so many GiB a chip; benchmarks/pods.py compiles all phases for all of the pods.

    The budgets are 3 to 5% above what the compiler said (libtpu 0.0.42.1).
    """
    report = compiled(f"configs/{recipe}.py", topology, tmp_path, "--phases=first")
    (phase,) = report["phases"]
    assert phase["helps"] and report["devices"] == (64 if topology.startswith("v5p") else 256)
    assert phase["memory"]["total"] < budget * 2**30
    check(phase)
