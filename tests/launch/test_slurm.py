"""Slurm: srun's command line, the restart rule over requeues, and the status out of many tasks."""

import re
import shlex

import pytest

from tests.launch.conftest import LAUNCH

SLURM = LAUNCH / "slurm.sh"

# Runs the tasks of this start, all at once; its status is the highest, as that of srun is.
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
highest=0 pids=()
for file in "$HOME/turn-$SLURM_RESTART_COUNT"/*; do
  SLURM_PROCID=${file##*/} TASK=$file "$@" &
  pids+=($!)
done
for pid in "${pids[@]}"; do
  wait "$pid" || { status=$?; if [ "$status" -gt "$highest" ]; then highest=$status; fi; }
done
exit "$highest"
"""
PYTHON = '#!/bin/bash\necho "${@@Q}" >>"$HOME/started"\nsource "$TASK"\n'


class Job:
    """A job of Slurm: its tasks of each start, run to the end with its requeues."""

    def __init__(self, stand_ins):
        self.home, self.stand_ins, self.errors = stand_ins.home, stand_ins, ""
        stand_ins.add("srun-recorder", "scontrol", "squeue")
        stand_ins.write("srun", SRUN.replace("#!/bin/bash\n", '#!/bin/bash\n"$HOME/bin/srun-recorder" "$@"\n'))
        stand_ins.write("python", PYTHON)
        stand_ins.answer({"squeue": ["RUNNING\n"]})

    def run(self, starts, *flags, **environment):
        """The status of the last start and how many there were; `starts` has the tasks of each."""
        for turn, tasks in enumerate(starts):
            directory = self.home / f"turn-{turn}"
            directory.mkdir()
            for i, task in enumerate(tasks):
                (directory / str(i)).write_text(task)
        environment = {"HOME": str(self.home), "SLURM_JOB_ID": "17"} | environment
        command = ["bash", SLURM, "--config=c.py", "--config.x=a b", f"--workdir={self.home}/the run", *flags]
        for turn in range(len(starts)):
            result = self.stand_ins.run(*command, SLURM_RESTART_COUNT=str(turn), **environment)
            self.errors += result.stderr
            if ["scontrol", "requeue", "17"] not in self.stand_ins.calls():
                break
        return result, turn + 1


@pytest.fixture
def job(stand_ins):
    return Job(stand_ins)


def test_srun_gets_one_task_a_gpu_that_sees_all_gpus_and_training_its_flags(job):
    result, _ = job.run([["exit 0", "exit 0"]])
    assert result.returncode == 0, result.stderr
    started = (job.home / "started").read_text().splitlines()
    train = ["-m", "lmboost.train", "--multihost", "--config=c.py", "--config.x=a b", f"--workdir={job.home}/the run"]
    assert [shlex.split(line) for line in started] == [train] * 2
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SLURM.read_text(), re.M))
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert directives["signal"].startswith("TERM@") and "requeue" in directives


@pytest.mark.parametrize("how", [["--dry-run"], []])
def test_a_dry_run_prints_srun_and_runs_nothing(job, how):
    job.run([["exit 0"]])
    command = ["bash", SLURM, "--config=it's.py", f"--workdir={job.home}/the run"]
    environment = {"HOME": str(job.home), "SLURM_JOB_ID": "17"}
    dry = job.stand_ins.run(*command, *how, **environment, DRY_RUN="" if how else "1")
    assert dry.returncode == 0 and job.stand_ins.calls() == []
    real = {"SLURM_RESTART_COUNT": "0"}
    assert job.stand_ins.run(*command, **environment, **real).returncode == 0
    recorded = job.stand_ins.calls()[0]
    assert shlex.split(dry.stdout) == ["srun", *recorded[1:]]
    assert {"--kill-on-bad-exit=1", "--gpu-bind=none"} <= set(recorded)


@pytest.mark.parametrize(
    "starts, expected, count",
    [
        ([["exit 75"] * 2, ["exit 76"] * 2, ["exit 1"], ["exit 0"] * 2], 0, 4),
        ([["exit 2", "sleep 0.2; exit 143"]], 2, 1),
        ([["sleep 0.2; exit 143", "exit 75"], ["exit 0"]], 0, 2),
        ([["exit 1"]] * 4, 1, 3),
        ([["sleep 0.2; exit 137", "exit 7"]] * 3, 7, 3),
        ([["kill -KILL $PPID"]] * 3, 137, 3),  # the task's shell is gone and leaves no status
    ],
)
def test_restart_rule(job, starts, expected, count):
    result, started = job.run(starts)
    assert (result.returncode, started) == (expected, count), result.stderr


def test_a_preemption_is_not_a_crash_and_a_new_checkpoint_begins_a_new_row(job):
    save = 'mkdir -p "$HOME/the run/checkpoints/{}"; exit 1'
    starts = [["exit 1"], ["exit 75"], [save.format(5)], [save.format("9.tmp")], ["exit 1"], ["exit 0"]]
    result, started = job.run(starts, MAX_CRASHES="3")
    assert (result.returncode, started) == (1, 5), result.stderr
    assert "3 of 3 in a row; newest checkpoint: 5" in result.stderr


def test_crashes_of_another_job_in_the_workdir_do_not_count(job):
    job.run([["exit 1"], ["exit 75"]], MAX_CRASHES="2")
    for turn in range(2):
        for file in (job.home / f"turn-{turn}").iterdir():
            file.unlink()
        (job.home / f"turn-{turn}").rmdir()
    result, started = job.run([["exit 1"], ["exit 0"]], MAX_CRASHES="2")
    assert (result.returncode, started) == (0, 2)


def test_sigterm_reaches_training_and_its_own_status_counts(job):
    save = "trap 'exit 75' TERM; kill -TERM $PPID; kill -TERM $$; sleep 5"
    result, started = job.run([[save], ["exit 0"]])
    assert (result.returncode, started) == (0, 2)
    assert "preempted; requeued" in job.errors


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", ""])
def test_a_job_that_was_cancelled_is_not_requeued(job, state):
    job.stand_ins.answer({"squeue": [state]})
    result, started = job.run([["exit 75"]])
    assert (result.returncode, started) == (75, 1)
    assert "not requeued" in result.stderr


def test_a_workdir_in_a_bucket(job):
    job.stand_ins.add("gcloud")
    listing = "gs://b/run/checkpoints/10/\ngs://b/run/checkpoints/9/\n"
    job.stand_ins.answer({"squeue": ["RUNNING\n"], "storage ls gs://b/run/checkpoints/": ["", listing]})
    result, started = job.run([["exit 1"]] * 4, "--workdir=gs://b/run", MAX_CRASHES="2")
    assert (result.returncode, started) == (1, 2), result.stderr
    assert "newest checkpoint: 10" in result.stderr
    assert not (job.home / "gs:").exists()
