"""Compiles a recipe's steps for a TPU pod on a machine that has none, and says what the compiler made of them.

    python -m lmboost.aot --config=configs/salt_2p8b.py --topology=v5e:16x16

  --config=FILE[:VARIANT]   the recipe; it needs neither data nor a trained teacher
  --config.a.b=VALUE        overrides one field of it (lmboost/config.py lists all of them)
  --topology=CHIP:SHAPE     the pod, as v5e:16x16 (256 chips), v5p:4x4x4 (64 chips, 128 cores), v6e:16x16
  --slices=N                that many such pods, connected by the data centre's network; the batch is spread over them
  --teacher=PRESET          the helpers' model (lmboost/models/presets.py); left out: of the recipe's :teacher
  --phases=first            only the first phase, which has the most help; left out, every one
  --out=FILE.json           where the numbers are written, too
  --traceback               shows the traceback of a user error

For each phase: memory of a chip, model FLOPs, and the collectives, with what a chip receives in one step. What a
sharded step must not do is looked for and told: tensors that the partitioner could only replicate ("involuntary full
rematerialization"), and collectives that move the logits of more than a block of tokens, or a stack of all layers
unsharded, or that add up gradients in less than float32. Needs libtpu (pip install "jax[tpu]"), and no TPU.
"""

import atexit
import dataclasses
import glob
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import config as configs
from lmboost import optimizers, plan, schedules, sharding
from lmboost.aot import hlo
from lmboost.aot.problems import PROBLEMS, describe, moved_logits, moved_stack, rounded_sum
from lmboost.errors import UserError, exit_on_user_error, nearest, one_of
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.models.presets import preset
from lmboost.teacher import Helper
from lmboost.train_step import init_params, init_state, jit_train_step

# Memory of one jax device in GiB, and the topologies that the compiler has. https://cloud.google.com/tpu/docs
HBM = {"v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
TOPOLOGIES = tuple(f"{chip}:{shape}" for chip in HBM for shape in (FLAT if chip.endswith("e") else CUBE))

GIB = 2**30


# ---------------------------------------------------------------------- the machine that is not there


def compiler_log() -> str:
    """Makes jax ready to compile for TPUs without one; returns the directory that libtpu will write its log to.

    Must come before libtpu is loaded: it reads its settings once. What was compiled before is not taken from a cache,
    since nothing is logged then.
    """
    directory = tempfile.mkdtemp(prefix="lmboost-aot-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ |= {
        "TPU_LOG_DIR": directory,
        "TPU_MIN_LOG_LEVEL": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so that another process may use one
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # of this machine: else it is looked for, with warnings
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    return directory


def devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """The devices of a pod, or of several. A UserError where there is no such pod, or no compiler for it."""
    if topology not in TOPOLOGIES:
        raise UserError(
            f"--topology={topology!r} is not known{nearest(topology, TOPOLOGIES)}: expected one of "
            f"{', '.join(TOPOLOGIES)}."
        )
    if slices < 1:
        raise UserError(f"--slices={slices} must be at least 1.")
    from jax.experimental import topologies

    several = {"num_slices": slices} if slices > 1 else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    except (RuntimeError, ModuleNotFoundError) as error:
        raise UserError(
            f"the TPU compiler does not start: {str(error).splitlines()[0]} It needs libtpu: pip install 'jax[tpu]'."
        ) from error


def rematerialisations(log: str) -> list[str]:
    """The tensors that the partitioner could only replicate and cut anew, by what libtpu's log says of them.

    Raises a RuntimeError where there is no log: nothing would be no news then.
    """
    files = glob.glob(os.path.join(log, "*.log.INFO.*"))
    if not files:
        raise RuntimeError(f"libtpu has written no log to {log}: it was loaded before compiler_log was called.")
    lines = [line for file in files for line in open(file, errors="replace")]
    return [line.split("] ", 1)[-1].strip() for line in lines if "nvoluntary full rematerialization" in line]


# ---------------------------------------------------------------------- the step


def teacher_of(c: ConfigDict, recipe: str, named: str = "") -> ModelConfig | None:
    """The helpers' model: the preset that is named, or that of the recipe's variant "teacher"; None if none helps."""
    if not any(helps for _, helps in schedules.help_phases(c.objective, c.steps)):
        return None
    if named:
        return preset(named)
    path, _, variant = recipe.partition(":")
    words = [w for w in variant.split(",") if w.strip() == "tiny"]
    try:
        return ModelConfig(**configs.load_recipe(":".join([path, ",".join(["teacher", *words])])).model)
    except UserError as error:
        raise UserError(
            f"--config={recipe} has help, but no variant 'teacher' that says by what: give --teacher=PRESET."
        ) from error


def make_run(c: ConfigDict, teacher: ModelConfig | None, num_devices: int) -> plan.Plan:
    """The plan of a run on TPUs, as `plan.make` has it, without data or checkpoints: no program depends on them."""
    plan.check_numbers(c, num_devices)
    student = ModelConfig(**c.model).fit(c.seq_len, "tpu")
    phases = schedules.help_phases(c.objective, c.steps)
    active = frozenset().union(*(helps for _, helps in phases))
    helper = None
    if active:
        model = dataclasses.replace(teacher, dtype=c.teacher.dtype, remat="none", attention="auto")
        helper = Helper(None, model.fit(c.seq_len, "tpu", "the teacher's model"))
    objective = plan.make_objective(c, student, helper and helper.model, active)
    selecting = tuple((first, end) for first, end, helps in plan.spans(phases, c.steps) if "select" in helps)
    rows = plan.Rows(c.batch_size, objective.select.candidates, selecting)
    return plan.Plan(c, student, objective, phases, rows, None, None, helper, helper, {})


def lower(run: plan.Plan, mesh: Mesh, first: int, helps: frozenset[str]) -> Any:
    """The lowered step of the phase that begins at step `first`, on arguments laid out as those of a run are."""
    c, teacher = run.config, run.teacher and run.teacher.model

    def place(tree):
        places = sharding.tree_sharding(tree, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)

    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda: init_params(run.student, run.objective, c.seed, teacher))
        tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, params)
        state = place(jax.eval_shape(lambda params: init_state(params, tx), params))
        helpers = {}
        if helps:
            like = jax.eval_shape(lambda: transformer.init(teacher, jax.random.key(0)))
            like = place(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, c.teacher.dtype), like))
            needed = {"teacher": helps & {"kd", "align"}, "scorer": helps & {"select"}}
            helpers = {name: like for name, wanted in needed.items() if wanted}
        place_row = sharding.batch_sharding(mesh)
        row = jax.ShapeDtypeStruct((run.rows(first)[1], c.seq_len), jnp.int32, sharding=place_row)
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
        batch["weights"] = jax.ShapeDtypeStruct(row.shape, jnp.float32, sharding=place_row)
        return jit_train_step(run, tx, learning_rate, helps, state).lower(state, helpers, batch)


def compile_text(lowered: Any) -> tuple[Any, str]:
    """(compiled program, its text after all passes), the latter as the compiler itself wrote it.

    Programs for some TPUs have instructions that jax can't read back, so its own `as_text` fails on them.
    """
    with tempfile.TemporaryDirectory(prefix="lmboost-aot-") as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        texts = glob.glob(os.path.join(directory, "*.after_codegen.txt"))
        if len(texts) != 1:
            raise RuntimeError(f"the compiler wrote {len(texts)} texts of one program: {os.listdir(directory)}.")
        with open(texts[0]) as file:
            return compiled, file.read()


# ---------------------------------------------------------------------- what must not be


# ---------------------------------------------------------------------- the report


def compile_phases(run: plan.Plan, mesh: Mesh, chip: str, log: str, only_first: bool = False) -> Iterator[dict]:
    """Compiles the step of each phase and yields what there is to say of it, as plain values; sizes in bytes."""
    models = [run.student] + ([run.teacher.model] if run.teacher else [])
    for first, end, helps in run.spans()[: 1 if only_first else None]:
        known, began = len(rematerialisations(log)), time.monotonic()
        try:
            compiled, text = compile_text(lower(run, mesh, first, helps))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _too_large(str(error), chip, helps) from error
        collectives = hlo.Program(text, mesh.size).collectives()
        moved = Counter()
        for one in collectives:
            moved[one.kind] += one.times * one.bytes
        block = run.config.objective.block_tokens
        yield {
            "first": first,
            "end": end,
            "helps": sorted(helps),
            "seconds": time.monotonic() - began,
            "memory": memory_of(compiled) | {"limit": HBM[chip] * GIB},
            "flops": run.flops(first + 1) - run.flops(first),
            "collectives": dict(sorted(moved.items())),
            "largest": [describe(one) for one in sorted(collectives, key=lambda x: -x.largest.bytes)[:3]],
            "moved_logits": [describe(x) for x in collectives if moved_logits(x, models, block, mesh)],
            "moved_stacks": [describe(x) for x in collectives if moved_stack(x, models, mesh)],
            "rounded_sums": [describe(x) for x in collectives if rounded_sum(x, mesh)],
            "rematerialised": rematerialisations(log)[known:],
        }


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes that a program needs on a chip, by what for. `outputs` is what does not take an argument's place.

    Temporaries are what the peak has besides; their own figure counts some twice in older compilers.
    """
    said = compiled.memory_analysis()
    arguments, outputs = said.argument_size_in_bytes, said.output_size_in_bytes - said.alias_size_in_bytes
    peak, code = said.peak_memory_in_bytes, said.generated_code_size_in_bytes
    temporaries = peak - arguments - outputs
    return {
        "arguments": arguments, "outputs": outputs, "temporaries": temporaries, "code": code, "total": peak + code,
    }  # fmt: skip


def _too_large(said: str, chip: str, helps: Sequence[str]) -> UserError:
    sentence = re.search(r"Ran out of memory.*?(?=\. [A-Z]|\.?\n|$)", said)
    return UserError(
        f"the step {_named(helps)} does not fit into the {HBM[chip]} GiB of a {chip} chip. The compiler says: "
        f"{sentence[0] if sentence else said}. Rematerialise more (model.remat='full'), work through the batch in "
        "parts (accumulation=2), or spread the parameters over more chips (mesh.fsdp, mesh.tensor)."
    )


def _named(helps: Sequence[str]) -> str:
    return f"with {', '.join(sorted(helps))}" if helps else "alone"


def show(phase: dict) -> str:
    """A phase's numbers in lines for people."""
    memory, problems = phase["memory"], []
    if memory["total"] > memory["limit"]:
        problems.append("  WARNING: this is more than a chip has")
    for name, says in PROBLEMS.items():
        problems += [f"  WARNING: {says}: {one}" for one in phase[name]]
    moved = ", ".join(f"{kind} {n / GIB:.3g} GiB" for kind, n in phase["collectives"].items())
    parts = ", ".join(f"{name} {memory[name] / GIB:.3g}" for name in ("arguments", "temporaries", "outputs", "code"))
    return "\n".join([
        f"steps {phase['first']:,} to {phase['end']:,}, {_named(phase['helps'])}: compiled in {phase['seconds']:.0f} s",
        f"  model FLOPs of a step, all chips: {phase['flops']:.3g}",
        f"  memory of a chip: {memory['total'] / GIB:.2f} of {memory['limit'] / GIB:.0f} GiB ({parts})",
        f"  a chip receives in a step: {moved or 'nothing'}",
        *(f"  largest piece: {one}" for one in phase["largest"][:1]),
        *(problems or [f"  none found of: {'; '.join(PROBLEMS.values())}"]),
    ])  # fmt: skip


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("--help", "-h"):
        sys.exit(print(__doc__))
    own, rest = {"topology": "", "slices": "1", "teacher": "", "phases": "all", "out": ""}, []
    for argument in argv:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in own and argument.startswith("--"):
            own[name] = value
        else:
            rest.append(argument)
    c, _ = configs.load([*rest, "--workdir=unused"])
    recipe = re.findall(r"--config[=\n](.*)", "\n".join(rest))[-1]  # what load has read
    one_of("--phases", own["phases"], ("all", "first"))
    if not own["slices"].isdigit():
        raise UserError(f"--slices={own['slices']}: expected a whole number.")

    log = compiler_log()
    pod = devices(own["topology"], int(own["slices"]))
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices=pod)
    run = make_run(c, teacher_of(c, recipe, own["teacher"]), len(pod))
    chip = own["topology"].partition(":")[0]
    helper = f", helped by {run.teacher.model.num_params():,}" if run.teacher else ""
    print(f"{recipe}: {run.student.num_params():,} parameters{helper}")
    where = f"on {own['slices']} x {own['topology']}: {len(pod)} x {pod[0].device_kind}"
    print(f"{where}, mesh {dict(mesh.shape)}", flush=True)
    report = {
        "recipe": recipe, "overrides": [a for a in rest if not a.startswith("--config=")],
        "topology": own["topology"], "slices": int(own["slices"]), "devices": len(pod), "mesh": dict(mesh.shape),
        "parameters": run.student.num_params(), "jax": jax.__version__,
        "libtpu": metadata.version("libtpu"), "phases": [],
    }  # fmt: skip
    for phase in compile_phases(run, mesh, chip, log, own["phases"] == "first"):
        print(show(phase), flush=True)
        report["phases"].append(phase)
    if own["out"]:
        with open(own["out"], "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--traceback"]
    exit_on_user_error(lambda: main(arguments), show_traceback="--traceback" in sys.argv)
