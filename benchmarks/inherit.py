"""Inherited half depth against scratch half depth and full depth, on the quickstart's data, over several seeds.

    python benchmarks/inherit.py [--seeds=0,1,2] [--out=runs/benchmark] [--result=benchmarks/results/inherit.md]

For each seed: the quickstart's student (6 layers), its first 3 layers trained again, and 3 layers from scratch, for as
many steps. Every run is a call of the train verb; what is finished is not run again, and data and full-depth runs are
those of benchmarks/quickstart.py where that was run before. About 4 minutes a seed on two CPU cores.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import jax

HALF = ("--config.model.num_layers=3",)
ARMS = {
    "full depth, scratch": ("plain", ()),
    "half depth, scratch": ("half-scratch", HALF),
    "half depth, inherited": ("half-inherited", (*HALF, "--config.init.kind=inherit")),
}
HEADER = """\
# Half depth, inherited

`python benchmarks/inherit.py` wrote this: jax {jax}, {device}. Final validation loss in nats per token; FLOPs of the
run, of the full-depth run's; for the inherited one, in brackets, with the full-depth run that it needs.

| seed | run | layers | final validation loss | FLOPs |
|---|---|---|---|---|
"""


def verb(name: str, *flags: str) -> None:
    print("python -m", f"lmboost.{name}", *flags, flush=True)
    subprocess.run([sys.executable, "-m", f"lmboost.{name}", *flags], check=True)


def train(out: str, seed: int, name: str, flags: tuple[str, ...]) -> dict:
    """The last evaluation of a run, as metrics.jsonl has it."""
    workdir = f"{out}/{seed}/{name}"
    if "--config.init.kind=inherit" in flags:
        flags = (*flags, f"--config.init.from={out}/{seed}/plain")
    recipe = ["--config=configs/quickstart.py:plain", f"--config.data.train={out}/data", f"--config.seed={seed}"]
    verb("train", *recipe, f"--workdir={workdir}", *flags)
    with open(f"{workdir}/metrics.jsonl") as file:
        return [line for line in map(json.loads, file) if line.get("val_loss") is not None][-1]


def rows(out: str, seed: int) -> list[str]:
    lines, whole = [], 0.0
    for arm, (name, flags) in ARMS.items():
        end = train(out, seed, name, flags)
        whole = whole or end["flops"]
        share = f"{end['flops'] / whole:.2f}" + (f" ({1 + end['flops'] / whole:.2f})" if "inherited" in arm else "")
        lines.append(f"| {seed} | {arm} | {3 if flags else 6} | {end['val_loss']:.4f} | {share} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--result", default="benchmarks/results/inherit.md")
    flags = parser.parse_args()
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    verb(
        "prepare", "--source=stdlib", "--tokenizer=train:2048", "--validation_fraction=0.05", f"--out={flags.out}/data"
    )
    lines = [line for seed in flags.seeds.split(",") for line in rows(flags.out, int(seed))]
    text = HEADER.format(jax=jax.__version__, device=jax.devices()[0].device_kind) + "\n".join(lines) + "\n"
    os.makedirs(os.path.dirname(flags.result), exist_ok=True)
    pathlib.Path(flags.result).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
