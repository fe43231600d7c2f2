"""What may happen to a run on a pod, done to real processes: what is seen, what is lost, how it goes on.

Each run that was harmed ends with the parameters of one that was not, bit for bit.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

import pytest

from lmboost import checkpoint
from tests import runs
from tests.compare import losses
from tests.runs import finish, kill_children, wait_for_step

pytestmark = pytest.mark.slow
STEPS = ("--config.steps=24", "--config.checkpoint.every=4", "--config.checkpoint.keep=3", "--config.eval.every=6")


@pytest.fixture(scope="module")
def job(recipe, data, teacher):
    """launch(processes, workdir, *flags) of a helped run with eight devices."""

    def start(processes, workdir, *flags, **kwargs):
        given = (f"{recipe}:helped", workdir, data, teacher, *STEPS)
        return runs.launch(processes, 8 // processes, *given, *flags, **kwargs)

    return start


@pytest.fixture
def paced_job(job, monkeypatch):
    """`job` at a pace that leaves time to do something to it: its last ten steps take two seconds and more."""

    def start(processes, workdir, *flags, own=()):
        with monkeypatch.context() as patch:
            patch.setenv("HARM", "pace:0.2")
            return job(processes, workdir, *flags, own=("--module=tests.harm", *own))

    return start


@pytest.fixture(scope="module")
def whole(home, job):
    """{processes: workdir} of runs that nothing has happened to."""
    for processes in (1, 2):
        finish(job(processes, home / f"whole{processes}"))
    return {processes: home / f"whole{processes}" for processes in (1, 2)}


def final(workdir):
    """Fingerprints of all that a finished run has learned."""
    directory = checkpoint.find(str(workdir))
    assert directory.name == "24"
    return json.loads((directory / "position" / "metadata").read_text())["fingerprints"]


def saved(workdir):
    return sorted(int(p.name) for p in (pathlib.Path(workdir) / "checkpoints").iterdir() if p.name.isdigit())


def assert_goes_on(job, processes, workdir, whole):
    """The same command ends as if nothing had been."""
    finish(job(processes, workdir))
    assert final(workdir) == final(whole[processes])
    assert losses(workdir) == losses(whole[processes])
    assert losses(workdir, "val_loss") == losses(whole[processes], "val_loss")


def wait_for_file(path, process):
    until = time.monotonic() + 200
    while not pathlib.Path(path).exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_is_killed(victim, tmp_path, job, paced_job, whole):
    """The other one, of which 0 is the coordinator's, does not wait for ever: it ends by itself."""
    process = paced_job(2, tmp_path, "--heartbeat_timeout=10", own=("--restarts=0", "--grace=100"))
    wait_for_step(process, tmp_path, 14)
    kill_children(process, which=slice(victim, victim + 1))
    output = finish(process, 128 + signal.SIGKILL)
    assert "SIGTERM" not in output.split("ended with")[-1]
    assert saved(tmp_path)[-1] >= 8
    assert_goes_on(job, 2, tmp_path, whole)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("part", ["step", "save", "evaluate"])
def test_sigterm(part, processes, tmp_path, job, whole, monkeypatch):
    """Told to stop in a step, a save, an evaluation: it saves at the next boundary and ends with 75."""
    mark = tmp_path / "mark"
    monkeypatch.setenv("HARM", f"slow:{part}")
    monkeypatch.setenv("MARK", str(mark))
    process = job(processes, tmp_path / "run", own=("--module=tests.harm",))
    wait_for_file(f"{mark}-0", process)
    before = set(saved(tmp_path / "run"))
    process.send_signal(signal.SIGTERM)
    output = finish(process, 75)
    newest = saved(tmp_path / "run")[-1]
    assert f"saved: step {newest}" in output and newest < 24 and (newest not in before or part == "save")
    monkeypatch.delenv("HARM")
    assert_goes_on(job, processes, tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_host_stops_both(number, tmp_path, job, paced_job, whole):
    process = paced_job(2, tmp_path, "--config.checkpoint.every=1000", own=("--restarts=0",))
    wait_for_step(process, tmp_path, 9)
    kill_children(process, number, slice(1, 2))
    output = finish(process, 75)
    (newest,) = saved(tmp_path)
    assert f"saved: step {newest}" in output and 9 <= newest < 24
    assert_goes_on(job, 2, tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_spares_the_workers(number, tmp_path, recipe, data, teacher, whole):
    """SIGINT is what a terminal sends upon Ctrl-C, SIGHUP when it is closed."""
    arguments = (f"{recipe}:helped", tmp_path, data, teacher, *STEPS, "--config.data.workers=2")
    process = runs.start(*arguments)
    wait_for_step(process, tmp_path, 9)
    os.killpg(process.pid, number)
    output = finish(process, 75)
    assert f"saved: step {saved(tmp_path)[-1]}" in output and "Traceback" not in output
    finish(runs.start(*arguments))
    assert final(tmp_path) == final(whole[1])


def test_workers_end_with_a_run_that_is_killed(tmp_path, recipe, data, teacher):
    process = runs.start(f"{recipe}:helped", tmp_path, data, teacher, *STEPS, "--config.data.workers=2")
    wait_for_step(process, tmp_path, 4)
    tasks = pathlib.Path(f"/proc/{process.pid}/task").iterdir()
    workers = [pid for task in tasks for pid in (task / "children").read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    until = time.monotonic() + 60
    while left := [pid for pid in workers if runs.is_alive(int(pid))]:
        assert time.monotonic() < until, left
        time.sleep(0.2)


@pytest.mark.parametrize("what", ["all of it", "metrics.jsonl", "manifest.json", "lock"])
def test_what_is_removed_during_a_run_is_said_and_made_good(what, tmp_path, paced_job, whole):
    process = paced_job(1, tmp_path / "run", own=("--restarts=0",))
    wait_for_step(process, tmp_path / "run", 9)
    if what == "all of it":
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # in which files appear meanwhile
    else:
        (tmp_path / "run" / what).unlink()
    output = finish(process)
    assert f"WARNING: {tmp_path / 'run'}" in output and "was removed" in output
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoints", "metrics.jsonl", "manifest.json", "lock"} <= there
    assert final(tmp_path / "run") == final(whole[1])


def test_a_host_comes_late(tmp_path, recipe, data, teacher, whole):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = runs.command(f"{recipe}:helped", tmp_path, data, teacher, *STEPS)
    both = []
    for i in range(2):
        time.sleep(20 * i)
        cluster = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"]
        both.append(subprocess.Popen(flags + cluster, env=runs.environment(4), cwd=runs.ROOT))
    assert [process.wait(300) for process in both] == [0, 0]
    assert final(tmp_path) == final(whole[2])


def test_a_host_that_stands_still_for_a_while_is_waited_for(tmp_path, paced_job, whole):
    process = paced_job(2, tmp_path)
    for step in (3, 9):  # near a save, and near an evaluation
        wait_for_step(process, tmp_path, step)
        kill_children(process, signal.SIGSTOP, slice(1, 2))
        time.sleep(8)
        kill_children(process, signal.SIGCONT, slice(1, 2))
    finish(process)
    assert final(tmp_path) == final(whole[2])


def test_nobody_comes(tmp_path, recipe, data):
    cluster = ("--coordinator=localhost:1", "--num_processes=2", "--process_id=1", "--start_timeout=5")
    process = runs.start(recipe, tmp_path / "run", data, *cluster)
    output = finish(process, process.wait(100))
    assert process.returncode == -signal.SIGABRT and not (tmp_path / "run").exists()
    assert "waiting up to 5 s for all processes of the run; the first one is to listen at localhost:1" in output


def test_a_second_run_in_the_workdir_is_refused(tmp_path, job, whole):
    first = job(1, tmp_path)
    wait_for_step(first, tmp_path, 3)
    kill_children(first, signal.SIGSTOP)  # alive, but it does not end before the other one has begun
    output = finish(job(1, tmp_path), 2)
    kill_children(first, signal.SIGCONT)
    assert "is in use by a run that is alive" in output and f'"host": "{socket.gethostname()}"' in output
    finish(first)
    assert final(tmp_path) == final(whole[1])


def test_a_host_without_its_data_stops_all_with_its_message(tmp_path, job, monkeypatch):
    monkeypatch.setenv("HARM", "fail:1")
    began = time.monotonic()
    output = finish(job(2, tmp_path / "run", own=("--module=tests.harm",)), 2)
    assert "[1] error: data.train='/mnt/data': the disk is not there." in output and time.monotonic() - began < 90
    assert "error: process 1 failed in opening the data and the workdir; its own stderr says why." in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_damaged_data_ends_the_run_and_costs_nothing(tmp_path, recipe, data, teacher, whole):
    good = data.partition("=")[2]
    harmed = shutil.copytree(good, tmp_path / "data")
    arguments = (f"{recipe}:helped", tmp_path / "run", f"--config.data.train={harmed}", teacher, *STEPS)
    (shard,) = [p for p in harmed.iterdir() if "train" in p.name and p.is_file()]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    output = finish(runs.start(*arguments), 2)
    assert f"{shard} is damaged" in output and "copy the data set again" in output
    shard.unlink()
    assert f"{shard} is missing" in finish(runs.start(*arguments), 2)
    shutil.copy(pathlib.Path(good) / shard.name, shard)
    finish(runs.start(*arguments))
    assert final(tmp_path / "run") == final(whole[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_hung_step_ends_with_the_stacks_of_all_threads(processes, tmp_path, job, paced_job, whole, monkeypatch):
    """One host stands still: the other one sees no progress. Alone, the step itself takes too long."""
    flags = ["--config.watchdog.seconds=20"]
    if processes == 1:
        monkeypatch.setenv("HARM", "slow:step")
        monkeypatch.setenv("MARK", str(tmp_path / "mark"))
        flags = ["--config.watchdog.seconds=1.5"]
        finish(job(1, tmp_path / "run", "--config.steps=2", "--config.eval.every=0"))
        shutil.rmtree(tmp_path / "run")
        process = job(1, tmp_path / "run", *flags, own=("--restarts=0", "--grace=0", "--module=tests.harm"))
    else:
        process = paced_job(2, tmp_path / "run", *flags, own=("--restarts=0", "--grace=0"))
        wait_for_step(process, tmp_path / "run", 9)
        kill_children(process, signal.SIGSTOP, slice(1, 2))
    output = finish(process, 76)
    assert "HUNG: process 0 has not moved for" in output and "watchdog.seconds" in output
    assert "most recent call first" in output and "train.py" in output
    monkeypatch.delenv("HARM", raising=False)
    assert_goes_on(job, processes, tmp_path / "run", whole)


@pytest.mark.parametrize("processes", [1, 2])
def test_failed_saves_are_reported_and_tried_again(processes, tmp_path, job, whole, monkeypatch):
    monkeypatch.setenv("HARM", "save:2")
    output = finish(job(processes, tmp_path, "--config.checkpoint.retry_seconds=0.2", own=("--module=tests.harm",)))
    assert "saving the checkpoint of step 4 failed" in output and "No space left on device" in output
    assert final(tmp_path) == final(whole[processes])


FULL_DISK = """
set -e
mount -t tmpfs -o size=12m tmpfs {workdir}
head -c 12400000 /dev/zero > {workdir}/ballast
{command} &
for i in $(seq 3000); do grep -q failed {log} && break; sleep 0.1; done
rm {workdir}/ballast
wait $!
cat {workdir}/checkpoints/24/position/metadata > {out}
"""


def test_a_full_disk_does_not_end_the_run(tmp_path, recipe, data, teacher, whole):
    """Full when the run begins to write; when there is room (four times what it needs), all that was due is saved."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    workdir, log, out = tmp_path / "small", tmp_path / "log", tmp_path / "position"
    workdir.mkdir()
    command = runs.command(f"{recipe}:helped", workdir, data, teacher, *STEPS, "--config.checkpoint.retry_seconds=0.3")
    script = FULL_DISK.format(workdir=workdir, log=log, out=out, command=" ".join(f"'{c}'" for c in command))
    with open(log, "w") as file:
        done = subprocess.run(
            ["unshare", "-rm", "bash", "-c", script], env=runs.environment(), stdout=file, stderr=file
        )
    output = log.read_text()
    assert done.returncode == 0 and "finished: 24 steps" in output, output
    assert "WARNING: saving the checkpoint of step" in output
    assert json.loads(out.read_text())["fingerprints"] == final(whole[1])


def test_two_hosts_that_die_now_and_then(tmp_path, job, whole, monkeypatch):
    """Either of them, at any moment, by SIGKILL or SIGTERM; each time both start again."""
    monkeypatch.setenv("HARM", "die:5")
    flags = ("--config.checkpoint.every=2", "--heartbeat_timeout=10")
    process = job(2, tmp_path, *flags, own=("--module=tests.harm", "--max_crashes=50", "--pause=0", "--grace=20"))
    output = finish(process)
    assert "restart 2 in" in output
    assert final(tmp_path) == final(whole[2]) and losses(tmp_path) == losses(whole[2])
