"""Real processes on one machine: the same batches and the same losses, however many there are, and across restarts."""

import json
import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest

from tests import record, runs

# Help of every kind for nearly all of 50 steps; every step is logged.
LONG = (
    "--config.steps=50", "--config.checkpoint.every=10", "--config.eval.every=25", "--config.objective.kd.stop=0.9",
    "--config.objective.align.stop=0.9", "--config.objective.select.stop=0.8",
)  # fmt: skip


@pytest.fixture(scope="module")
def one(home, recipe, data, teacher):
    """(workdir, recorded batches) of an uninterrupted run of one process with eight devices."""
    finish(runs.launch(1, 8, f"{recipe}:helped", home / "one", data, teacher, *LONG, record=home / "one-batches"))
    return home / "one", record.read(home / "one-batches")


def finish(process, status=0):
    output, _ = process.communicate(timeout=1500)  # on a busy machine
    assert process.returncode == status, output
    return output


def losses(workdir, name="loss"):
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def assert_same_run(workdir, batches, expected):
    """The batches bit for bit, the losses to 1e-4, that of the first step to 1e-6."""
    want_dir, want = expected
    assert sorted(batches) == sorted(want) == list(range(50))
    for step, batch in want.items():
        assert batch.keys() == batches[step].keys()
        for name, rows in batch.items():
            np.testing.assert_array_equal(batches[step][name], rows, err_msg=f"{name} of step {step}")
    found, wanted = losses(workdir), losses(want_dir)
    assert sorted(found) == list(range(1, 51))
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, rel=1e-4), step
    assert losses(workdir, "val_loss") == pytest.approx(losses(want_dir, "val_loss"), rel=1e-4)


def wait_for_step(process, workdir, step):
    """Until metrics.jsonl has the line of a step."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        path = pathlib.Path(workdir) / "metrics.jsonl"
        if path.exists() and re.search(rf'^{{"step": {step},', path.read_text(), re.M):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"no step {step}")


@pytest.mark.slow
@pytest.mark.parametrize("processes, mesh", [(2, ()), (4, ("--config.mesh.data=2", "--config.mesh.fsdp=4"))])
def test_any_number_of_processes_gives_the_same_run(processes, mesh, tmp_path, recipe, data, teacher, one):
    finish(
        runs.launch(
            processes, 8 // processes, f"{recipe}:helped", tmp_path / "run", data, teacher, *LONG, *mesh,
            record=tmp_path / "batches",
        )
    )  # fmt: skip
    assert_same_run(tmp_path / "run", record.read(tmp_path / "batches"), one)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_devices_and_meshes(tmp_path, recipe, data, teacher, one):
    """4 x 2, killed; 2 x 4, killed; 1 x 8."""
    arguments = (f"{recipe}:helped", tmp_path / "run", data, teacher, *LONG)
    parts = (
        (4, (), 17),
        (2, ("--config.mesh.data=4", "--config.mesh.fsdp=2"), 33),
        (1, ("--config.mesh.fsdp=4", "--config.mesh.tensor=2"), 0),
    )
    batches = {}
    for processes, mesh, kill_at in parts:
        process = runs.launch(
            processes, 8 // processes, *arguments, *mesh, record=tmp_path / f"{processes}",
            own=("--restarts=0", "--grace=0"),
        )  # fmt: skip
        if kill_at:
            wait_for_step(process, tmp_path / "run", kill_at)
            kill_children(process)
        finish(process, 128 + signal.SIGKILL if kill_at else 0)
        batches |= record.read(tmp_path / f"{processes}")
    assert_same_run(tmp_path / "run", batches, one)


def kill_children(process, number=signal.SIGKILL, which=slice(None)):
    """A signal to the training processes of a launcher, in the order in which they were started."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in sorted(map(int, children))[which]:
        os.kill(child, number)
