"""TPU VMs of Compute Engine: a group of VMs in place of a queued resource; the rest is that of test_tpu_vm.py."""

import itertools
import shlex

import pytest

from tests.launch.test_tpu_vm import ARCHIVE, FLAGS, LIST, LOST, PACK, ROOT, TPU_VM, WORKER, reply

ENGINE = ["--machine_type=tpu7x-standard-4t", "--topology=2x2x2", "--zone=us-central1-c", "--project=p", "--poll=0"]
UP = ["up", "tpu", *ENGINE, "--spot", *FLAGS]
PLACE = ["--quiet", "--zone=us-central1-c", "--project=p"]
NOT_FOUND = {"status": 1, "err": "ERROR: Could not fetch resource:\n - The resource 'groups/tpu' was not found\n"}
RUNNING = "RUNNING\nRUNNING\n"


def gcloud(*words):
    return ["gcloud", "compute", *words]


GROUP = gcloud("instance-groups", "managed", "list-instances", "tpu", *PLACE)
STATE, NAMES = [*GROUP, "--format=value(instanceStatus)"], [*GROUP, "--format=value(name)"]
OWN = ["--quiet", "--project=p"]
CREATE = [
    gcloud("instance-templates", "create", "tpu", "--machine-type=tpu7x-standard-4t",
           "--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x", "--image-project=ubuntu-os-accelerator-images",
           "--maintenance-policy=TERMINATE", "--boot-disk-size=200GB", "--scopes=cloud-platform",
           "--provisioning-model=SPOT", "--instance-termination-action=STOP", *OWN),
    gcloud("resource-policies", "create", "workload-policy", "tpu", "--region=us-central1", "--type=HIGH_THROUGHPUT",
           "--accelerator-topology=2x2x2", *OWN),
    gcloud("instance-groups", "managed", "create", "tpu", "--zone=us-central1-c", "--template=tpu", "--size=2",
           "--target-size-policy-mode=bulk", "--default-action-on-vm-failure=do-nothing",
           "--workload-policy=projects/p/regions/us-central1/resourcePolicies/tpu", *OWN),
]  # fmt: skip
DELETE = [
    gcloud("instance-groups", "managed", "delete", "tpu", "--zone=us-central1-c", *OWN),
    gcloud("resource-policies", "delete", "tpu", "--region=us-central1", *OWN),
    gcloud("instance-templates", "delete", "tpu", *OWN),
]


def both(*words):
    """A command that both VMs get; they are asked in no order."""
    return [NAMES, *([word.replace("VM", vm) for word in gcloud(*words)] for vm in ("tpu-a", "tpu-b"))]


def ssh(command):
    return both("ssh", "VM", *PLACE, f"--command=bash tpu_vm_worker.sh {command}")


INSTALL = [["mkdir", "-p", f"{ROOT}/build/tpu"], PACK, *both("scp", str(WORKER), ARCHIVE, "VM:", *PLACE)]
INSTALL += ssh("install")
START = ssh("start --config=configs/quickstart.py:plain --config.data.train=/my\\ data/it\\'s --workdir=gs://b/run")
ATTEMPT = [*START, *ssh("follow"), *ssh("status 300")]


def answers(stand_ins, changed=()):
    stand_ins.add("gcloud", "mkdir", "tar")
    usual = {"instanceStatus": [NOT_FOUND, RUNNING], "value(name)": ["tpu-b\ntpu-a\n"], "status 300": [reply("0 5")]}
    stand_ins.answer({**usual, **dict(changed)})


def in_order(calls):
    """The commands, those that go to both VMs at once in the order of the VMs' names."""
    together = itertools.groupby(calls, lambda call: call[:3] if call[2] in ("ssh", "scp") else call)
    return [call for _, group in together for call in sorted(group)]


def test_a_run_without_incidents_and_the_same_as_dry_run(stand_ins):
    answers(stand_ins)
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 0, result.stderr
    expected = [STATE, *CREATE, STATE, *INSTALL, LIST, *ATTEMPT, STATE, *DELETE]
    assert in_order(stand_ins.calls()) == expected
    dry = stand_ins.run("bash", TPU_VM, *UP, "--dry-run")
    told = [shlex.split(line.replace("tpu-0", "tpu-a").replace("tpu-1", "tpu-b")) for line in dry.stdout.splitlines()]
    assert in_order(told) == expected and stand_ins.calls() == []


def test_a_group_is_waited_for_and_made_again_after_a_preemption(stand_ins):
    states = [NOT_FOUND, "\n\n", "PENDING\nRUNNING\n", RUNNING, RUNNING, "STOPPING\nRUNNING\n", "TERMINATED\nRUNNING\n"]
    answers(stand_ins, {"instanceStatus": [*states, NOT_FOUND, RUNNING], "follow": [LOST, LOST, LOST, LOST, ""]})
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 0, result.stderr
    calls = in_order(stand_ins.calls())
    assert calls.count(CREATE[0]) == calls.count(CREATE[2]) == 2 and calls[-3:] == DELETE
    assert calls.count(DELETE[0]) == 2 and calls.index(DELETE[0]) < len(calls) - 3


def test_what_was_half_made_is_removed_and_made_again(stand_ins):
    answers(stand_ins, {"managed create": [{"status": 1}, ""], "instanceStatus": [NOT_FOUND, NOT_FOUND, RUNNING]})
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 0, result.stderr
    assert in_order(stand_ins.calls())[:11] == [STATE, *CREATE, *DELETE[1:], STATE, *CREATE, STATE]


def test_a_vm_that_does_not_listen_yet_is_asked_again(stand_ins):
    answers(stand_ins, {"scp": [LOST, LOST, LOST, ""]})
    result = stand_ins.run("bash", TPU_VM, *UP)
    assert result.returncode == 0, result.stderr


def test_one_host_needs_no_policy_and_the_first_to_fail_counts(stand_ins):
    single = [word.replace("2x2x2", "2x2x1") for word in UP]
    told = reply("7 9")
    answers(stand_ins, {"instanceStatus": [NOT_FOUND, "RUNNING\n"], "value(name)": ["tpu-a\n"], "status 300": [told]})
    result = stand_ins.run("bash", TPU_VM, *single, "--max_crashes=1")
    assert result.returncode == 7, result.stderr
    assert not any("resource-policies" in call or "--workload-policy" in " ".join(call) for call in stand_ins.calls())


@pytest.mark.parametrize(("verb", "command", "vms"), [("logs", "follow 100", 2), ("stop", "stop", 2)])
def test_logs_and_stop_reach_all_vms(stand_ins, verb, command, vms):
    answers(stand_ins)
    flags = [flag for flag in ENGINE if "topology" not in flag]
    assert stand_ins.run("bash", TPU_VM, verb, "tpu", *flags).returncode == 0
    assert in_order(stand_ins.calls()) == ssh(command)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--zone": ""}, "--zone is missing"),
        ({"--project": ""}, "--project is missing"),
        ({"--topology": ""}, "--topology=''"),
        ({"--topology": "--topology=2x3"}, "--topology=2x3: no multiple of the 4 chips"),
        ({"--machine_type": "--machine_type=n1-standard"}, "--machine_type=n1-standard: expected CHIPSt"),
        ({"--machine_type": "--machine_type=ct9-4t"}, "--runtime_version is missing"),
        ({"--spot": "--slices=2"}, "--slices=2: with --machine_type there is one slice"),
        ({"--spot": "--accelerator=v6e-8"}, "give one of them"),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_2(stand_ins, changes, message):
    answers(stand_ins)
    flags = [changes.get(flag.partition("=")[0], flag) for flag in UP]
    result = stand_ins.run("bash", TPU_VM, *filter(None, flags))
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1), result.stderr
    assert message in result.stderr and stand_ins.calls() == []
