"""What holds for all launchers: checked by shellcheck, wrong input ends with one line and status 2, help is help."""

import json
import shutil
import sys

import pytest

from tests.launch.conftest import LAUNCH

GKE = [sys.executable, LAUNCH / "gke.py"]
TPU = ["bash", LAUNCH / "tpu_vm.sh"]
SLURM = ["bash", LAUNCH / "slurm.sh"]
RUN = ["--config=configs/quickstart.py", "--workdir=gs://b/run"]
VM = ["--accelerator=v5litepod-16"]
POOL = ["--image=i", "--accelerator=tpu-v6e-slice", "--topology=4x4"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_shellcheck_has_nothing_to_say(script, stand_ins):
    result = stand_ins.run("shellcheck", "--external-sources", LAUNCH / script)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "command, message",
    [
        ([*TPU], "verb ''"),
        ([*TPU, "fly", "tpu"], "verb 'fly'"),
        ([*TPU, "up"], "name ''"),
        ([*TPU, "up", "--config=c.py"], "name '--config=c.py'"),
        ([*TPU, "up", "tpu", *RUN], "--accelerator is missing"),
        ([*TPU, "up", "tpu", "--accelerator=v9-8", *RUN], "--runtime_version is missing"),
        ([*TPU, "up", "tpu", *VM, RUN[1]], "--config is missing"),
        ([*TPU, "run", "tpu", RUN[0]], "--workdir is missing"),
        ([*TPU, "up", "tpu", *VM, RUN[0], "--workdir=/run"], "is on the VM's disk"),
        ([*TPU, "up", "tpu", *VM, "--config=configs/none.py", RUN[1]], "no such file"),
        ([*TPU, "up", "tpu", *VM, *RUN, "--slices=two"], "'two'"),
        ([*TPU, "up", "tpu", *VM, *RUN, "--source=main"], "--source=main"),
        ([*TPU, "up", "tpu", *VM, *RUN, "--source=none.whl"], "--source=none.whl: no such file"),
        ([*TPU, "up", "tpu", *VM, *RUN, "--traceback"], "flag '--traceback' is not known"),
        ([*GKE], "verb ''"),
        ([*GKE, "apply", "x"], "verb 'apply'"),
        ([*GKE, "create"], "name ''"),
        ([*GKE, "create", "Run_1", *POOL, *RUN], "name 'Run_1'"),
        ([*GKE, "create", "x", *POOL, RUN[1]], "--config is missing"),
        ([*GKE, "create", "x", *POOL, RUN[0]], "--workdir is missing"),
        ([*GKE, "create", "x", *POOL[1:], *RUN], "--image is missing"),
        ([*GKE, "create", "x", *POOL[:2], *RUN], "--topology is missing"),
        ([*GKE, "create", "x", *POOL, *RUN, "--topology=16"], "--topology=16"),
        ([*GKE, "create", "x", *POOL, *RUN, "--chips_per_host=3"], "--chips_per_host=3"),
        ([*GKE, "create", "x", *POOL, *RUN, "--mount=bucket"], "--mount=bucket"),
        ([*GKE, "create", "x", *POOL, *RUN, "--env=A"], "--env=A"),
        ([*GKE, "create", "x", *POOL, *RUN, "--slices=0"], "'0' is not a number of 1 or more"),
        ([*GKE, "create", "x", "--xpk", "--image=i", *RUN], "--cluster is missing"),
        ([*SLURM, RUN[1]], "--config is missing"),
        ([*SLURM, RUN[0]], "--workdir is missing"),
        ([*SLURM, *RUN, "--multihost"], "--multihost"),
        ([*SLURM, *RUN], "no Slurm job here"),
    ],
)
def test_wrong_input_ends_with_one_line_and_status_2(stand_ins, command, message):
    stand_ins.add("gcloud", "kubectl", "xpk", "srun", "scontrol", "squeue")
    result = stand_ins.run(*command)
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), result.stderr
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert stand_ins.calls() == []


@pytest.mark.parametrize("command", [TPU, GKE, SLURM, [sys.executable, LAUNCH / "local.py"]], ids=lambda c: c[1].name)
def test_help_names_the_flags_and_shows_no_code(stand_ins, command):
    result = stand_ins.run(*command, "--help")
    assert result.returncode == 0
    assert "--dry-run" in result.stdout and "set -e" not in result.stdout and "import" not in result.stdout


def test_image_has_what_it_needs_and_python_gets_the_signals():
    """The image itself is not built here: the Dockerfile names files that exist and that .dockerignore lets through."""
    lines = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines()]
    let_through = {line[1:] for line in (LAUNCH.parent / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = {source for line in lines if line[:1] == ["COPY"] for source in line[1:-1]}
    folders = {"lmboost", "configs", "launch", "constraints"}
    assert copied == let_through == folders | {"setup.py", "pyproject.toml", "README.md", "requirements.txt"}
    assert all((LAUNCH.parent / source).exists() for source in copied)
    (entry,) = (" ".join(line[1:]) for line in lines if line[:1] == ["ENTRYPOINT"])
    assert json.loads(entry) == ["python", "-m", "lmboost.train"]  # no shell in between
    assert ["ARG", "USER=lmboost"] in lines and lines.index(["USER", "${USER}"]) > lines.index(["ARG", "USER=lmboost"])
