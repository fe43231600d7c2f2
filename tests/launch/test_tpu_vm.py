"""Cloud TPU VMs: the commands that are issued, what is done about preemptions and failures, and the worker's part."""

import os
import pathlib
import shlex
import signal
import subprocess
import time

import pytest

from tests.launch.conftest import LAUNCH

ROOT = LAUNCH.parent
TPU_VM = LAUNCH / "tpu_vm.sh"
WORKER = LAUNCH / "tpu_vm_worker.sh"
FLAGS = ["--config=configs/quickstart.py:plain", "--config.data.train=/my data/it's", "--workdir=gs://b/run"]
UP = ["up", "tpu", "--accelerator=v5litepod-16", "--zone=z", "--project=p", "--spot", "--poll=0", *FLAGS]
NOT_FOUND = {"status": 1, "err": "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such thing\n"}
LOST = {"status": 255, "err": "ssh: connection refused\n"}

# What is answered in a run without incidents.
ANSWERS = {
    "queued-resources describe": [NOT_FOUND, "ACTIVE\n"],
    "tpu-vm describe": ["READY\n"],
    "tpu_vm_worker.sh status": ["Finished preparing\nlmboost_status=0 5.1\nlmboost_status=0 5.2\n"],
}


def answers(stand_ins, changed):
    stand_ins.add("gcloud", "mkdir", "tar")
    stand_ins.answer(changed | {words: answer for words, answer in ANSWERS.items() if words not in changed})


def place(*more):
    return ["--quiet", "--zone=z", "--project=p", *more]


def ssh(where, command):
    flags = place(f"--node={where}", f"--worker={where}", f"--command=bash tpu_vm_worker.sh {command}")
    return ["gcloud", "compute", "tpus", "queued-resources", "ssh", "tpu", *flags]


def resource(verb, *flags):
    return ["gcloud", "compute", "tpus", "queued-resources", verb, "tpu", *place(), *flags]


DESCRIBE = resource("describe", "--format=value(state.state)")
NODE = ["gcloud", "compute", "tpus", "tpu-vm", "describe", "tpu", *place("--format=value(state)")]
CREATE = resource(
    "create", "--node-id=tpu", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"
)
DELETE = resource("delete", "--force")
ARCHIVE = f"{ROOT}/build/tpu/lmboost.tgz"
PACK = ["tar", "-czf", ARCHIVE, "-C", str(ROOT), "--exclude=__pycache__", "lmboost", "configs", "launch"]
PACK += ["requirements.txt", "setup.py", "pyproject.toml", "README.md"]
COPY = ["gcloud", "compute", "tpus", "queued-resources", "scp", str(WORKER), ARCHIVE, "tpu:"]
COPY += place("--node=all", "--worker=all")
INSTALL = [["mkdir", "-p", f"{ROOT}/build/tpu"], PACK, COPY, ssh("all", "install")]
LIST = ["gcloud", "storage", "ls", "gs://b/run/checkpoints/"]
START = ssh(
    "all", "start --config=configs/quickstart.py:plain --config.data.train=/my\\ data/it\\'s --workdir=gs://b/run"
)
FOLLOW, STATUS = ssh("0", "follow"), ssh("all", "status 300")
ATTEMPT = [START, FOLLOW, STATUS, DESCRIBE, NODE]


def test_a_run_without_incidents_and_the_same_as_dry_run(stand_ins):
    answers(stand_ins, {})
    result = stand_ins.run("bash", TPU_VM, *UP)
    expected = [DESCRIBE, CREATE, DESCRIBE, NODE, *INSTALL, LIST, *ATTEMPT, DELETE]
    assert result.returncode == 0, result.stderr
    assert stand_ins.calls() == expected
    dry = stand_ins.run("bash", TPU_VM, *UP, "--dry-run")
    assert dry.returncode == 0 and stand_ins.calls() == []
    assert [shlex.split(line) for line in dry.stdout.splitlines()] == expected


def test_the_remote_shell_gets_the_flags_as_they_were_typed():
    command = START[-1].removeprefix("--command=")
    assert shlex.split(command) == ["bash", "tpu_vm_worker.sh", "start", *FLAGS]


def test_other_shapes_of_it(stand_ins):
    answers(stand_ins, {})
    flags = [
        "--slices=2",
        "--source=https://host/lmboost.git@v1",
        "--setup=cp -r 'a b' /data",
        "--create_flag=--labels=a=b",
    ]
    flags += ["--ssh_flag=--tunnel-through-iap", "--runtime_version=image", "--keep", "--", "--traceback"]
    result = stand_ins.run("bash", TPU_VM, *UP, *flags)
    assert result.returncode == 0, result.stderr
    calls = stand_ins.calls()
    create = ["--node-count=2", "--node-prefix=tpu", "--accelerator-type=v5litepod-16", "--runtime-version=image"]
    assert calls[1] == resource("create", *create, "--spot", "--labels=a=b")
    assert [call[5] for call in calls if call[3] == "tpu-vm"] == ["tpu-0", "tpu-1"] * 2
    words = [shlex.split(c[-1].removeprefix("--command=")) for c in calls if "ssh" in c]
    assert words[0] == ["bash", "tpu_vm_worker.sh", "install", "https://host/lmboost.git@v1"]
    assert words[1] == ["bash", "tpu_vm_worker.sh", "setup", "cp -r 'a b' /data"]
    assert words[2][-1] == "--traceback"
    assert all("--tunnel-through-iap" in call for call in calls if "ssh" in call or "scp" in call)
    assert not any(call[0] == "tar" or "delete" in call for call in calls)
    assert "tpu costs until" in result.stderr


def test_a_wheel_is_copied_in_place_of_the_checkout(stand_ins):
    answers(stand_ins, {})
    wheel = stand_ins.home / "lmboost-1-py3-none-any.whl"
    wheel.touch()
    assert stand_ins.run("bash", TPU_VM, *UP, f"--source={wheel}").returncode == 0
    copied = [*COPY[:6], str(wheel), *COPY[7:]]
    assert stand_ins.calls()[4:7] == [copied, ssh("all", f"install {wheel.name}"), LIST]


def test_a_preempted_resource_is_deleted_created_and_the_run_goes_on(stand_ins):
    states = [NOT_FOUND, "WAITING_FOR_RESOURCES\n", "PROVISIONING\n", "ACTIVE\n"]  # until training starts
    states += ["ACTIVE\n", "SUSPENDING\n", "SUSPENDED\n", NOT_FOUND, "ACTIVE\n"]  # the connection is lost, and then all
    answers(stand_ins, {"queued-resources describe": states, "follow": [LOST, LOST, ""]})
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 0, result.stderr
    assert stand_ins.calls() == [
        DESCRIBE, CREATE, DESCRIBE, DESCRIBE, DESCRIBE, NODE, *INSTALL, LIST,
        START, FOLLOW, DESCRIBE, NODE, FOLLOW, DESCRIBE,  # SUSPENDING
        DESCRIBE, DELETE, DESCRIBE, CREATE, DESCRIBE, NODE, *INSTALL, *ATTEMPT, DELETE,
    ]  # fmt: skip


@pytest.mark.parametrize("node", ["PREEMPTED\n", "TERMINATED\n", NOT_FOUND])
def test_a_lost_node_of_an_active_resource_is_a_preemption(stand_ins, node):
    answers(stand_ins, {"tpu-vm describe": ["READY\n", node, node, "READY\n"], "follow": [LOST, ""]})
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 0, result.stderr
    assert stand_ins.calls() == [
        DESCRIBE, CREATE, DESCRIBE, NODE, *INSTALL, LIST, START, FOLLOW, DESCRIBE, NODE,
        DESCRIBE, NODE, DELETE, DESCRIBE, NODE, *INSTALL, *ATTEMPT, DELETE,
    ]  # fmt: skip


def test_a_lost_connection_is_no_end(stand_ins):
    answers(
        stand_ins, {"start": [LOST, ""], "follow": [LOST, LOST, ""], "worker.sh status": [LOST, "lmboost_status=0 1\n"]}
    )
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 0, result.stderr
    again = [DESCRIBE, NODE]
    expected = [START, *again, START, FOLLOW, *again, FOLLOW, *again, FOLLOW, STATUS, *again, *ATTEMPT[2:], DELETE]
    assert stand_ins.calls()[9:] == expected


def reply(*lines):
    return "".join(f"lmboost_status={line}\n" for line in lines)


@pytest.mark.parametrize(
    "replies, expected, starts",
    [
        ([reply("75 9.5", "75 9.25"), reply("0 20", "0 20")], 0, 2),
        ([reply("76 9", "134 9.5"), reply("134 9", "1 8.5"), reply("0 1", "0 1")], 0, 3),
        ([reply("134 9.5", "2 10")], 2, 1),
        ([reply("75 9", "75 9 stopped")], 75, 1),
        ([reply("0 9", "0 9 stopped")], 0, 1),
        ([reply("134 10.5", "7 9.75")], 7, 3),  # the first to fail, though its number is higher
        ([reply("1 9"), reply("75 9"), reply("1 9"), reply("137 0", "1 9")], 137, 4),
        (["not one answer\n"], 255, 3),
    ],
)
def test_restart_rule(stand_ins, replies, expected, starts):
    answers(stand_ins, {"tpu_vm_worker.sh status": replies})
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == expected, result.stderr
    calls = stand_ins.calls()
    assert calls.count(START) == starts and calls.count(CREATE) == 1 and calls[-1] == DELETE


def test_crashes_with_new_checkpoints_go_on(stand_ins):
    listing = ["gs://b/run/checkpoints/\n"]
    listing += [f"gs://b/run/checkpoints/{step}/\ngs://b/run/checkpoints/9.partial/\n" for step in (5, 10, 20, 20)]
    answers(stand_ins, {"tpu_vm_worker.sh status": [reply("1 9")], "storage ls": listing})
    result = stand_ins.run("bash", TPU_VM, *UP, "--max_crashes=2")
    assert (result.returncode, stand_ins.calls().count(START)) == (1, 4), result.stderr


def test_checkpoints_on_the_vm_are_listed_there(stand_ins):
    answers(stand_ins, {"tpu_vm_worker.sh status": [reply("1 9")], "list": ["", "100\n20\n"]})
    result = stand_ins.run("bash", TPU_VM, *UP, "--workdir=/home/me/run", "--keep", "--max_crashes=1")
    assert result.returncode == 1 and "newest checkpoint: 100" in result.stderr
    assert ssh("0", "list /home/me/run/checkpoints") in stand_ins.calls()


def test_a_resource_that_fails_again_and_again_is_given_up(stand_ins):
    answers(stand_ins, {"queued-resources describe": [NOT_FOUND, "FAILED\n"]})
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 1 and "has failed 3 times" in result.stderr
    assert stand_ins.calls() == [DESCRIBE, CREATE] + [DESCRIBE, DELETE] * 3


def test_a_failed_install_ends_it_and_nothing_is_left_to_pay_for(stand_ins):
    answers(stand_ins, {"tpu_vm_worker.sh install": [{"status": 1}]})
    result = stand_ins.run("bash", TPU_VM, *UP)
    calls = stand_ins.calls()
    assert result.returncode == 1 and calls[-1] == DELETE and START not in calls


def test_without_an_answer_from_gcloud_nothing_is_deleted(stand_ins):
    answers(stand_ins, {"queued-resources describe": [{"status": 1, "err": "You do not have an active account\n"}]})
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 1 and "active account" in result.stderr
    assert stand_ins.calls() == [DESCRIBE]


@pytest.mark.parametrize(
    "verb, flags, expected",
    [
        ("create", ["--accelerator=v5litepod-16", "--spot"], [DESCRIBE, CREATE, DESCRIBE, NODE, *INSTALL]),
        ("run", FLAGS, [DESCRIBE, NODE, LIST, *ATTEMPT]),
        ("logs", [], [ssh("0", "follow 100")]),
        ("stop", [], [ssh("all", "stop")]),
        ("delete", [], [DELETE]),
    ],
)
def test_single_verbs_and_their_dry_runs(stand_ins, verb, flags, expected):
    answers(stand_ins, {} if verb == "create" else {"queued-resources describe": ["ACTIVE\n"]})
    command = ["bash", TPU_VM, verb, "tpu", "--zone=z", "--project=p", "--poll=0", *flags]
    result = stand_ins.run(*command)
    assert result.returncode == 0, result.stderr
    assert stand_ins.calls() == expected
    dry = stand_ins.run(*command, "--dry-run")
    assert [shlex.split(line) for line in dry.stdout.splitlines()] == expected
    assert stand_ins.calls() == []


def test_run_does_not_create_and_ends_with_75_when_all_is_gone(stand_ins):
    answers(stand_ins, {"queued-resources describe": ["ACTIVE\n", "SUSPENDED\n"], "follow": [LOST]})
    result = stand_ins.run("bash", TPU_VM, "run", "tpu", "--poll=0", *FLAGS)
    assert result.returncode == 75
    assert not any("create" in call or "delete" in call for call in stand_ins.calls())
    answers(stand_ins, {"queued-resources describe": [NOT_FOUND]})
    result = stand_ins.run("bash", TPU_VM, "run", "tpu", "--poll=0", *FLAGS)
    assert result.returncode == 1 and "`up` or `create` first" in result.stderr


def test_an_interrupt_detaches(stand_ins):
    answers(stand_ins, {})
    stand_ins.write("gcloud", f'#!/bin/bash\ncase "$*" in *follow*) >{stand_ins.home}/follows; exec sleep 90;; '
                              '*tpu-vm*) echo READY;; *describe*) echo ACTIVE;; esac\n')  # fmt: skip
    process = subprocess.Popen(
        ["bash", TPU_VM, *UP], stderr=subprocess.PIPE, text=True, env=stand_ins.environment, start_new_session=True
    )
    while not (stand_ins.home / "follows").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "detached; the run goes on" in errors


# ------------------------------------------------------------------ what runs on the VM

FAKE_PYTHON = """#!/bin/bash
echo "$@" >>"$HOME/started"
echo "line of output"
trap 'echo saved; exit 75' TERM
while [ ! -e "$HOME/end" ]; do sleep 0.05; done
exit "$(cat "$HOME/end")"
"""


class Vm:
    """A directory that is a TPU VM's home, with a training that ends when it is told to."""

    def __init__(self, stand_ins):
        self.home, self.stand_ins = stand_ins.home, stand_ins
        python = self.home / "lmboost" / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(FAKE_PYTHON)
        python.chmod(0o755)

    def do(self, *words):
        result = self.stand_ins.run("bash", WORKER, *words, HOME=str(self.home))
        assert result.returncode == 0, result.stderr
        return result.stdout

    def started(self):
        return (self.home / "started").read_text().splitlines()

    def end(self, status):
        (self.home / "end").write_text(str(status))


@pytest.fixture
def vm(stand_ins):
    vm = Vm(stand_ins)
    yield vm
    vm.end(9)
    time.sleep(0.1)


def test_training_outlives_the_connection_and_its_status_is_read_later(vm):
    vm.do("start", "--config=a b", "--workdir=w")
    pid = int((vm.home / "lmboost_run" / "pid").read_text())
    assert os.getsid(pid) != os.getsid(0)  # so that no hang-up reaches it
    assert "a run is on; no start" in vm.do("start", "--config=a b", "--workdir=w")
    assert "a run is on; no install" in vm.do("install")
    vm.end(7)
    assert vm.do("follow") == "line of output\n"
    status, ended = vm.do("status", "10").split()
    assert status == "lmboost_status=7" and abs(float(ended) - time.time()) < 20
    assert vm.started() == ["-m lmboost.train --multihost --config=a b --workdir=w"]
    (vm.home / "end").unlink()
    vm.do("start", "again")
    assert len(vm.started()) == 2
    vm.end(0)
    assert vm.do("status", "10").startswith("lmboost_status=0 ")


def test_stop_lets_training_save_and_is_remembered_until_the_next_start(vm):
    vm.do("start")
    vm.do("stop")
    assert vm.do("follow") == "line of output\nsaved\n"
    reply = vm.do("status", "10").split()
    assert (reply[0], reply[2]) == ("lmboost_status=75", "stopped")
    vm.do("start")
    vm.end(0)
    assert "stopped" not in vm.do("status", "10")


def test_what_still_runs_after_the_grace_is_ended(vm):
    vm.do("start")
    assert vm.do("status", "0").startswith("lmboost_status=75 ")  # it saved upon SIGTERM


def test_a_run_that_a_reboot_has_ended_is_a_crash(vm):
    vm.do("start")
    pid = int((vm.home / "lmboost_run" / "pid").read_text())
    vm.end(0)
    vm.do("status", "10")
    (vm.home / "lmboost_run" / "status").unlink()
    (vm.home / "lmboost_run" / "pid").write_text(str(os.getpid()))  # another process has its number now
    assert not pathlib.Path(f"/proc/{pid}").exists()
    assert vm.do("status", "10") == "lmboost_status=137 0\n"


def test_install_from_an_archive_and_from_a_repository(vm):
    stand_ins = vm.stand_ins
    stand_ins.write("python3", "#!/bin/bash\nmkdir -p ~/.local/bin; ln -sf ~/bin/uv ~/.local/bin/uv\n")
    stand_ins.write("uv", '#!/bin/bash\necho "$PWD uv $*" >>~/installed\nif [ "$1" = venv ]; then mkdir -p .venv; fi\n')
    source = vm.home / "source"
    (source / "configs").mkdir(parents=True)
    (source / "configs" / "mine.py").write_text("")
    subprocess.run(["tar", "-czf", vm.home / "lmboost.tgz", "-C", source, "configs"], check=True)
    vm.do("install")
    assert (vm.home / "lmboost" / "configs" / "mine.py").exists()
    assert (vm.home / "lmboost" / ".venv" / "bin" / "python").exists()  # kept: installing again is quick
    pip = f"{vm.home}/lmboost uv pip install --quiet --python .venv/bin/python -e .[tpu,gcs]"
    assert (vm.home / "installed").read_text().splitlines() == [pip]
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@e", "-C", source]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    (source / "configs" / "later.py").write_text("")
    for command in (["add", "."], ["commit", "-qm", "two"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run(["rm", "-r", vm.home / "lmboost"], check=True)
    vm.do("install", f"{source}@v1")
    assert sorted(p.name for p in (vm.home / "lmboost" / "configs").iterdir()) == ["mine.py"]
    assert (vm.home / "installed").read_text().splitlines()[1].endswith("uv venv --quiet --python 3.12 .venv")


def test_install_of_a_wheel(vm):
    vm.stand_ins.write("python3", "#!/bin/bash\nmkdir -p ~/.local/bin; ln -sf ~/bin/uv ~/.local/bin/uv\n")
    vm.stand_ins.write("uv", '#!/bin/bash\necho "$PWD uv $*" >>~/installed\n')
    vm.do("install", "lmboost-1-py3-none-any.whl")
    (pip,) = (vm.home / "installed").read_text().splitlines()  # the environment that was there is kept
    wheel = f"lmboost[tpu,gcs] @ file://{vm.home}/lmboost-1-py3-none-any.whl"
    assert pip.endswith(f"uv pip install --quiet --python .venv/bin/python --reinstall-package lmboost {wheel}")
    assert [path.name for path in (vm.home / "lmboost").iterdir()] == [".venv"]


def test_setup_runs_a_command_of_any_words(vm):
    assert vm.do("setup", 'printf "%s\\n" "a  b" $((1 + 1))') == "a  b\n2\n"


def test_list_of_a_directory_that_may_not_be_there(vm):
    (vm.home / "lmboost" / "runs" / "checkpoints" / "5").mkdir(parents=True)
    assert vm.do("list", "runs/checkpoints") == "5\n" and vm.do("list", "none") == ""
