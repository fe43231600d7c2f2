"""Memory and time of the loss alone, CE and KD, forward and backward, by the TPU compiler; no TPU is needed.

    python -m benchmarks.objective_cost [--blocks=1024,0,scatter] [--result=benchmarks/results/objective_cost.md]

A vocabulary of 128,256, widths 2048 and 1024, 8,192 tokens a chip, bfloat16, v5e:2x4. About 3 minutes.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmboost import sharding
from lmboost.aot import compiler, hlo
from lmboost.errors import run_flags
from lmboost.models.vocabulary import Head
from lmboost.objective.blend import Coefficients, blend
from lmboost.objective.kd import Distillation, SoftTargets

VOCAB, WIDTH, TEACHER_WIDTH, ROWS, TOKENS = 128_256, 2048, 1024, 4, 2048  # rows of a chip
LAYOUTS = {  # mesh; how the heads lie; how the gradient of the student's does
    "replicated, batch over data": ((8, 1, 1), P(), P()),
    "replicated, gradient scattered over fsdp": ((1, 8, 1), P(), P("fsdp")),
    "sharded over fsdp 8": ((1, 8, 1), P("fsdp"), P("fsdp")),
    "sharded over fsdp 4 x tensor 2": ((1, 4, 2), P("fsdp", "tensor"), P("fsdp", "tensor")),
}
NAMES = {"0": "chosen", "scatter": "of the vocabulary, too"}
TEXT = """\
# The loss alone

`python -m benchmarks.objective_cost` wrote this: jax {jax}, libtpu {libtpu}, {pod}. CE + KD, forward and backward,
V = {vocab:,}, student width {width}, teacher {teacher}, {tokens:,} tokens a chip, bfloat16. Temporaries: what the
program's peak has beside arguments and outputs; in brackets the sum that the compiler reserves. Cycles are its own
estimate of the operations.

| layout of the heads | blocks of tokens | temporaries, GiB | cycles, 10^6 |
|---|---|---|---|
"""


def lower(layout: str, block: str, pod):
    """The lowered loss and its gradient, in blocks of so many tokens, or of the vocabulary ("scatter")."""
    sizes, heads, gradient = LAYOUTS[layout]
    mesh = sharding.make_mesh(*sizes, devices=pod)
    rows = ROWS * sharding.batch_shards(mesh) * (2 if sizes[2] > 1 else 1)  # as many tokens a chip

    def like(shape, kind, spec):
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))

    def loss(h, kernel, teacher_h, teacher_kernel, labels, weights):
        soft = SoftTargets(teacher_h, teacher_kernel, VOCAB, Distillation())
        head, terms = Head(kernel, VOCAB), Coefficients(0.5, 0.5)
        blocks = {"block_tokens": 0, "scatter": True} if block == "scatter" else {"block_tokens": int(block)}
        return blend(h, head, labels, weights, terms, soft, **blocks).loss

    batch = P(("data", "fsdp"))
    arguments = (
        like((rows, TOKENS, WIDTH), jnp.bfloat16, batch), like((WIDTH, VOCAB), jnp.bfloat16, heads),
        like((rows, TOKENS, TEACHER_WIDTH), jnp.bfloat16, batch), like((TEACHER_WIDTH, VOCAB), jnp.bfloat16, heads),
        like((rows, TOKENS), jnp.int32, batch), like((rows, TOKENS), jnp.float32, batch),
    )  # fmt: skip
    places = [NamedSharding(mesh, spec) for spec in (P(), batch, gradient)]
    with jax.set_mesh(mesh):
        both = jax.value_and_grad(loss, (0, 1))
        return jax.jit(both, out_shardings=(places[0], tuple(places[1:]))).lower(*arguments)


def main(blocks: str, result: str) -> None:
    compiler.compiler_log()
    pod = compiler.devices("v5e:2x4")
    text = TEXT.format(
        jax=jax.__version__, libtpu=compiler.libtpu_version(), pod="v5e:2x4", vocab=VOCAB, width=WIDTH,
        teacher=TEACHER_WIDTH, tokens=ROWS * TOKENS,
    )  # fmt: skip
    for layout in LAYOUTS:
        for block in blocks.split(","):
            compiled, program = compiler.compile_text(lower(layout, block, pod))
            peak = compiler.memory_of(compiled)["temporaries"] / compiler.GIB
            reserved = compiled.memory_analysis().temp_size_in_bytes / compiler.GIB
            cycles = hlo.Program(program, len(pod)).cycles() / 1e6
            text += f"| {layout} | {NAMES.get(block, block)} | {peak:.2f} ({reserved:.2f}) | {cycles:.0f} |\n"
            print(text.splitlines()[-1], flush=True)
    pathlib.Path(result).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="1024,0,scatter")
    parser.add_argument("--result", default="benchmarks/results/objective_cost.md")
    run_flags(main, parser)
