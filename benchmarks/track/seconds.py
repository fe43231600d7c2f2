"""What help costs in time: a step with it over a step without, both in one process on one core.

    python -m benchmarks.track.seconds [--tier=nano] [--rounds=15] [--out=benchmarks/track/results]

Each round does some steps of every arm, one arm after the other, and compares them within the round; the table has the
median over rounds and the middle half. Parameters and rows are random: time does not depend on what a model knows.
"""

if __name__ == "__main__":  # before jax counts the cores
    import os

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import argparse
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.track import copying
from benchmarks.track.arms import ARMS
from benchmarks.track.report import RESULTS
from benchmarks.track.setting import TIERS, Tier, recipe
from lmboost import optimizers, plan, sharding
from lmboost.errors import count, one_of, run_flags
from lmboost.models import transformer
from lmboost.teacher import Helper
from lmboost.train_step import init_state, jit_train_step

TIMED = ("plain", "salt", "let", "auto", "both")
STEPS = 8  # in a row: one of them measures the lead, where the rule of auto asks for it
HEADER = """\
# A step with help over a step without

`python -m benchmarks.track.seconds --tier={tier}` wrote this: {device}, one core, jax {jax}, {rounds} rounds of
{steps} steps of each arm, in turn; in brackets the middle half of the rounds. Help is on
in a part of a run alone: what the whole run costs is in {tier}.md, as FLOPs.

| arm | time | FLOPs |
|---|---|---|
"""


def stepper(tier: Tier, name: str) -> tuple[Callable[[], None], float]:
    """(does `STEPS` steps of an arm in its helped phase and waits for them, model FLOPs of one)."""
    arm, model = ARMS[name], tier.student
    c = recipe(tier, model, tier.steps_of(model))
    c.update_from_flattened_dict(arm.changes)
    helper = Helper(None, tier.models[ARMS[arm.teacher].model]) if arm.teacher else None
    run = plan.outline(c, model, helper, None)
    mesh, span = sharding.make_mesh(), run.spans[0]
    with jax.set_mesh(mesh):
        params = run.init_params()
        tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, params)
        state = init_state(params, tx, run.objective.auto)
        helpers = {"teacher": transformer.init(helper.model, jax.random.key(1))} if helper else {}
        batch = sharding.put_batch(copying.batch(model, tier.batch_size, tier.seq_len, again=True), mesh)
        step = jit_train_step(run.program(span.helps), tx, learning_rate, state)

    def steps() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            for _ in range(STEPS):
                state, _ = step(state, helpers, batch)
        jax.block_until_ready(state)

    return steps, run.flops(1)


def main(tier: str, rounds: int, out: str) -> None:
    sizes = TIERS[one_of("--tier", tier, tuple(TIERS))]
    arms = {name: stepper(sizes, name) for name in TIMED}
    spent = {name: [] for name in TIMED}
    for at in range(count("--rounds", rounds) + 1):  # the first one compiles
        for name, (steps, _) in arms.items():
            began = time.perf_counter()
            steps()
            if at:
                spent[name].append(time.perf_counter() - began)
    text = HEADER.format(
        tier=tier, device=jax.devices()[0].device_kind, jax=jax.__version__, rounds=rounds, steps=STEPS
    )
    for name in TIMED:
        low, middle, high = np.percentile(np.array(spent[name]) / np.array(spent["plain"]), (25, 50, 75))
        text += f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {arms[name][1] / arms['plain'][1]:.2f} |\n"
    (pathlib.Path(out) / f"{tier}_seconds.md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="nano")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default=str(RESULTS))
    run_flags(main, parser)
