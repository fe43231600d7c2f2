"""A model of half the size: cut out of a trained one by search, cut without one, or from scratch, over several seeds.

    python benchmarks/small_from_large.py [--seeds=0,1,2] [--out=runs/benchmark]
                                          [--result=benchmarks/results/small_from_large.md]

For each seed, on the quickstart's data: the quickstart's student (1.45M parameters) is the parent. Three starts of
0.66 to 0.70M parameters (the best cut of a search, the first entries of everything, random parameters), each with and
without distillation from the parent, and half of the parent's layers, inherited and from scratch; all for as many steps
as the parent's own training, with AdamW. Every run is a call of the public verbs; what is finished is not run again.
About 15 minutes a seed on two CPU cores.

The result has the curves (small_from_large.png, the mean over seeds) and what each start takes to reach the loss of
the random start at its end: tokens, FLOPs, and FLOPs with those of the parent's training and of the search.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from matplotlib.figure import Figure

from lmboost import flops
from lmboost.models.model_config import ModelConfig

# Three quarters of the parent's width and less of all else: 0.68M parameters.
SHAPE = {"num_layers": 4, "d_model": 112, "num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "mlp_dim": 208}
SEARCH = {
    "params": "0.66M-0.7M", "layers": "2-6", "d_model": "64-128:16", "num_kv_heads": "1-4", "head_dim": "16,32",
    "mlp_dim": "64-344:56,344", "candidates": 384, "population": 16, "elites": 4, "rows": 64, "batch": 1,
}  # fmt: skip
DISTIL = {
    "weight": 0.7, "ce_weight": 0.3, "temperature": 0.9, "temperature_on": "both", "handover": "constant", "stop": 1.0,
}  # fmt: skip
ADAMW = {
    "name": "adamw", "learning_rate": 4e-3, "schedule": "cosine", "final_fraction": 0.1, "warmup_steps": 200,
    "weight_decay": 0.1,
}  # fmt: skip
# Arm: (name of its runs, start, is it helped by the parent).
ARMS = {
    "random start": ("small-random", "random", False),
    "arbitrary cut": ("small-cut", "cut", False),
    "searched cut": ("small-searched", "searched", False),
    "random start, searched shape": ("small-shape", "shape", False),
    "random start, distilled": ("small-random-kd", "random", True),
    "arbitrary cut, distilled": ("small-cut-kd", "cut", True),
    "searched cut, distilled": ("small-searched-kd", "searched", True),
    "half depth, scratch": ("half-scratch", "half", False),
    "half depth, inherited": ("half-inherited", "inherited", False),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#009E73", "#999999", "#444444")


def verb(name: str, *flags: str) -> None:
    print("python -m", f"lmboost.{name}", *flags, flush=True)
    subprocess.run([sys.executable, "-m", f"lmboost.{name}", *flags], check=True)


def config_flags(prefix: str, values: dict) -> list[str]:
    return [f"--config.{prefix}.{name}={value}" for name, value in values.items()]


def train(out: str, seed: int, name: str, start: str, helped: bool) -> list[dict]:
    """The evaluations of a run, as metrics.jsonl has them."""
    parent, workdir = f"{out}/{seed}/parent", f"{out}/{seed}/{name}"
    flags = {
        "random": config_flags("model", SHAPE),
        "cut": [*config_flags("model", SHAPE), f"--config.init.path={parent}", "--config.init.kind=subnet"],
        "searched": [],
        "shape": ["--config.init.path="],
        "plain": [],
        "half": ["--config.model.num_layers=3"],
        "inherited": ["--config.model.num_layers=3", f"--config.init.path={parent}", "--config.init.kind=inherit"],
    }[start]
    searched = start in ("searched", "shape")
    recipe = f"{out}/{seed}/search/winner.py" if searched else "configs/quickstart.py:plain"
    flags += [f"--config.data.train={out}/data", f"--config.seed={seed}", *config_flags("optimizer", ADAMW)]
    if helped:
        flags += [*config_flags("objective.kd", DISTIL), f"--config.teacher.path={parent}",
                  "--config.teacher.dtype=float32"]  # fmt: skip
    verb("train", f"--config={recipe}", f"--workdir={workdir}", *flags)
    return evaluations(workdir)


def evaluations(workdir: str) -> list[dict]:
    with open(f"{workdir}/metrics.jsonl") as file:
        return [line for line in map(json.loads, file) if line.get("val_loss") is not None]


def search(out: str, seed: int) -> float:
    """Searches the cut of one seed; returns the FLOPs of all its forward passes."""
    flags = [f"--config.data.train={out}/data", f"--config.seed={seed}", f"--config.init.path={out}/{seed}/parent"]
    workdir = f"{out}/{seed}/search"
    if not os.path.exists(f"{workdir}/winner.py"):
        verb("search", "--config=configs/quickstart.py:plain", f"--workdir={workdir}", *flags,
             *config_flags("search", SEARCH))  # fmt: skip
    with open(f"{out}/{seed}/parent/manifest.json") as file:
        parent = ModelConfig(**json.load(file)["model"])  # candidates are computed in its shape
    return flops.forward_flops(parent, 128) * SEARCH["candidates"] * SEARCH["rows"] * 128


def crossing(lines: list[dict], target: float, field: str) -> float:
    """`field` where the loss first is `target`, linearly between evaluations; inf if never."""
    for before, after in zip([None, *lines], lines, strict=False):
        if after["val_loss"] <= target:
            if before is None:
                return after[field]
            x = (before["val_loss"] - target) / (before["val_loss"] - after["val_loss"])
            return before[field] + x * (after[field] - before[field])
    return float("inf")


def run_seed(out: str, seed: int) -> tuple[list[str], dict[str, list[dict]]]:
    """Rows of the table, and the evaluations of each arm."""
    parent = train(out, seed, "parent", "plain", False)
    searching = search(out, seed)
    runs = {arm: train(out, seed, *how) for arm, how in ARMS.items()}
    base = runs["random start"]
    target, rows = base[-1]["val_loss"], []
    rows.append(f"| {seed} | parent | {params(out, seed, 'plain')} | {parent[-1]['val_loss']:.3f} | | | |")
    for arm, (name, start, helped) in ARMS.items():
        reached = [crossing(runs[arm], target, field) for field in ("tokens", "flops")]
        paid = parent[-1]["flops"] * (helped or start in ("cut", "searched", "shape", "inherited"))
        paid += searching * (start in ("searched", "shape"))
        shares = [reached[0] / base[-1]["tokens"], reached[1] / base[-1]["flops"]]
        shares.append((reached[1] + paid) / base[-1]["flops"])
        cells = ["-" if share == float("inf") else f"{share:.2f}" for share in shares]
        final = f"{runs[arm][-1]['val_loss']:.3f}"
        rows.append(f"| {seed} | {arm} | {params(out, seed, name)} | {final} | {' | '.join(cells)} |")
    return rows, runs | {"parent": parent}


def params(out: str, seed: int, name: str) -> str:
    with open(f"{out}/{seed}/{name}/manifest.json") as file:
        return f"{ModelConfig(**json.load(file)['model']).num_params() / 1e6:.2f}M"


def plot(seeds: list[dict[str, list[dict]]], path: pathlib.Path) -> None:
    """Mean validation loss over seeds against tokens; distilled runs are dashed."""
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    ends = []
    for arm, colour in zip(ARMS, COLOURS, strict=True):
        loss = np.mean([[line["val_loss"] for line in runs[arm]] for runs in seeds], axis=0)
        tokens = np.array([line["tokens"] for line in seeds[0][arm]]) / 1e3
        dashed = (0, (4, 2)) if "distilled" in arm else "-"
        axes.plot(tokens, loss, color=colour, ls=dashed, lw=1.7)
        ends.append([loss[-1], arm, colour])
    axes.set_ylim(min(end[0] for end in ends) - 0.1, 5.5)
    place = -np.inf
    for loss, arm, colour in sorted(ends):
        place = max(loss, place + 0.075)
        axes.annotate(
            arm, (tokens[-1], place), (8, 0), textcoords="offset points", color=colour, va="center", fontsize=8
        )
    axes.set_xlabel("Thousand tokens of training")
    axes.set_ylabel("Validation loss (nats per token)")
    axes.set_title("Starts of half the parent's size, mean over seeds", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


HEADER = """\
# Small from large

`python benchmarks/small_from_large.py` wrote this: jax {jax}, {device}. The parent is the quickstart's student after
its {steps} steps; everything else trains for as many. Tokens and FLOPs are what it took to reach the final loss of the
random start of the same seed, as a multiple of what that took; "-" is never. FLOPs of distilled runs count the
parent's forward passes. "All counted" adds the parent's whole training where it is used, and the search ({candidates}
candidates on {tokens:,} tokens each, at the parent's forward FLOPs) where there was one. Validation losses in nats per
token. Curves: [small_from_large.png](small_from_large.png).

| seed | run | parameters | final validation loss | tokens | FLOPs | all counted |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--result", default="benchmarks/results/small_from_large.md")
    flags = parser.parse_args()
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    verb(
        "prepare", "--source=stdlib", "--tokenizer=train:2048", "--validation_fraction=0.05", f"--out={flags.out}/data"
    )
    found = [run_seed(flags.out, int(seed)) for seed in flags.seeds.split(",")]
    result = pathlib.Path(flags.result)
    result.parent.mkdir(parents=True, exist_ok=True)
    plot([runs for _, runs in found], result.with_suffix(".png"))
    text = HEADER.format(
        jax=jax.__version__, device=jax.devices()[0].device_kind, candidates=SEARCH["candidates"],
        tokens=SEARCH["rows"] * 128, steps=found[0][1]["parent"][-1]["step"],
    )  # fmt: skip
    result.write_text(text + "\n".join(row for rows, _ in found for row in rows) + "\n")
    print(result.read_text())


if __name__ == "__main__":
    main()
