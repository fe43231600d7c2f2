"""The launcher of several processes on one machine: restart rule, statuses, signals, output; with a fake training."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

LOCAL = pathlib.Path(__file__).parents[2] / "launch" / "local.py"

# Appends what it was given to log.jsonl and then does what the scenario says for this attempt and this process.
FAKE = """
import json, os, signal, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if "=" in a)
here, index = flags["home"], int(flags.get("process_id", 0))
with open(f"{here}/count-{index}", "a") as counter:
    counter.write("x")
    attempt = counter.tell() - 1
parent = os.getppid()
with open(f"{here}/log.jsonl", "a") as log:
    log.write(json.dumps({
        "attempt": attempt, "index": index, "argv": sys.argv[1:], "pid": os.getpid(), "time": time.time(),
        "environment": {n: os.environ.get(n) for n in ("XLA_FLAGS", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")},
        "fds": len(os.listdir(f"/proc/{parent}/fd")), "threads": len(os.listdir(f"/proc/{parent}/task")),
        "children": len(open(f"/proc/{parent}/task/{parent}/children").read().split()),
    }) + "\\n")
scenario = json.load(open(f"{here}/scenario.json"))
exec(scenario[min(attempt, len(scenario) - 1)][index])
"""


class Fake:
    """A directory with a scenario: for each attempt the code of each process; the last attempt's repeats."""

    def __init__(self, home: pathlib.Path):
        self.home = home
        (home / "fake_training.py").write_text(FAKE)
        self.environment = os.environ | {"PYTHONPATH": str(home)}

    def start(self, scenario, *flags, stderr=subprocess.PIPE, **environment):
        (self.home / "scenario.json").write_text(json.dumps(scenario))
        command = [sys.executable, str(LOCAL), "--module=fake_training", f"--processes={len(scenario[0])}", "--pause=0"]
        return subprocess.Popen(
            [*command, f"--home={self.home}", f"--workdir={self.home}/run", *flags], text=True,
            stdout=subprocess.PIPE, stderr=stderr, env=self.environment | environment,
        )  # fmt: skip

    def run(self, scenario, *flags, **environment):
        process = self.start(scenario, *flags, **environment)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def log(self):
        return [json.loads(line) for line in (self.home / "log.jsonl").read_text().splitlines()]

    def attempts(self):
        return 1 + max(entry["attempt"] for entry in self.log())

    def wait_for(self, name):
        deadline = time.monotonic() + 60
        while not (self.home / name).exists():
            assert time.monotonic() < deadline, f"{name} was not written"
            time.sleep(0.02)


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


def alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def checkpoint(step) -> str:
    return f"os.makedirs(f'{{here}}/run/checkpoints/{step}', exist_ok=True)"


EXIT = {status: f"sys.exit({status})" for status in (0, 1, 2, 3, 75, 76)}
CRASH = "os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open(f'{here}/hangs-{index}', 'w'); time.sleep(60)"
SAVE = """
signal.signal(signal.SIGTERM, lambda *_: (open(f"{here}/got-{index}", "a").write("t"), sys.exit(75)))
open(f"{here}/ready-{index}", "w")
time.sleep(60)
"""


# ------------------------------------------------------------------ statuses and restarts


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "statuses, expected",
    [((0,), 0), ((2, 0), 2), ((75, 0), 0), ((76, 0), 0), ((1, 0), 0), ((75, 76, 75, 1, 76, 0), 0), ((1, 1, 3), 3)],
)
def test_restart_rule(fake, processes, statuses, expected):
    status, _, errors = fake.run([[EXIT[s]] * processes for s in statuses], "--max_crashes=3")
    assert status == expected, errors
    assert fake.attempts() == len(statuses) - (2 in statuses)


def test_crashes_that_bring_new_checkpoints_go_on_and_unfinished_ones_do_not_count(fake):
    finished = [[checkpoint(step) + ";" + EXIT[1]] for step in (5, 10, 15, 20)]
    unfinished = [[checkpoint("25.orbax-checkpoint-tmp-1") + ";" + checkpoint(20) + ";" + CRASH]] * 3
    status, _, errors = fake.run(finished + unfinished, "--max_crashes=2")
    assert (status, fake.attempts()) == (128 + signal.SIGSEGV, 5), errors  # 20 and the one after it are two in a row
    assert "2 crashes in a row without a new checkpoint" in errors


def test_a_preemption_between_crashes_is_no_progress(fake):
    status, _, _ = fake.run([[EXIT[1]], [EXIT[75]], [EXIT[1]], [EXIT[0]]], "--max_crashes=2")
    assert (status, fake.attempts()) == (1, 3)


def test_pause_doubles_with_each_crash_and_there_is_none_after_a_preemption(fake):
    status, _, errors = fake.run([[EXIT[1]], [EXIT[1]], [EXIT[75]], [EXIT[0]]], "--pause=0.3")
    times = [entry["time"] for entry in fake.log()]
    first, second, _ = (b - a for a, b in zip(times, times[1:], strict=False))
    assert status == 0 and 0.3 <= first and 0.6 <= second
    assert all(f"restart {n} in {pause} s" in errors for n, pause in ((1, "0.3"), (2, "0.6"), (3, "0")))


def test_restarts_limits_restarts_of_every_kind(fake):
    status, _, errors = fake.run([[EXIT[75]]], "--restarts=2")
    assert (status, fake.attempts()) == (75, 3)
    assert "no restart after 2" in errors


@pytest.mark.parametrize(
    "first, later, expected",
    [
        (EXIT[1], EXIT[75], 1),
        (EXIT[75], EXIT[1], 75),
        (EXIT[76], CRASH, 76),
        (EXIT[1], EXIT[2], 2),
        (CRASH, CRASH, 139),
    ],
)
def test_the_first_process_to_fail_gives_the_status_and_2_wins(fake, first, later, expected):
    wait = "\nwhile 'process 1 ended' not in open(f'{here}/said').read(): time.sleep(0.01)\n"
    with open(fake.home / "said", "w") as said:  # what the launcher has seen
        launcher = fake.start([[wait + later, first, EXIT[0]]], "--restarts=0", "--max_crashes=1", stderr=said)
        assert launcher.wait(timeout=60) == expected


def test_checkpoints_in_a_bucket_are_listed_with_gcloud(fake):
    tools = fake.home / "bin"
    tools.mkdir()
    (tools / "gcloud").write_text(
        f'#!/bin/bash\n[ "$*" = "storage ls gs://b/run/checkpoints/" ] && cat "{fake.home}/listing"\n'
    )
    (tools / "gcloud").chmod(0o755)
    (fake.home / "listing").write_text("gs://b/run/checkpoints/\n")
    two_saves = "open(f'{here}/listing', 'a').write(f'gs://b/run/checkpoints/{min(attempt, 1) * 5 + 5}/\\n');" + EXIT[1]
    path = f"{tools}:{os.environ['PATH']}"
    status, _, errors = fake.run([[two_saves]], "--max_crashes=2", "--workdir=gs://b/run", PATH=path)
    assert (status, fake.attempts()) == (1, 3)
    assert "newest checkpoint: 10" in errors


# ------------------------------------------------------------------ what processes get and write


def test_processes_get_their_flags_and_a_new_port_each_attempt(fake):
    status, _, _ = fake.run([[EXIT[75]] * 2] * 3 + [[EXIT[0]] * 2], "--config.name=a 'b' $c")
    assert status == 0
    ports = set()
    for entry in fake.log():
        *given, coordinator, count, index = entry["argv"]
        assert given == [f"--home={fake.home}", f"--workdir={fake.home}/run", "--config.name=a 'b' $c"]
        assert (count, index) == ("--num_processes=2", f"--process_id={entry['index']}")
        assert coordinator.startswith("--coordinator=localhost:")
        ports.add((entry["attempt"], coordinator))
    assert len(ports) == 4  # both processes of an attempt have the same
    assert len({port for _, port in ports}) > 1


def test_one_process_gets_no_flags_of_a_cluster_and_simulated_devices_replace_inherited_ones(fake):
    inherited = "--xla_dump_to=/nowhere --xla_force_host_platform_device_count=8"
    status, _, _ = fake.run([[EXIT[0]]], "--devices=4", XLA_FLAGS=inherited, JAX_PLATFORMS="tpu")
    entry = fake.log()[0]
    assert status == 0 and entry["argv"] == [f"--home={fake.home}", f"--workdir={fake.home}/run"]
    assert entry["environment"]["JAX_PLATFORMS"] == "cpu"
    assert entry["environment"]["XLA_FLAGS"] == "--xla_dump_to=/nowhere --xla_force_host_platform_device_count=4"


def test_each_process_gets_a_gpu_of_its_own(fake):
    status, _, _ = fake.run([[EXIT[0]] * 2], "--gpus", CUDA_VISIBLE_DEVICES="3,5")
    assert status == 0
    assert {e["index"]: e["environment"]["CUDA_VISIBLE_DEVICES"] for e in fake.log()} == {0: "3", 1: "5"}


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_of_other_processes_are_prefixed_and_never_mixed(fake, unbuffered):
    lines = "\nfor i in range(200):\n  print(f'line {i} of {index}', flush=i % 7 == 0)\n"
    errors_too = "print('error of', index, file=sys.stderr)\nprint('half\\rof', index, end='\\n' if index == 0 else '')"
    status, output, errors = fake.run([[lines + errors_too] * 3], PYTHONUNBUFFERED=unbuffered)
    assert status == 0
    for i, prefix in enumerate(["", "[1] ", "[2] "]):
        mine = [line for line in output.splitlines() if line.endswith(f"of {i}")]
        assert mine == [f"{prefix}line {k} of {i}" for k in range(200)] + [f"{prefix}of {i}"]
        assert f"{prefix}error of {i}" in errors.splitlines()
    assert {"[1] half", "[2] half"} <= set(output.splitlines())


def test_dry_run_prints_the_commands_and_starts_nothing(fake):
    status, output, _ = fake.run(
        [[EXIT[0]] * 2], "--dry-run", "--devices=2", "--port=1234", "--config.x=a b", XLA_FLAGS=""
    )
    assert status == 0 and not (fake.home / "log.jsonl").exists()
    common = [sys.executable, "-m", "fake_training", f"--home={fake.home}", f"--workdir={fake.home}/run"]
    environment = ["env", "XLA_FLAGS=--xla_force_host_platform_device_count=2", "JAX_PLATFORMS=cpu"]
    cluster = ["--config.x=a b", "--coordinator=localhost:1234", "--num_processes=2"]
    wanted = [environment + common + cluster + [f"--process_id={i}"] for i in range(2)]
    assert [shlex.split(line) for line in output.splitlines()] == wanted


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--processes=0"], "'0' is not a number of 1 or more"),
        (["--grace=soon"], "'soon' is not a number of 0 or more"),
        (["--processes", "2"], "expected one argument"),
        (["--process_id=1"], "the launcher gives this flag itself"),
        (["--gpus", "--devices=2"], "exclude each other"),
        (["--gpus", "--processes=3"], "has fewer GPUs"),
    ],
)
def test_wrong_options_end_with_one_line_and_status_2(fake, flags, message):
    status, output, errors = fake.run([[EXIT[0]]], *flags, CUDA_VISIBLE_DEVICES="0,1")
    assert (status, output, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith("error: ") and message in errors
    assert not (fake.home / "log.jsonl").exists()


# ------------------------------------------------------------------ signals, hanging processes, leaks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_forwarded_once_and_ends_with_75(fake, number):
    launcher = fake.start([[SAVE] * 2])
    fake.wait_for("ready-0"), fake.wait_for("ready-1")
    launcher.send_signal(number)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and fake.attempts() == 1, errors
    assert [(fake.home / f"got-{i}").read_text() for i in range(2)] == ["t", "t"]


def test_processes_that_finish_when_asked_to_stop_end_with_0(fake):
    finish = SAVE.replace("75", "0")
    launcher = fake.start([[finish] * 2])
    fake.wait_for("ready-0"), fake.wait_for("ready-1")
    launcher.terminate()
    assert launcher.wait(timeout=60) == 0
    launcher.communicate()


def test_a_second_interrupt_kills(fake):
    launcher = fake.start([[HANG] * 2])
    fake.wait_for("hangs-0"), fake.wait_for("hangs-1")
    launcher.send_signal(signal.SIGINT)
    while "asked to stop" not in launcher.stderr.readline():  # two at the same moment may be one
        assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 75 and not any(alive(entry["pid"]) for entry in fake.log())


def test_a_signal_ends_the_pause_between_attempts(fake):
    launcher = fake.start([[EXIT[1]]], "--pause=50")
    while "restart 1 in" not in launcher.stderr.readline():
        assert launcher.poll() is None
    launcher.terminate()
    launcher.communicate(timeout=40)
    assert launcher.returncode == 75 and fake.attempts() == 1


def test_peers_of_a_failed_process_get_the_grace_and_sigterm(fake):
    fail = "\nwhile not os.path.exists(f'{here}/ready-0'): time.sleep(0.01)\nsys.exit(1)"
    begin = time.monotonic()
    status, _, errors = fake.run([[SAVE, fail]], "--grace=0.5", "--restarts=0")
    assert status == 1 and (fake.home / "got-0").read_text() == "t", errors
    assert time.monotonic() - begin >= 0.5


def test_a_hanging_process_and_what_it_started_are_killed(fake):
    worker = "import subprocess; w = subprocess.Popen(['sleep', '60']); open(f'{here}/worker', 'w').write(str(w.pid));"
    fail = "\nwhile not os.path.exists(f'{here}/hangs-0'): time.sleep(0.01)\nsys.exit(76)"
    begin = time.monotonic()
    status, _, errors = fake.run([[worker + HANG, fail]], "--grace=0.2", "--restarts=0")
    assert status == 76 and time.monotonic() - begin >= 10, errors  # 10 seconds from SIGTERM to SIGKILL
    assert "terminate what still runs: 0" in errors and "kill what still runs: 0" in errors
    worker = pathlib.Path("/proc", (fake.home / "worker").read_text(), "status")
    assert not worker.exists() or "zombie" in worker.read_text()


@pytest.mark.slow
def test_a_hundred_restarts_leak_nothing(fake):
    status, _, _ = fake.run([[EXIT[75]] * 2] * 100 + [[EXIT[0]] * 2])
    assert status == 0 and fake.attempts() == 101
    log = fake.log()  # what is open changes while processes start, so each end is looked at a few times
    first, last = ([e for e in log if low <= e["attempt"] <= low + 10] for low in (0, 90))
    for what in ("fds", "threads", "children"):
        assert max(e[what] for e in last) <= max(e[what] for e in first), what
    assert max(e["threads"] for e in last) == 1 and max(e["children"] for e in last) <= 2
