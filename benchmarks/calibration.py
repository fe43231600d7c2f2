"""Holds the estimates of `lmboost.aot` against published speeds of the same shapes on the same pods.

    python -m benchmarks.calibration [--keep=DIR] [--result=benchmarks/results/calibration.md]

Compiles the plain step of each case, on a machine without a TPU.
"""

import argparse
import pathlib
import tempfile
from typing import NamedTuple

from benchmarks import reports
from lmboost.aot.chips import CHIPS
from lmboost.errors import run_flags


class Case(NamedTuple):
    """A published speed.

    Attributes:
      sizes: of the model: layers, width, heads, key/value heads, MLP, vocabulary.
      rows: of a chip; not published with the speed for all of them.
      published: tokens a second and chip.
    """

    model: str
    pod: str
    sizes: tuple[int, int, int, int, int, int]
    seq_len: int
    rows: int
    published: int


LLAMA2_70B, LLAMA3_8B, LLAMA3_70B = (
    (80, 8192, 64, 8, 28672, 32000), (32, 4096, 32, 8, 14336, 128256), (80, 8192, 64, 8, 28672, 128256),
)  # fmt: skip
CASES = (
    Case("Llama 3.1 8B", "v6e-256", LLAMA3_8B, 8192, 4, 7207),
    Case("Llama 2 70B", "v5p-1024", LLAMA2_70B, 4096, 4, 692),
    Case("Llama 2 70B", "v6e-256", LLAMA2_70B, 4096, 3, 900),
    Case("Llama 3.1 70B", "v6e-256", LLAMA3_70B, 8192, 1, 960),
)
SOURCE = "https://maxtext.readthedocs.io/en/maxtext-v0.2.0/reference/models/tiering.html"
TEXT = """\
# Estimates and published speeds

`python -m benchmarks.calibration` wrote this: jax {jax}, libtpu {libtpu}. Published are speeds of MaxText
({source}),
bfloat16, measured on chips, in tokens a second and chip; estimated is what `lmboost.aot` says of lmboost's plain step
of the same shapes, every layer rematerialised, spread over all chips, which nobody has run. Nothing is fitted; the
last two were kept back until the estimate was as it is. Programs differ: MaxText's keep or
offload what they have room for, where this one computes it again, up to a third more FLOPs. Rows of a chip
are those of its benchmark configurations where these name them.

| model | pod | tokens of a row | rows of a chip | memory / limit (GiB) | bound by | estimated | published | ratio |
|---|---|---|---|---|---|---|---|---|
"""


def flags_of(sizes: tuple[int, ...], pod: str, seq_len: int, rows: int) -> list[str]:
    """The flags of `lmboost.aot` for the plain step of such a model, with so many rows on a chip."""
    layers, width, heads, kv_heads, mlp, vocabulary = sizes
    kind, _, size = pod.partition("-")
    model = {
        "num_layers": layers, "d_model": width, "num_heads": heads, "num_kv_heads": kv_heads, "mlp_dim": mlp,
        "head_dim": width // heads, "vocab_size": vocabulary, "tie_embeddings": "false", "remat": "full",
    }  # fmt: skip
    fields = {f"model.{name}": value for name, value in model.items()}
    fields |= {"seq_len": seq_len, "batch_size": int(size) // (2 if CHIPS[kind].counts_cores else 1) * rows}
    fields |= {"accumulation": 1, "mesh.data": 1, "mesh.fsdp": -1}
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=configs/salt_2p8b.py:plain", f"--topology={pod}", *given]


def compiled(kept: pathlib.Path, case: Case) -> dict:
    """What `lmboost.aot` says of a case."""
    path = kept / f"{case.model}-{case.pod}.json".replace(" ", "-")
    return reports.aot(path, *flags_of(case.sizes, case.pod, case.seq_len, case.rows))


def main(keep: str, result: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        kept = pathlib.Path(keep or temporary)
        kept.mkdir(parents=True, exist_ok=True)
        rows = []
        for case in CASES:
            report = compiled(kept, case)
            phase = report["phases"][-1]
            memory, estimate = phase["memory"], phase["estimate"]
            speed = case.rows * case.seq_len / estimate["seconds"]
            cells = [
                case.model, case.pod, f"{case.seq_len:,}", str(case.rows),
                f"{memory['total'] / 2**30:.1f} / {memory['limit'] / 2**30:.0f}", estimate["bound"], f"{speed:,.0f}",
                f"{case.published:,}", f"{speed / case.published:.2f}",
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    head = TEXT.format(jax=report["jax"], libtpu=report["libtpu"], source=SOURCE)
    pathlib.Path(result).write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", default="")
    parser.add_argument("--result", default=str(reports.HOME / "benchmarks/results/calibration.md"))
    run_flags(main, parser)
