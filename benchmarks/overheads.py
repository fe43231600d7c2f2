"""What surrounds a step, each part against what it cannot do without: text to records, reading, the loop, the start.

    python -m benchmarks.overheads [--rounds=7] [--result=benchmarks/results/overheads.md]

The text is Python's own library. Each round does one after the other what is compared, in one process; tables have the
median over rounds and the middle half. About 20 minutes on two CPU cores.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from unittest import mock

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core is compared with a core

import jax
import numpy as np
import sentencepiece
import tokenizers

from benchmarks.reports import HOME
from lmboost import config, optimizers, plan, sharding, train
from lmboost.data import fast_bpe, loader, prepare, sources, tokenizer
from lmboost.data.retokenize import Retokenizer
from lmboost.errors import count, run_flags
from lmboost.train_step import init_state, jit_train_step

VOCABULARY, TOKENS, ROWS, BATCHES = 2048, 1024, 8, 400
FEW, MANY = 20, 220  # steps of the two runs of which the difference is taken
TEXT = """\
# What surrounds a step

`python -m benchmarks.overheads` wrote this on {cores} cores ({machine}): Python {python}, jax {jax}; {rounds} rounds,
in turn; the median and the middle half.

| what | measured | |
|---|---|---|
"""


def texts() -> list[str]:
    """The documents of Python's library, as `prepare` reads them."""
    units = sources.find(["stdlib"], "text")
    return [document.text for unit in units for document in sources.read(unit, "text", 0.01)]


def bare(path: pathlib.Path) -> Callable[[list[str]], None]:
    """Encodes texts by the tokenizer's library alone."""
    if path.suffix == ".json":
        return tokenizers.Tokenizer.from_file(str(path)).encode_batch_fast
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return lambda documents: model.encode(documents, num_threads=1)


def make_tokenizers(where: pathlib.Path, documents: list[str]) -> dict[str, pathlib.Path]:
    """One of each library, trained on the beginning of the documents."""
    some = documents[: len(documents) // 4]
    sentence, face = where / "sentencepiece.model", where / "tokenizer.json"
    tokenizer.train(some, VOCABULARY, sentence)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(some, trainer)
    model.save(str(face))
    (where / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return {"SentencePiece": sentence, "tokenizers": face}


def preparing(where: pathlib.Path, path: pathlib.Path, documents: list[str], rounds: int) -> np.ndarray:
    """Processor time of the library over that of `prepare` with one worker, by round; leaves `where`/data0."""
    encode, shares = bare(path), []
    for at in range(-1, rounds):  # the first one imports what is needed
        out = where / f"data{at}"
        began = time.process_time()
        for batch in sources.grouped(documents, len, 1_000_000):
            encode(batch)
        between = time.process_time()
        prepare.prepare(out, ["stdlib"], str(path), workers=1, report=lambda _: None)
        if at >= 0:
            shares.append((between - began) / (time.process_time() - between))
    return np.array(shares)


def reading(data: pathlib.Path, rounds: int, other: pathlib.Path | None = None) -> np.ndarray:
    """Millions of tokens that the loader makes into batches in a second of a core, by round.

    other: a helper's tokenizer, in which the batches have the same rows once more.
    """
    source, speeds = loader.Loader(str(data), "train", TOKENS), []
    makers = [Retokenizer("teacher", source.info.tokenizer_path, str(other), 2 * TOKENS)] if other else []
    for at in range(rounds):
        began = time.process_time()
        for _ in source.batches(
            lambda step: (step * ROWS, ROWS), at * BATCHES, (at + 1) * BATCHES, retokenizers=makers
        ):
            pass
        speeds.append(ROWS * TOKENS * BATCHES / 1e6 / (time.process_time() - began))
    return np.array(speeds)


def looping(data: pathlib.Path, where: pathlib.Path, rounds: int) -> np.ndarray:
    """Time of a step by itself over that of a step in the loop, by round.

    The quickstart's plain run; start and end are the same for a few steps and for many, so they are not in it.
    """
    c = config.read([f"--config={HOME}/configs/quickstart.py:plain", f"--workdir={where}"], config.Flags)[0]
    c.data.train, c.model.vocab_size, c.eval.every, c.checkpoint.every = str(data), VOCABULARY, 0, c.steps
    c.optimizer.warmup_steps = 0

    def run(steps: int, name: str) -> float:
        c.steps = steps
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train.train(c, str(where / name))
        return time.perf_counter() - began

    alone, shares = _alone(c), []
    for at in range(-1, rounds):  # the first one compiles
        began = time.perf_counter()
        alone(MANY - FEW)
        step = time.perf_counter() - began
        spent = -run(FEW, f"few{at}") + run(MANY, f"many{at}")
        if at >= 0:
            shares.append(step / spent)
    return np.array(shares)


def _alone(c) -> Callable[[int], None]:
    """Does steps of a config with one batch, which is on the device, and waits for them."""
    run, mesh = plan.make(c, "", jax.default_backend(), jax.device_count()), sharding.make_mesh()
    with jax.set_mesh(mesh):
        params = run.init_params()
        tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, params)
        state = init_state(params, tx)
        source = loader.Loader(c.data.train, "train", c.seq_len)
        batch = sharding.put_batch(next(source.batches(run.rows, 0, 1)), mesh)
        step = jit_train_step(run.program(run.spans[0].helps), tx, learning_rate, state)

    def steps(n: int) -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            for _ in range(n):
                state, _ = step(state, {}, batch)
            jax.block_until_ready(state)

    return steps


def starting(data: pathlib.Path, where: pathlib.Path, rounds: int) -> np.ndarray:
    """[rounds, 2]: seconds until the first step is done with what was compiled before over those without, and of these
    compiling's share; the quickstart's plain run."""
    found = []
    for at in range(rounds):
        spent = []
        for name in ("cold", "warm"):
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(where / f"compiled{at}")}
            environment |= {"PYTHONPATH": str(HOME), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            workdir = where / f"{name}{at}"
            fields = {"data.train": data, "model.vocab_size": VOCABULARY, "steps": 2, "eval.every": 0}
            fields |= {"optimizer.warmup_steps": 0}
            flags = [f"--config.{name}={value}" for name, value in fields.items()]
            command = [sys.executable, "-m", "lmboost.train", "--config=configs/quickstart.py:plain"]
            subprocess.run(
                [*command, f"--workdir={workdir}", *flags], cwd=HOME, env=environment, check=True, capture_output=True
            )
            seconds = json.loads((workdir / "goodput.jsonl").read_text().splitlines()[-1])["seconds"]
            spent.append([sum(seconds[kind] for kind in ("start", "restore", "data", "compile")), seconds["compile"]])
        (cold, compiling), (warm, _) = spent
        found.append((warm / cold, compiling / cold))
    return np.array(found)


def row(what: str, values: np.ndarray, format: str, goal: str) -> str:
    low, middle, high = (format.format(x) for x in np.percentile(values, (25, 50, 75)))
    line = f"| {what} | {middle} ({low} to {high}) | {goal} |"
    print(line, flush=True)
    return line + "\n"


def main(rounds: int, result: str) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = TEXT.format(
        cores=cores, machine=platform.processor() or platform.machine(), python=platform.python_version(),
        jax=jax.__version__, rounds=count("--rounds", rounds),
    )  # fmt: skip

    def add(*cells) -> None:
        nonlocal text
        text += row(*cells)
        pathlib.Path(result).write_text(text)  # what is measured by then, where it is broken off

    with tempfile.TemporaryDirectory() as temporary:
        where, documents = pathlib.Path(temporary), texts()
        jax.config.update("jax_compilation_cache_dir", str(where / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        made = make_tokenizers(where, documents)
        for library, path in made.items():
            with mock.patch.object(fast_bpe, "make", return_value=None):
                shares = preparing(where / library, path, documents, rounds)
            add(f"speed of `prepare` over {library} alone, on a core", shares, "{:.0%}", "goal 90%")
        if importlib.util.find_spec("fastokens"):
            shares = preparing(where / "fastokens", made["tokenizers"], documents, rounds)
            add("the same of `prepare` with fastokens over tokenizers", shares, "{:.0%}", "")
        data = where / "SentencePiece" / "data0"
        speeds = reading(data, rounds)
        add("tokens in batches that a core makes in a second", speeds, "{:.1f} million", "goal 2 million")
        speeds = reading(data, rounds, made["tokenizers"])
        add("the same with the rows of a teacher of the other tokenizer", speeds, "{:.2f} million", "")
        loop = looping(data, where, rounds)
        add("speed of the loop over that of the step alone", loop, "{:.3f}", "goal 0.98")
        starts = starting(data, where, rounds)
        add("time to the first step, compiled before over not", starts[:, 0], "{:.2f}", "")
        add("compiling's share of it, not compiled before", starts[:, 1], "{:.0%}", "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--result", default=str(HOME / "benchmarks/results/overheads.md"))
    run_flags(main, parser)
