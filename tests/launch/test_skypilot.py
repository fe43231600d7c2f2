"""The task for SkyPilot: its fields are ones that a task has, and what it runs starts one process a node."""

import pathlib
import shlex

import pytest

from tests.launch.conftest import LAUNCH

yaml = pytest.importorskip("yaml")

# Fields of a task and of its resources, with their types: sky/utils/schemas.py of SkyPilot 0.14.1. Others are refused.
TASK = {
    "name": str, "workdir": str | dict, "num_nodes": int, "resources": dict, "file_mounts": dict, "setup": str,
    "run": str, "envs": dict, "secrets": dict | list, "config": dict, "volumes": dict, "service": dict, "pool": dict,
}  # fmt: skip
RESOURCES = {
    "cloud": str, "region": str, "zone": str, "infra": str, "cpus": str | int | float, "memory": str | int | float,
    "accelerators": str | dict | list, "accelerator_args": dict, "instance_type": str, "use_spot": bool,
    "disk_size": str | int, "disk_tier": str, "network_tier": str, "image_id": str | dict, "ports": str | int | list,
    "labels": dict, "autostop": bool | str | int | dict, "priority": int, "any_of": list, "ordered": list,
    "job_recovery": str | dict, "max_hourly_cost": int | float,
}  # fmt: skip
RECOVERY = {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": int | list}
GIVEN = {"CONFIG": "configs/quickstart.py:plain", "WORKDIR": "gs://b/run", "FLAGS": "--config.a=1 --config.b=2"}


@pytest.fixture(scope="module")
def task():
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_every_field_is_one_that_a_task_has(task):
    for values, fields in (
        (task, TASK), (task["resources"], RESOURCES), (task["resources"]["job_recovery"], RECOVERY),
    ):  # fmt: skip
        for name, value in values.items():
            assert isinstance(value, fields[name]), name
    assert all(value is None or isinstance(value, str) for value in task["envs"].values())  # None has to be given
    assert {*GIVEN} <= {*task["envs"]} and task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 76]


@pytest.fixture
def run(task, stand_ins):
    """A function of the environment: the command that a node runs."""
    python = stand_ins.home / "lmboost-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\nprintf '%q ' \"$@\"\n")
    python.chmod(0o755)

    def run(**environment):
        home = {"HOME": str(stand_ins.home)}
        done = stand_ins.run("bash", "-euc", task["run"], **home, **{**task["envs"], **GIVEN, **environment})
        assert done.returncode == 0, done.stderr
        return shlex.split(done.stdout)

    return run


TRAIN = ["-m", "lmboost.train"]
FLAGS = ["--config=configs/quickstart.py:plain", "--workdir=gs://b/run", "--config.a=1", "--config.b=2"]


def test_one_node_trains_by_itself(run):
    assert run(SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_IPS="10.0.0.2", SKYPILOT_NODE_RANK="0") == TRAIN + FLAGS


def test_of_several_nodes_each_knows_the_first_and_its_number(run):
    cluster = ["--coordinator=10.0.0.2:8476", "--num_processes=2", "--process_id=1"]
    ips = "10.0.0.2\n10.0.0.3\n"
    assert run(SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_IPS=ips, SKYPILOT_NODE_RANK="1") == TRAIN + cluster + FLAGS


def test_setup_installs_the_checkout(task, stand_ins):
    stand_ins.add("uv")
    assert stand_ins.run("bash", "-euc", task["setup"], HOME="/home/me", EXTRA="gpu").returncode == 0
    _, install = stand_ins.calls()
    assert install[-2:] == ["-e", ".[gpu,gcs]"] and pathlib.Path(install[-3]).parent.name == "bin"
