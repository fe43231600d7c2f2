"""GKE: the JobSet as Kubernetes gets it, xpk's command line, and that a dry run prints what a run runs."""

import pathlib
import re
import shlex
import sys

import pytest

from tests.launch.conftest import LAUNCH

yaml = pytest.importorskip("yaml")

GKE = [sys.executable, LAUNCH / "gke.py"]
FLAGS = ["--config=configs/salt_2p8b.py:plain", "--config.data.train=/data/a: b # 'c' \"d\"", "--workdir=gs://b/run"]
POOL = ["--image=host/image:1", "--accelerator=tpu-v5p-slice", "--topology=2x2x4"]
XPK = ["--xpk", "--image=host/image:1", "--cluster=c", "--tpu_type=v5litepod-16", "--project=p", "--zone=z"]
TRAIN = ["python", "-m", "lmboost.train", "--multihost", "--start_timeout=3600"]


def create(stand_ins, *flags):
    """The JobSet that kubectl is given."""
    stand_ins.add("kubectl")
    result = stand_ins.run(*GKE, "create", "run", *POOL, *FLAGS, *flags)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load((stand_ins.home / "given").read_text())


def job_of(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_jobset_has_a_job_per_slice_and_a_pod_per_host(stand_ins):
    jobset = create(stand_ins, "--slices=3", "--namespace=n")
    assert stand_ins.calls() == [["kubectl", "apply", "--namespace=n", "--filename=-"]]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "run"
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 3
    job, pod = job_of(jobset), job_of(jobset)["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)  # 16 chips, 4 a host
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert container["command"] == TRAIN + FLAGS and container["image"] == "host/image:1"
    assert pod["terminationGracePeriodSeconds"] == 300 and pod["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    "flags, hosts, chips",
    [(["--topology=1x1"], 1, 1), (["--topology=2x4"], 2, 4), (["--topology=2x4", "--chips_per_host=8"], 1, 8)],
)
def test_hosts_of_a_slice(stand_ins, flags, hosts, chips):
    job = job_of(create(stand_ins, *flags))
    limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (job["parallelism"], limits) == (hosts, {"google.com/tpu": chips})


def outcome(jobset, exit_code=None, disrupted=False):
    """What Kubernetes and JobSet do about a failed pod, as their documentation describes it."""
    job = job_of(jobset)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        if codes and codes["operator"] == "In" and exit_code in codes["values"]:
            text = (
                f"Container {codes['containerName']} for pod default/run-slice-0-2-x2 failed with exit code {exit_code}"
            )
        elif disrupted and any(c["type"] == "DisruptionTarget" for c in rule.get("onPodConditions", [])):
            text = "Pod default/run-slice-0-2-x2 has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{text} matching {rule['action']} rule at index {i}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"  # counted


def test_restart_rule(stand_ins):
    jobset = create(stand_ins, "--max_restarts=7")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert outcome(jobset, 2) == "FailJobSet"
    for code in (75, 76):
        assert outcome(jobset, code) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(jobset, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    for code in (1, 42, 134, 137, 139):
        assert outcome(jobset, code) == "RestartJobSet"
    containers = job_of(jobset)["template"]["spec"]["containers"]
    rules = job_of(jobset)["podFailurePolicy"]["rules"]
    assert {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r} == {c["name"] for c in containers}


def test_options_of_the_pod(stand_ins):
    flags = ["--spot", "--mount=data:/data", "--mount=more:/more", "--env=A=b=c d", "--service_account=s", "--grace=60"]
    job = job_of(create(stand_ins, *flags))
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"cloud.google.com/gke-spot", "google.com/tpu"} == {t["key"] for t in pod["tolerations"]}
    assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"]) == ("s", 60)
    assert "hostNetwork" not in pod
    container = pod["containers"][0]
    assert container["env"] == [{"name": "A", "value": "b=c d"}]
    buckets = {v["name"]: v["csi"]["volumeAttributes"]["bucketName"] for v in pod["volumes"]}
    assert {buckets[m["name"]]: m["mountPath"] for m in container["volumeMounts"]} == {"data": "/data", "more": "/more"}
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_what_looks_like_a_variable_of_kubernetes_reaches_training_as_it_is(stand_ins):
    pod = job_of(create(stand_ins, "--config.a=$(HOME) $x", "--start_timeout=60"))["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert command[-2] == "--config.a=$$(HOME) $x" and command[-1] == "--start_timeout=60"
    assert "--start_timeout=3600" not in command


def test_xpk(stand_ins):
    stand_ins.add("xpk")
    more = ["--slices=2", "--env=A=1", "--max_restarts=9"]
    assert stand_ins.run(*GKE, "create", "run", *XPK, *FLAGS, *more).returncode == 0
    (command,) = stand_ins.calls()
    assert command[:-1] == [
        "xpk", "workload", "create", "--workload=run", "--cluster=c", "--project=p", "--zone=z",
        "--tpu-type=v5litepod-16", "--num-slices=2", "--docker-image=host/image:1", "--max-restarts=9",
        "--restart-on-exit-codes=1,3-126", "--termination-grace-period-seconds=300", "--env=A=1",
    ]  # fmt: skip
    assert shlex.split(command[-1].removeprefix("--command=")) == ["exec", *TRAIN, *FLAGS]
    assert stand_ins.run(*GKE, "delete", "run", *XPK).returncode == 0
    place = ["--cluster=c", "--project=p", "--zone=z"]
    assert stand_ins.calls() == [["xpk", "workload", "delete", "--workload=run", *place, "--force"]]


@pytest.mark.parametrize(
    "flags", [["create", "run", *POOL, *FLAGS], ["create", "run", *XPK, *FLAGS], ["logs", "run"], ["delete", "run"]]
)
def test_a_dry_run_prints_what_a_run_runs_and_runs_nothing(stand_ins, flags):
    stand_ins.add("kubectl", "xpk")
    dry = stand_ins.run(*GKE, *flags, "--dry-run")
    assert dry.returncode == 0 and stand_ins.calls() == []
    pasted = stand_ins.run("bash", "-c", dry.stdout)
    assert pasted.returncode == 0, pasted.stderr
    printed, given = stand_ins.calls(), read(stand_ins)
    assert stand_ins.run(*GKE, *flags).returncode == 0
    assert stand_ins.calls() == printed and read(stand_ins) == given
    assert (given is not None) == (flags[0] == "create" and "--xpk" not in flags)


def read(stand_ins):
    """What kubectl was given on standard input since the last question."""
    path = stand_ins.home / "given"
    return path.rename(path.with_suffix(".read")).read_text() if path.exists() else None


def test_logs_are_those_of_the_first_process(stand_ins):
    stand_ins.add("kubectl")
    stand_ins.run(*GKE, "logs", "run", "--namespace=n")
    (command,) = stand_ins.calls()
    assert command[:3] == ["kubectl", "logs", "--namespace=n"]
    labels = command[-1].removeprefix("--selector=").split(",")
    assert "jobset.sigs.k8s.io/jobset-name=run" in labels
    assert {"jobset.sigs.k8s.io/job-index=0", "batch.kubernetes.io/job-completion-index=0"} <= set(labels)


def test_the_status_of_the_tool_is_passed_on_and_a_missing_tool_is_named(stand_ins):
    stand_ins.add("kubectl")
    stand_ins.answer({"kubectl": [{"status": 3}]})
    assert stand_ins.run(*GKE, "delete", "run").returncode == 3
    result = stand_ins.run(*GKE, "delete", "run", PATH=str(stand_ins.home))
    assert result.returncode == 2 and result.stderr == "error: kubectl is not installed, or not on PATH\n"


def schema():
    """{path of an object: {field: type or values}} of a JobSet, and {path: the fields that must be there}."""
    fields, needed, path = {}, {}, ""
    for line in (pathlib.Path(__file__).parent / "jobset.txt").read_text().splitlines():
        if line.startswith("  "):
            for name, kind in (entry.split(":", 1) for entry in line.split()):
                fields[path][name.rstrip("!")] = kind
                needed[path] |= {name[:-1]} if name.endswith("!") else set()
        elif not line.startswith("#"):
            path = "" if line == "." else line
            fields[path], needed[path] = {}, set()
    return fields, needed


TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def check(value, kind, path, fields, needed):
    """That a value is of the kind that the schema has at this path, and so is all in it."""
    if kind not in TYPES:
        assert value in kind.split("|"), path
        return
    assert type(value) is TYPES[kind], path
    if isinstance(value, list) and f"{path}[]" in fields:
        for item in value:
            check(item, "object", f"{path}[]", fields, needed)
    elif isinstance(value, dict) and path in fields:
        assert needed[path] <= {*value} <= {*fields[path]}, path
        for name, inner in value.items():
            check(inner, fields[path][name], f"{path}.{name}", fields, needed)


@pytest.mark.parametrize(
    "flags", [[], ["--slices=2"], ["--spot", "--mount=data:/data", "--env=A=1", "--service_account=s"]]
)
def test_every_field_is_one_that_a_jobset_has(stand_ins, flags):
    check(create(stand_ins, *flags), "object", "", *schema())


def test_a_field_that_a_jobset_does_not_have_is_found():
    fields, needed = schema()
    good = {"replicatedJobs": [], "failurePolicy": {"maxRestarts": 1, "restartStrategy": "BlockingRecreate"}}
    check(good, "object", ".spec", fields, needed)
    for name, wrong in (("maxRestart", 1), ("maxRestarts", "1"), ("restartStrategy", "Never")):
        with pytest.raises(AssertionError, match=r"\.spec\.failurePolicy"):
            check({"failurePolicy": {name: wrong}}, "object", ".spec", fields, needed)
