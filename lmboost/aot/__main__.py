"""Compiles a recipe's steps for a TPU pod on a machine that has none, and says what the compiler made of them.

    python -m lmboost.aot --config=configs/salt_2p8b.py --topology=v5e:16x16

  --config=FILE[:VARIANT]   the recipe; it needs neither data nor a trained teacher
  --config.a.b=VALUE        overrides one field of it (lmboost/config.py lists all of them)
  --topology=CHIP:SHAPE     the pod, as v5e:16x16 (256 chips), v5p:4x4x4 (64 chips, 128 cores), v6e:16x16; or by its
                            size, as v5e-256, v5p-128, tpu7x-64
  --slices=N                that many such pods, connected by the data centre's network; the batch is spread over them
  --teacher=PRESET          the helpers' model (lmboost/models/presets.py); left out: of the recipe's :teacher
  --phases=first            only the first phase, which has the most help; left out, every one
  --disk                    the first phase also with what the helpers have said before the run (lmboost.score)
  --out=FILE.json           where the numbers are written, too
  --traceback               shows the traceback of a user error

For each phase: memory of a chip, model FLOPs, the collectives, with what a chip receives in one step, and the time of
a step by the compiler's own estimate; at the end, the chip-hours of the whole run, plain and helped. What a
sharded step must not do is looked for and told: tensors that the partitioner could only replicate ("involuntary full
rematerialization"), and collectives that move the logits of more than a block of tokens, or a stack of all layers
unsharded, or that add up gradients in less than float32. Needs libtpu (pip install "jax[tpu]"), and no TPU.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import jax

from lmboost import config as configs
from lmboost import sharding
from lmboost.aot import bill, chips
from lmboost.aot.bill import Bill
from lmboost.aot.chips import CHIPS
from lmboost.aot.compiler import GIB, compile_from_disk, compile_phases, compiler_log, devices, libtpu_version, named
from lmboost.aot.problems import PROBLEMS
from lmboost.aot.step import make_run, teacher_of
from lmboost.errors import one_of, run_verb


def show(phase: dict, one: Bill, tokens: int, num_devices: int) -> str:
    """A phase's numbers in lines for people; `one` is the bill of its step of so many tokens."""
    memory, problems = phase["memory"], []
    if memory["total"] > memory["limit"]:
        problems.append("  WARNING: this is more than a chip has")
    for name, says in PROBLEMS.items():
        problems += [f"  WARNING: {says}: {one}" for one in phase[name]]
    moved = ", ".join(f"{kind} {n / GIB:.3g} GiB" for kind, n in phase["collectives"].items())
    rate = f"{tokens / one.seconds:,.0f} tokens/s, {tokens / one.seconds / num_devices:,.0f} a chip"
    parts = ", ".join(f"{name} {memory[name] / GIB:.3g}" for name in ("arguments", "temporaries", "outputs", "code"))
    return "\n".join([
        f"steps {phase['first']:,} to {phase['end']:,}, {named(phase['helps'])}: compiled in {phase['seconds']:.0f} s",
        f"  model FLOPs of a step, all chips: {phase['flops']:.3g}",
        f"  memory of a chip: {memory['total'] / GIB:.2f} of {memory['limit'] / GIB:.0f} GiB ({parts})",
        f"  a chip receives in a step: {moved or 'nothing'}",
        f"  estimated: {one.seconds:.3g} s a step, bound by {one.bound}; MFU {one.mfu:.0%}, {rate}",
        *(f"  largest piece: {one}" for one in phase["largest"][:1]),
        *(problems or [f"  none found of: {'; '.join(PROBLEMS.values())}"]),
    ])  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(configs.Flags):
    """The flags of this verb. It writes to no workdir; one may be given, as in the command that is tried."""

    workdir: str = ""
    topology: str = configs.required("the pod, as in --topology=v5e:16x16")
    slices: int = 1
    teacher: str = ""
    phases: str = "all"
    disk: bool = False
    out: str = ""


def main(argv: Sequence[str]) -> None:
    c, flags = configs.read(argv, Flags)
    one_of("--phases", flags.phases, ("all", "first"))

    topology = chips.topology(flags.topology)
    log = compiler_log()
    pod = devices(topology, flags.slices)
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices=pod)
    run = make_run(c, teacher_of(c, flags.config, flags.teacher), len(pod))
    helper = f", helped by {run.teacher.model.num_params():,}" if run.teacher else ""
    print(f"{flags.config}: {run.student.num_params():,} parameters{helper}")
    where = f"on {flags.slices} x {topology}: {len(pod)} x {pod[0].device_kind}"
    print(f"{where}, mesh {dict(mesh.shape)}", flush=True)
    report = {
        "recipe": flags.config, "overrides": [a for a in argv if a.startswith(("--config.", "--noconfig."))],
        "topology": topology, "slices": flags.slices, "devices": len(pod), "mesh": dict(mesh.shape),
        "parameters": run.student.num_params(), "jax": jax.__version__,
        "libtpu": libtpu_version(), "phases": [],
    }  # fmt: skip
    chip = topology.partition(":")[0]

    def tell(phase: dict) -> None:
        one = bill.of_phase(phase, CHIPS[chip], len(pod))
        print(show(phase, one, run.batch_size * run.seq_len, len(pod)), flush=True)
        phase["estimate"] = {"seconds": one.seconds, "bound": one.bound, "mfu": one.mfu}

    for phase in compile_phases(c, run, mesh, chip, log, flags.phases == "first"):
        tell(phase)
        report["phases"].append(phase)
    if flags.disk and report["phases"][0]["helps"]:
        print("the first phase, with what the helpers have said before the run:")
        report["disk"] = compile_from_disk(c, run, mesh, chip, log)
        tell(report["disk"])
    if not report["phases"][-1]["helps"]:
        report["chip_hours"] = bill.of_run(report["phases"], report.get("disk"), run, CHIPS[chip], len(pod))
        hours = ", ".join(f"{name} {n:,.0f}" for name, n in report["chip_hours"].items())
        until = f", help until {bill.AUTO:.0%} of it" if run.objective.auto else ""
        print(f"estimated chip-hours of the whole run{until}: {hours}")
    if flags.out:
        pathlib.Path(os.path.expanduser(flags.out)).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_verb(main, __doc__)
