"""What help costs on a TPU by the compiler's own estimate: cycles of a helped step over those of a step alone.

    python -m benchmarks.help_cycles [--only=salt_2p8b] [--keep=DIR] [--result=benchmarks/results/help_cycles.md]

Compiles the first and the last phase of each recipe, with the teacher in bfloat16 and with its layers in int8 (needs
qwix), on a machine without a TPU: twelve programs, of some minutes of a core each.
"""

import argparse
import pathlib
import tempfile

from benchmarks import reports
from lmboost.errors import run_flags

# With help that ends at a step, so that its phases are known beforehand.
RECIPES = {
    "salt_2p8b": ["--config=configs/salt_2p8b.py:paper"],
    "salt_8p6b": ["--config=configs/salt_8p6b.py:paper"],
    "let_1p4b": ["--config=configs/let_1p4b.py", "--config.objective.align.stop=0.3"],
    "let_7b": ["--config=configs/let_7b.py", "--config.objective.align.stop=0.3"],
}
POD = "v5p-128"
TEACHERS = ("none", "int8")
TEXT = """\
# What help costs on a TPU, estimated

`python -m benchmarks.help_cycles` wrote this: jax {jax}, libtpu {libtpu}, {pod}. Nothing was run. Ideal is the ratio of
the FLOPs of the two steps: 1 + F_teacher / (3 F_student), heads counted. Cycles are the compiler's estimate of all
operations of a chip, attention's kernels included (benchmarks/results/splash_blocks.md); exchanges between chips are
not in them.

| recipe | teacher's layers | cycles of a step alone, 10^6 | helped / alone | ideal | over ideal |
|---|---|---|---|---|---|
"""


def compiled(kept: pathlib.Path, recipe: str, quantize: str) -> dict:
    """What `lmboost.aot` says of a recipe, of its first phase alone where the last does not depend on `quantize`."""
    flags = [*RECIPES[recipe], f"--topology={POD}", f"--config.teacher.quantize={quantize}"]
    flags += ["--phases=first"] if quantize != "none" else []
    return reports.aot(kept / f"{recipe}-{quantize}.json", *flags)


def main(only: str, keep: str, result: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        kept = pathlib.Path(keep or temporary)
        kept.mkdir(parents=True, exist_ok=True)
        rows = []
        for recipe in [only] if only else RECIPES:
            for quantize in TEACHERS:
                report = compiled(kept, recipe, quantize)
                helped = report["phases"][0]
                if quantize == "none":
                    alone = report["phases"][-1]
                cycles = [phase["cycles"] + phase["attention"] for phase in (helped, alone)]
                ratio, ideal = cycles[0] / cycles[1], helped["flops"] / alone["flops"]
                kind = "bfloat16" if quantize == "none" else quantize
                cells = [
                    recipe,
                    kind,
                    f"{cycles[1] / 1e6:,.0f}",
                    f"{ratio:.3f}",
                    f"{ideal:.3f}",
                    f"{ratio / ideal:.3f}",
                ]
                rows.append(f"| {' | '.join(cells)} |")
                print(rows[-1], flush=True)
    if not only:
        head = TEXT.format(jax=report["jax"], libtpu=report["libtpu"], pod=report["topology"])
        pathlib.Path(result).write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=["", *RECIPES])
    parser.add_argument("--keep", default="")
    parser.add_argument("--result", default=str(reports.HOME / "benchmarks/results/help_cycles.md"))
    run_flags(main, parser)
