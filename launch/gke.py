"""Trains on TPU node pools of GKE, as a JobSet or by way of xpk.

    python launch/gke.py create NAME --image=REGION-docker.pkg.dev/PROJECT/lmboost/train:1 \\
        --accelerator=tpu-v5-lite-podslice --topology=4x4 --config=configs/salt_2p8b.py --workdir=gs://bucket/run

  create                  applies the JobSet, or runs `xpk workload create`
  logs                    the output of the first process, until it ends
  delete                  deletes it; the node pool stays, and so does what it costs

  --image=IMAGE           built with launch/Dockerfile
  --slices=1              TPU slices (multislice)
  --max_restarts=20       restarts after crashes, over the whole run
  --grace=300             seconds from SIGTERM to SIGKILL, in which training saves
  --accelerator=A         tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, tpu7x
  --topology=T            of a slice, such as 4x4 or 2x2x4
  --chips_per_host=4      or fewer if the slice has fewer; 8 for the machine types with 8 chips
  --spot                  on spot nodes
  --mount=BUCKET:/path    the bucket at this path, read-only (Cloud Storage FUSE); may be repeated
  --env=NAME=VALUE        for the container; may be repeated
  --service_account=S     of Kubernetes
  --namespace=N           of Kubernetes
  --dry-run               prints the commands and runs none

  --xpk                   with xpk instead, on a cluster that xpk has made; in place of accelerator and topology:
  --cluster=C --tpu_type=v5litepod-16 --project=P --zone=Z

All other flags go to training. The restart rule is that of launch/local.py as far as Kubernetes can express it: 0 is
the end. 2 fails the JobSet. 75 (preempted), 76 (hung) and pods that Kubernetes itself has disrupted restart all of it
and are not counted. Anything else is a crash: all of it restarts, --max_restarts times at most; Kubernetes does not
see checkpoints, so crashes are counted over the whole run. xpk counts every restart. Needs JobSet 0.10.1 or newer.
"""

import argparse
import math
import re
import shlex
import subprocess
import sys
from typing import Any

from flags import USER_ERROR, Parser, number, value_of

try:
    import yaml
except ImportError:
    print("error: PyYAML is missing: pip install pyyaml", file=sys.stderr)
    sys.exit(USER_ERROR)

CONTAINER = "main"
# Pods of one run start minutes apart, when nodes are made and images are pulled.
START_TIMEOUT = "--start_timeout=3600"
TRAIN = ["python", "-m", "lmboost.train", "--multihost"]


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit status of the command behind it."""
    options, flags = parse(argv)
    command, given = COMMANDS[options.verb](options, flags)
    if options.dry_run:
        print(shlex.join(command) + (f" <<'END_OF_JOBSET'\n{given}END_OF_JOBSET" if given else ""))
        return 0
    try:
        return subprocess.run(command, input=given, text=True).returncode
    except FileNotFoundError:
        print(f"error: {command[0]} is not installed, or not on PATH", file=sys.stderr)
        return USER_ERROR


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this launcher's options, the flags of training). A wrong option ends the program with status 2."""
    parser = Parser()
    for name in ("image", "accelerator", "topology", "service_account", "namespace"):
        parser.add_argument(f"--{name}")
    for name in ("cluster", "tpu_type", "project", "zone"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--slices", type=number(int, 1), default=1)
    parser.add_argument("--chips_per_host", type=number(int, 1))
    parser.add_argument("--max_restarts", type=number(int, 0), default=20)
    parser.add_argument("--grace", type=number(int, 1), default=300)
    parser.add_argument("--mount", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--xpk", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    verb, name = (argv + ["", ""])[:2]
    if verb not in COMMANDS:
        parser.error(f"verb {verb!r}: expected {', '.join(COMMANDS)}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        parser.error(f"name {name!r}: expected {verb} NAME, of at most 40 small letters, digits and -")
    options, flags = parser.split(argv[2:])
    options.verb, options.name = verb, name
    needed = ["cluster", "tpu_type"] if options.xpk else ["accelerator", "topology"]
    needed = {"create": ["image", *needed], "delete": needed[:1] if options.xpk else []}.get(verb, [])
    missing = [f"--{n}" for n in needed if not getattr(options, n)]
    if verb == "create":
        missing += [f"--{n}" for n in ("config", "workdir") if not value_of(flags, n)]
    if missing:
        parser.error(f"{missing[0]} is missing (--help shows all flags)")
    if options.topology and not re.fullmatch(r"\d+x\d+(x\d+)?", options.topology):
        parser.error(f"--topology={options.topology}: expected the chips of a slice, such as 4x4 or 2x2x4")
    if options.topology and hosts(options) < 1:
        parser.error(f"--chips_per_host={options.chips_per_host}: --topology={options.topology} is no multiple of it")
    for mount in options.mount:
        if not re.fullmatch(r"[^:/]+:/.*", mount):
            parser.error(f"--mount={mount}: expected BUCKET:/path")
    for variable in options.env:
        if "=" not in variable:
            parser.error(f"--env={variable}: expected NAME=VALUE")
    return options, flags


def _chips_per_host(options: argparse.Namespace) -> int:
    return options.chips_per_host or min(4, _chips(options))


def _chips(options: argparse.Namespace) -> int:
    return math.prod(map(int, options.topology.split("x")))


def hosts(options: argparse.Namespace) -> int:
    """Hosts of one slice; 0 if its chips can't be divided into hosts."""
    whole, rest = divmod(_chips(options), _chips_per_host(options))
    return 0 if rest else whole


def train_command(flags: list[str]) -> list[str]:
    """What each process runs."""
    return TRAIN + ([] if value_of(flags, "start_timeout") else [START_TIMEOUT]) + flags


def create(options: argparse.Namespace, flags: list[str]) -> tuple[list[str], str | None]:
    """(command, its standard input) that starts training."""
    if not options.xpk:
        return kubectl(options, "apply", "--filename=-"), yaml.safe_dump(jobset(options, flags), sort_keys=False)
    command = ["xpk", "workload", "create", f"--workload={options.name}", *_xpk_place(options)]
    command += [f"--tpu-type={options.tpu_type}", f"--num-slices={options.slices}", f"--docker-image={options.image}"]
    # All but 2; xpk itself adds 127 to 255.
    command += [f"--max-restarts={options.max_restarts}", "--restart-on-exit-codes=1,3-126"]
    command += [f"--termination-grace-period-seconds={options.grace}"]
    command += [f"--env={variable}" for variable in options.env] + ["--spot"] * options.spot
    # exec: xpk passes SIGTERM to its own subshell, which has to be the training itself.
    return command + ["--command=exec " + shlex.join(train_command(flags))], None


def logs(options: argparse.Namespace, _) -> tuple[list[str], None]:
    """(command, nothing) that shows the output of the first process."""
    labels = {
        "jobset.sigs.k8s.io/jobset-name": options.name,
        "jobset.sigs.k8s.io/job-index": "0",
        "batch.kubernetes.io/job-completion-index": "0",
    }
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    return kubectl(options, "logs", "--follow", "--tail=-1", f"--selector={selector}"), None


def delete(options: argparse.Namespace, _) -> tuple[list[str], None]:
    """(command, nothing) that ends training and deletes its objects."""
    if options.xpk:
        return ["xpk", "workload", "delete", f"--workload={options.name}", *_xpk_place(options), "--force"], None
    return kubectl(options, "delete", "jobset", options.name), None


COMMANDS = {"create": create, "logs": logs, "delete": delete}


def kubectl(options: argparse.Namespace, verb: str, *arguments: str) -> list[str]:
    """A command of kubectl in the namespace."""
    namespace = [f"--namespace={options.namespace}"] if options.namespace else []
    return ["kubectl", verb, *namespace, *arguments]


def _xpk_place(options: argparse.Namespace) -> list[str]:
    given = {name: getattr(options, name) for name in ("cluster", "project", "zone", "namespace")}
    return [f"--{name}={value}" for name, value in given.items() if value]


def jobset(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """The JobSet: one Job a slice, one pod a host, restarts as the rule says."""
    job = {
        "parallelism": hosts(options),
        "completions": hosts(options),
        "backoffLimit": 0,  # any failed pod fails the job, and so restarts the whole set
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [2, 75, 76]},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": {"annotations": pod_annotations(options)}, "spec": pod(options, flags)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            # One slice to one node pool, all of it.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True},  # makes the headless service
            "failurePolicy": {
                "maxRestarts": options.max_restarts,
                "restartStrategy": "BlockingRecreate",  # no process meets one of the attempt before
                "rules": [
                    {
                        "name": "userError",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                        "onJobFailureMessagePatterns": ["failed with exit code 2 matching"],
                    },
                    {
                        "name": "preemptedOrHung",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
        },
    }


def pod_annotations(options: argparse.Namespace) -> dict[str, str]:
    """What asks for the sidecar that mounts buckets."""
    return {"gke-gcsfuse/volumes": "true"} if options.mount else {}


def pod(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """The pod of one host."""
    chips = _chips_per_host(options)
    volumes, mounts = [], []
    for i, mount in enumerate(options.mount):
        bucket, _, path = mount.partition(":")
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": {"bucketName": bucket}}
        volumes.append({"name": f"bucket-{i}", "csi": csi})
        mounts.append({"name": f"bucket-{i}", "mountPath": path, "readOnly": True})
    container = {
        "name": CONTAINER,
        "image": options.image,
        "command": [word.replace("$(", "$$(") for word in train_command(flags)],  # which Kubernetes would replace
        "env": [dict(zip(("name", "value"), e.split("=", 1), strict=True)) for e in options.env],
        "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
        "securityContext": {"privileged": True, "runAsUser": 0},  # the TPU's device files are root's
        "volumeMounts": mounts,
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": options.accelerator,
            "cloud.google.com/gke-tpu-topology": options.topology,
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
        "volumes": volumes,
    }
    if options.spot:
        spec["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        spec["tolerations"].append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if options.slices > 1:  # the host's own network is faster between slices
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return spec


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    sys.exit(main(sys.argv[1:]))
