"""Real processes on one machine: the same batches and the same losses, however many there are, and across restarts."""

import signal

import numpy as np
import pytest

from tests import record, runs
from tests.compare import losses
from tests.runs import finish, kill_children, wait_for_step

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


@pytest.mark.slow
def test_a_run_with_help_from_disk_goes_on_with_other_processes(tmp_path, recipe, data, teacher):
    """What two processes have asked for; 2 x 4, killed while it helps; 1 x 8."""
    from lmboost import score
    from lmboost.config import read

    flags = (data, "--config.objective.kd.stop=0.9", *LONG[:1], *LONG[4:])
    score.score(*read([f"--config={recipe}:helped", f"--out={tmp_path / 'said'}", teacher, *flags], score.Flags))
    known = f"--config.teacher.targets={tmp_path / 'said'}"
    arguments = (f"{recipe}:helped", tmp_path / "run", data, known, *LONG)
    finish(runs.launch(1, 8, f"{recipe}:helped", tmp_path / "one", data, known, *LONG, record=tmp_path / "batches"))
    process = runs.launch(2, 4, *arguments, record=tmp_path / "two", own=("--restarts=0", "--grace=0"))
    wait_for_step(process, tmp_path / "run", 17)
    kill_children(process)
    finish(process, 128 + signal.SIGKILL)
    finish(runs.launch(1, 8, *arguments, record=tmp_path / "last"))
    expected = record.read(tmp_path / "batches")
    assert {"soft_ids", "soft_values", "teacher_loss", "score"} < expected[0].keys()
    assert_same_run(
        tmp_path / "run", record.read(tmp_path / "two") | record.read(tmp_path / "last"), (tmp_path / "one", expected)
    )


@pytest.mark.slow
def test_help_that_ends_by_itself_ends_at_the_same_step(tmp_path, recipe, data, teacher):
    """Of two processes as of one: each finds it out for itself, and all have to come to the same."""
    arguments = (
        data, teacher, "--config.steps=16", "--config.objective.kd.stop=auto", "--config.objective.kd.handover=linear",
        "--config.objective.align.stop=auto", "--config.objective.auto.end=0.3",
    )  # fmt: skip
    runs.run(f"{recipe}:helped", tmp_path / "one", *arguments)
    finish(runs.launch(2, 4, f"{recipe}:helped", tmp_path / "two", *arguments))
    ended = losses(tmp_path / "one", "help_ended")
    assert ended == losses(tmp_path / "two", "help_ended") and 4 < len(ended) < 14
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_processes_read_the_same_rows_of_another_tokenizer(tmp_path, recipe, data, other):
    for count in (1, 2):
        arguments = (f"{recipe}:helped", tmp_path / f"run{count}", data, other, "--config.data.workers=1")
        finish(runs.launch(count, 8 // count, *arguments, record=tmp_path / f"batches{count}"))
    one, two = (record.read(tmp_path / f"batches{count}") for count in (1, 2))
    assert sorted(one) == sorted(two) == list(range(8))
    for step, batch in one.items():
        assert ("teacher_chunks" in batch) == (step < 4), "while the teacher helps"
        for name, rows in batch.items():
            np.testing.assert_array_equal(two[step][name], rows, err_msg=f"{name} of step {step}")
    assert losses(tmp_path / "run2") == pytest.approx(losses(tmp_path / "run1"), rel=1e-4)
