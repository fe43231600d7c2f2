"""Candidates a minute: one compiled function for all cuts, against extracting, compiling and evaluating each by itself.

    python benchmarks/search_speed.py [--rounds=5] [--result=benchmarks/results/search_speed.md]

A parent of the quickstart student's shape with random parameters, layer-wise cuts of half its size, 16 rows of 128
random tokens. Both ways alternate in one process, over the same cuts; what is compared is the median over rounds. The
time to compile the one function is given beside it. About 5 minutes on two CPU cores.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

from lmboost import config, sharding
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.search import fitness, job
from lmboost.search.space import Orders, Space
from lmboost.surgery import view

ROWS, TOKENS, CUTS = 16, 128, 8  # cuts of a round
SPACE = {
    "params": "0.6M-0.75M", "layers": "2-6", "d_model": "64-128:16", "num_kv_heads": "1-4", "head_dim": "16,32",
    "mlp_dim": "64-344:56,344",
}  # fmt: skip
RESULT = """\
# Candidates a minute

`python benchmarks/search_speed.py` wrote this: jax {jax}, {device}. Layer-wise cuts of 0.6 to 0.75M parameters of a
parent of 1.45M, {rows} rows of {tokens} tokens, {rounds} alternating rounds of {cuts} cuts; median (least to most).

| | seconds for a candidate | candidates a minute |
|---|---|---|
| extracted, compiled and evaluated by itself | {slow} | {slow_rate:.1f} |
| a view in one compiled function | {fast} | {fast_rate:.1f} |

Ratio: **{ratio:.1f}**. The one function took {compiling:.1f} s to compile, once ({compilations} compilation in all):
with that it is {with_compiling:.1f} over a search of 384 candidates.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", default="benchmarks/results/search_speed.md")
    flags = parser.parse_args()
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path.insert(0, "configs")
    from quickstart import STUDENT

    settings = config.base().search
    settings.update(SPACE)
    space = Space.from_config(settings, STUDENT, Orders.natural(STUDENT))
    with jax.set_mesh(sharding.make_mesh()):
        evaluate = make_fitness(STUDENT, space)
        draw = np.random.default_rng(0)
        rounds = [[space.sample(draw) for _ in range(CUTS)] for _ in range(flags.rounds)]
        compiling = seconds(lambda: evaluate(rounds[0][:1]))
        fast, slow = [], []
        for cuts in rounds:
            fast.append(seconds(lambda cuts=cuts: [evaluate([cut]) for cut in cuts]) / CUTS)
            slow.append(seconds(lambda cuts=cuts: [evaluate.alone(cut) for cut in cuts]) / CUTS)
    a, b = statistics.median(slow), statistics.median(fast)
    text = RESULT.format(
        jax=jax.__version__, device=jax.devices()[0].device_kind, rows=ROWS, tokens=TOKENS, rounds=flags.rounds,
        cuts=CUTS, slow=spread(slow), fast=spread(fast), slow_rate=60 / a, fast_rate=60 / b, ratio=a / b,
        compiling=compiling, with_compiling=384 * a / (compiling + 384 * b), compilations=evaluate.losses._cache_size(),
    )  # fmt: skip
    pathlib.Path(flags.result).write_text(text)
    print(text)


def make_fitness(parent: ModelConfig, space: Space) -> fitness.Fitness:
    params = jax.jit(lambda: transformer.init(parent, jax.random.key(0)))()
    tokens = np.random.default_rng(0).integers(0, parent.vocab_size, (2, ROWS // 2, TOKENS + 1)).astype(np.int32)
    shape = tokens[..., 1:].shape
    batches = {
        "tokens": tokens[..., :-1], "targets": tokens[..., 1:], "weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32), "positions": np.broadcast_to(np.arange(TOKENS, dtype=np.int32), shape),
    }  # fmt: skip
    hull = view.hull_config(parent, job.largest(space))
    return fitness.Fitness(parent, params, hull, batches, 1, 512)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
