"""How the TPU compiler schedules splash attention in blocks of several sizes; no TPU is needed.

    python -m benchmarks.splash_blocks [--chips=v4,v5e,v5p,v6e,tpu7x] [--heads=128,64]
        [--result=benchmarks/results/splash_blocks.md]

Compiles the forward kernel and the two of the backward pass for one chip, and counts the instruction words (bundles)
that each has for one block of scores: cycles, if nothing waits. About 10 minutes on one core.
"""

import argparse
import itertools
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from lmboost.aot import bill, compiler
from lmboost.errors import run_flags
from lmboost.models import attention

TOKENS, QUERIES, GROUPS = 4096, 4, 2  # query heads of each of so many key/value heads
CANDIDATES = ((512, 512), (512, 1024), (1024, 512), (1024, 1024))
LENGTHS = (1024, 2048, 4096, 8192, 32768)
PODS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
UNIT = 512  # figures are for so many queries times so many keys
TEXT = """\
# Splash attention in blocks

`python -m benchmarks.splash_blocks` wrote this: jax {jax}, libtpu {libtpu}, causal with segments, bfloat16. Cycles
are the bundles of a kernel's schedule for one block of scores, for {unit} queries and {unit} keys of one head; that a
kernel waits for memory is not in them, nor what a step of its grid costs beside. The last columns are the cycles of
all three kernels over a row of so many tokens, scores of the future that blocks on the diagonal hold included, against
blocks of 512 x 512.

| chip | head size | queries x keys of a block | forward | backward, keys and values | backward, queries | {lengths} |
|---|---|---|---|---|---|{dashes}|
"""


def lower(device, head_dim: int, queries: int, keys: int):
    """The lowered kernels, forward and backward, in such blocks."""
    sizes = attention.splash_blocks(queries, keys)

    def loss(q, k, v, segment_ids):
        kernel = attention.splash_kernel(QUERIES, TOKENS, False, 0, sizes)
        segments = splash.SegmentIds(q=segment_ids, kv=segment_ids)
        y = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    there = jax.sharding.SingleDeviceSharding(device)
    shapes = ((GROUPS, QUERIES, TOKENS, head_dim), (GROUPS, TOKENS, head_dim), (GROUPS, TOKENS, head_dim))
    arrays = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=there) for shape in shapes]
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, jax.ShapeDtypeStruct((TOKENS,), "int32", sharding=there))


def schedules(lowered, dump: pathlib.Path) -> dict[str, int] | None:
    """Bundles of each kernel, None where blocks do not fit into a chip's vector memory."""
    for path in dump.iterdir():
        path.unlink()
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "vmem" not in str(error).lower():
            raise
        return None
    found = {}
    for kernel in bill.KERNELS:
        (path,) = dump.glob(f"*-splash_mqa_{kernel}*schedule-analysis_final_bundles.txt")
        found[kernel] = int(re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())[1])
    return found


def blocks_of(tokens: int, queries: int, keys: int) -> int:
    """Units of scores that a causal row is worked through in."""
    queries, keys = min(queries, tokens), min(keys, tokens)
    columns = sum(-(-(row + queries) // keys) for row in range(0, tokens, queries))
    return columns * queries * keys // UNIT**2


def main(chips: str, heads: str, result: str) -> None:
    with tempfile.TemporaryDirectory(prefix="splash-blocks-") as dump:
        os.environ["LIBTPU_INIT_ARGS"] = (  # before libtpu is loaded
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles"
        )
        compiler.compiler_log()
        rows = list(table(chips.split(","), [int(n) for n in heads.split(",")], pathlib.Path(dump)))
    text = TEXT.format(
        jax=jax.__version__, libtpu=compiler.libtpu_version(), unit=UNIT,
        lengths=" | ".join(f"{n:,}" for n in LENGTHS), dashes="|".join(["---"] * len(LENGTHS)),
    )  # fmt: skip
    pathlib.Path(result).write_text(text + "\n".join(rows) + "\n")


def table(chips: list[str], heads: list[int], dump: pathlib.Path) -> Iterator[str]:
    """A row for each chip, size of head, and block."""
    for chip, head_dim in itertools.product(chips, heads):
        device, first = compiler.devices(PODS[chip])[0], None
        for queries, keys in CANDIDATES:
            found = schedules(lower(device, head_dim, queries, keys), dump)
            cells = [chip, str(head_dim), f"{queries:,} x {keys:,}"]
            if found is None:
                cells += ["too large", *[""] * (len(bill.KERNELS) + len(LENGTHS) - 1)]
            else:
                cycles = {kernel: found[kernel] / (queries * keys // UNIT**2) for kernel in bill.KERNELS}
                total = {n: sum(cycles.values()) * blocks_of(n, queries, keys) for n in LENGTHS}
                first = first or total
                cells += [f"{n:,.0f}" for n in cycles.values()]
                cells += [f"{total[n] / first[n]:.2f}" if n >= max(queries, keys) else "" for n in LENGTHS]
            print(row := f"| {' | '.join(cells)} |", flush=True)
            yield row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="v4,v5e,v5p,v6e,tpu7x")
    parser.add_argument("--heads", default="128,64")
    parser.add_argument("--result", default="benchmarks/results/splash_blocks.md")
    run_flags(main, parser)
