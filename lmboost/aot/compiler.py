"""The TPU compiler on a machine that has none: its pods, its log, and what it makes of a run's steps."""

import atexit
import glob
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import answers, flops, plan
from lmboost.aot import bill, buffers, hlo
from lmboost.aot.chips import CHIPS
from lmboost.aot.problems import describe, moved_logits, moved_stack, rounded_sum
from lmboost.aot.step import lower
from lmboost.data.scored import Parts
from lmboost.errors import UserError
from lmboost.models.vocabulary import GROUP_BYTES
from lmboost.objective import terms

GIB = 2**30


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
    """The devices of a pod, or of several. A UserError where there is no compiler for it."""
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


def libtpu_version() -> str:
    """Of the compiler that is installed."""
    return metadata.version("libtpu")


def rematerialisations(log: str) -> list[str]:
    """The tensors that the partitioner could only replicate and cut anew, by what libtpu's log says of them.

    Raises a RuntimeError where there is no log: nothing would be no news then.
    """
    files = glob.glob(os.path.join(log, "*.log.INFO.*"))
    if not files:
        raise RuntimeError(f"libtpu has written no log to {log}: it was loaded before compiler_log was called.")
    lines = [line for file in files for line in open(file, errors="replace")]
    return [line.split("] ", 1)[-1].strip() for line in lines if "nvoluntary full rematerialization" in line]


class TooLarge(Exception):
    """A program that does not fit into a chip's memory: (what the compiler says, the largest buffers)."""


def compile_text(lowered: Any) -> tuple[Any, str]:
    """(compiled program, its text after all passes), the latter as the compiler itself wrote it.

    Programs for some TPUs have instructions that jax can't read back, so its own `as_text` fails on them. Raises
    TooLarge where it does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="lmboost-aot-") as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise TooLarge(str(error), buffers.largest(pathlib.Path(directory))) from error
        texts = glob.glob(os.path.join(directory, "*.after_codegen.txt"))
        if len(texts) != 1:
            raise RuntimeError(f"the compiler wrote {len(texts)} texts of one program: {os.listdir(directory)}.")
        with open(texts[0]) as file:
            return compiled, file.read()


def compile_phases(
    c: ConfigDict, run: plan.Plan, mesh: Mesh, chip: str, log: str, only_first: bool = False
) -> Iterator[dict]:
    """Compiles the step of each phase and yields what there is to say of it, as plain values; sizes in bytes."""
    run = run.ended(run.steps - 2)  # of help that ends by itself, whenever that is: the last step is one after it
    for span in run.spans[: 1 if only_first else None]:
        yield _compiled(c, run, mesh, span, chip, log)


def compile_from_disk(c: ConfigDict, run: plan.Plan, mesh: Mesh, chip: str, log: str) -> dict:
    """As `compile_phases`, of the first phase where the helpers have answered before the run."""
    return _compiled(c, run, mesh, run.spans[0], chip, log, answers.parts_of(run))


def _compiled(
    c: ConfigDict, run: plan.Plan, mesh: Mesh, span: terms.Span, chip: str, log: str, said: Parts | None = None
) -> dict:
    first, end, helps = span
    models = [run.student] + ([run.teacher.model] if run.teacher else [])
    known, began = len(rematerialisations(log)), time.monotonic()
    try:
        compiled, text = compile_text(lower(c, run, mesh, span, said))
    except TooLarge as error:
        raise _does_not_fit(*error.args, chip, helps) from error
    program = hlo.Program(text, mesh.size)
    collectives = program.collectives()
    moved = Counter()
    for one in collectives:
        moved[one.kind] += one.times * one.bytes
    columns = run.student.vocab_rows // mesh.shape["tensor"]
    block = run.objective.block_tokens or GROUP_BYTES // (2 * columns)
    model_flops = run.flops(first + 1) - run.flops(first)
    if said:
        model_flops = flops.step_flops(run.student, run.batch_size, run.seq_len)
    return {
        "first": first,
        "end": end,
        "helps": sorted(helps),
        "seconds": time.monotonic() - began,
        "memory": memory_of(compiled) | {"limit": CHIPS[chip].hbm * GIB},
        "flops": model_flops,
        "cycles": program.cycles(),
        "attention": bill.attention_cycles(program.attentions(), chip),
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


def _does_not_fit(said: str, largest: Sequence[buffers.Buffer], chip: str, helps: Sequence[str]) -> UserError:
    sentence = re.search(r"Ran out of memory.*?(?=\. [A-Z]|\.*(?:\n|$))", said)
    listed = "".join(f"\n  {one.bytes / GIB:.2f} GiB  {one.array}  {one.name}" for one in largest)
    return UserError(
        f"the step {named(helps)} does not fit into the {CHIPS[chip].hbm} GiB of a {chip} chip. The compiler says: "
        f"{sentence[0] if sentence else said}. Rematerialise more (model.remat='full'), work through the batch in "
        "parts (accumulation=2), or spread the parameters over more chips (mesh.fsdp, mesh.tensor)."
        + (f" The largest buffers, arguments by their path:{listed}" if listed else "")
    )


def named(helps: Sequence[str]) -> str:
    return f"with {', '.join(sorted(helps))}" if helps else "alone"
