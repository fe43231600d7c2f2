"""What the TPU compiler makes of the full-size recipes on pods: memory, FLOPs, and what is sent between chips.

    python benchmarks/pods.py [--only=salt_2p8b] [--only=v5e] [--keep=DIR] [--result=benchmarks/results/pods.md]

Compiles every phase of every recipe for every pod, each recipe in a process of its own, on a machine without a TPU
(lmboost/aot). --only takes the cases whose name contains all of the words that are given, and prints their rows
without writing the table. With --keep, numbers are kept in DIR, and what is there is not compiled again. The whole
takes about half an hour on two CPU cores, and 4 GB of memory.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

HOME = pathlib.Path(__file__).resolve().parent.parent
# With help that ends at a step, so that its phases are known beforehand.
RECIPES = {
    "salt_2p8b": ["--config=configs/salt_2p8b.py:paper"],
    "salt_8p6b": ["--config=configs/salt_8p6b.py:paper"],
    "let_7b": ["--config=configs/let_7b.py", "--config.objective.align.stop=0.3"],
}
PODS = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")
CASES = [(recipe, pod, 1) for recipe in RECIPES for pod in PODS] + [("salt_2p8b", "v5e:16x16", 2)]
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all", "all-reduce between slices")
PROBLEMS = ("rematerialised", "moved_logits", "moved_stacks", "rounded_sums")
GIB = 2**30
RESULT = """\
# Full-size recipes on TPU pods

`python benchmarks/pods.py` wrote this with the TPU compiler, on a machine without a TPU: jax {jax}, libtpu {libtpu}.
Nothing was run. The recipes are those of `configs/` with help until a fixed step, helped phase first; v5p:4x4x4
are 64 chips of two cores.

Memory is of one chip: arguments (state, helper, batch), temporaries and code, against what the chip has. FLOPs are
model FLOPs of one step over all chips. Received is what one chip gets from others in one step, if each collective is
done as a ring: (n - 1) / n of the whole for a gather or a scatter, twice that for an all-reduce. On a mesh axis that
is a whole torus the compiler does a scatter as an all-reduce of which each chip keeps a slice.

| recipe | pod | mesh (data, fsdp, tensor) | phase | memory / limit (GiB) | FLOPs | {kinds} | problems |
|---|---|---|---|---|---|{dashes}|---|
{rows}

Received in GiB. Problems counts what `lmboost/aot` looks for: tensors that the partitioner could only replicate
("involuntary full rematerialization"), and collectives that move logits of more than a block of tokens or the matrices
of all layers unsharded, or that add up gradients in less than float32.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--keep", default="")
    parser.add_argument("--result", default=str(HOME / "benchmarks/results/pods.md"))
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        kept = pathlib.Path(flags.keep or temporary)
        kept.mkdir(parents=True, exist_ok=True)
        chosen = [case for case in CASES if all(word in name(*case) for word in flags.only)]
        reports = [compiled(kept, *case) for case in chosen]
    used = [k for k in KINDS if any(k in phase["collectives"] for report in reports for phase in report["phases"])]
    rows = "\n".join(row(report, phase, used) for report in reports for phase in report["phases"])
    text = RESULT.format(
        jax=reports[0]["jax"], libtpu=reports[0]["libtpu"], rows=rows,
        kinds=" | ".join(used), dashes="|".join(["---"] * len(used)),
    )  # fmt: skip
    print(rows if flags.only else text)
    if not flags.only:
        pathlib.Path(flags.result).write_text(text)


def name(recipe: str, pod: str, slices: int) -> str:
    return f"{recipe} {slices} x {pod}" if slices > 1 else f"{recipe} {pod}"


def compiled(kept: pathlib.Path, recipe: str, pod: str, slices: int) -> dict:
    """The numbers of a recipe on a pod, from `kept` if they are there."""
    path = kept / f"{name(recipe, pod, slices).replace(' ', '-').replace(':', '-')}.json"
    if not path.exists():
        command = [sys.executable, "-m", "lmboost.aot", *RECIPES[recipe], f"--topology={pod}"]
        environment = os.environ | {"PYTHONPATH": str(HOME)}
        subprocess.run([*command, f"--slices={slices}", f"--out={path}"], cwd=HOME, env=environment, check=True)
    return json.loads(path.read_text())


def row(report: dict, phase: dict, kinds: list[str]) -> str:
    memory, moved = phase["memory"], phase["collectives"]
    pod = f"{report['slices']} x {report['topology']}" if report["slices"] > 1 else report["topology"]
    cells = [
        pathlib.Path(report["recipe"].partition(":")[0]).stem, pod, " x ".join(map(str, report["mesh"].values())),
        " + ".join(phase["helps"]) or "alone", f"{memory['total'] / GIB:.2f} / {memory['limit'] / GIB:.0f}",
        f"{phase['flops']:.3g}", *(f"{moved[k] / GIB:.2f}" if k in moved else "" for k in kinds),
        str(sum(len(phase[k]) for k in PROBLEMS)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
