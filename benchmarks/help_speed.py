"""What help costs in time: steps with it over steps without, from a model in memory and from disk, in one process.

    python -m benchmarks.help_speed [--rounds=15] [--shapes=track,wide] [--result=benchmarks/results/help_speed.md]

Each round does some steps of every arm, one arm after the other, and compares them within the round; the table has the
median over rounds and the middle half. Parameters, rows and answers are random: time does not depend on what a model
knows. From disk a step is given what is known of each row, as the loader has it; reading it is beside the step.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from lmboost import answers, config, flops, optimizers, plan, sharding
from lmboost.data import windows
from lmboost.data.scored import Parts
from lmboost.errors import count, one_of, run_flags
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.teacher import Helper
from lmboost.train_step import init_state, jit_train_step


@dataclasses.dataclass(frozen=True)
class Shape:
    """A student, a teacher, and a batch."""

    student: ModelConfig
    teacher: ModelConfig
    rows: int
    tokens: int
    steps: int  # in a row


def _model(layers: int, width: int, heads: int, mlp: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads,
        head_dim=width // heads, mlp_dim=mlp, max_seq_len=512, dtype="float32", remat="none",
    )  # fmt: skip


SHAPES = {
    "track": Shape(_model(6, 72, 3, 192, 512), _model(4, 56, 7, 152, 512), 8, 128, 8),
    "wide": Shape(_model(8, 512, 8, 1376, 16_384), _model(4, 320, 5, 864, 16_384), 4, 256, 1),
}
KD = {"kd.weight": 0.5, "kd.stop": 1.0, "kd.handover": "linear"}
ALIGN = {"align.weight": 2.0, "align.stop": 1.0}
SELECT = {"select.candidates": 2, "select.stop": 1.0}
HELPS = {"kd": KD, "align": ALIGN, "kd and align": KD | ALIGN, "select": SELECT}


def answers_of(parts: Parts, rows: int) -> dict[str, np.ndarray]:
    """What might be known of so many rows; as many tokens at each place as there can be."""
    rng, found = np.random.default_rng(0), parts.like(rows)
    for name, x in found.items():
        if name == "soft_ids":
            x[...] = rng.permuted(np.tile(np.arange(parts.labels.vocab_size), (64, 1)), axis=1)[
                rng.integers(0, 64, x.shape[:2]), : x.shape[2]
            ]
        elif x.dtype.kind == "f":
            x[...] = rng.random(x.shape)
        else:
            x[...] = 1 if name == "soft_values" else rng.integers(-127, 128, x.shape)
    return found


def stepper(shape: Shape, fields: dict, from_disk: bool) -> tuple[Callable[[], None], float]:
    """(does the steps of a round and waits for them, model FLOPs of one step)."""
    c = config.base()
    c.steps, c.batch_size, c.seq_len, c.model = 1000, shape.rows, shape.tokens, config.model(shape.student)
    c.objective.update_from_flattened_dict(fields)
    helper = Helper(None, shape.teacher) if fields else None
    run = plan.outline(c, shape.student, helper, helper)
    parts = answers.parts_of(run) if from_disk else None
    mesh, helps = sharding.make_mesh(), run.spans[0].helps
    with jax.set_mesh(mesh):
        params = run.init_params()
        tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, params)
        state = init_state(params, tx)
        params = transformer.init(shape.teacher, jax.random.key(1)) if fields and not from_disk else None
        helpers = {"targets": {}} if from_disk else {"teacher": params, "scorer": params} if fields else {}
        if from_disk and parts.states and parts.states[0].kept < shape.teacher.d_model:
            basis = np.eye(shape.teacher.d_model, parts.states[0].kept, dtype=np.float32)
            helpers = {"targets": {str(parts.states[0].layer): jax.device_put(basis, sharding.replicated(mesh))}}
        rows = run.rows(0)[1]
        batch = windows.batch_of([], rows, shape.tokens, answers_of(parts, rows) if parts else None)
        batch["segment_ids"], batch["weights"] = batch["segment_ids"] + 1, batch["weights"] + 1
        batch["positions"] = batch["positions"] + np.arange(shape.tokens, dtype=np.int32)
        for name in ("tokens", "targets"):
            draw = np.random.default_rng(1).integers(0, shape.student.vocab_size, (rows, shape.tokens))
            batch[name] = draw.astype(np.int32)
        put = sharding.put_batch(batch, mesh)
        program = dataclasses.replace(run.program(helps), known=parts)
        step = jit_train_step(program, tx, learning_rate, state)

    def steps() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            for _ in range(shape.steps):
                state, _ = step(state, helpers, put)
        jax.block_until_ready(state)

    plain = flops.step_flops(shape.student, shape.rows, shape.tokens)
    return steps, (plain if from_disk else run.flops(1)) / plain


def measure(shape: Shape, rounds: int) -> list[tuple[str, np.ndarray, float]]:
    """(arm, times over the plain one's by round, FLOPs over the plain one's)."""
    arms = {"plain": stepper(shape, {}, False), "plain again": stepper(shape, {}, False)}
    for name, fields in HELPS.items():
        arms |= {f"{name}, {'disk' if disk else 'memory'}": stepper(shape, fields, disk) for disk in (False, True)}
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for at in range(rounds + 1):  # the first one compiles
        for name, (steps, _) in arms.items():
            began = time.perf_counter()
            steps()
            if at:
                spent[name].append(time.perf_counter() - began)
    plain = np.array(spent["plain"])
    return [(name, np.array(spent[name]) / plain, arms[name][1]) for name in arms if name != "plain"]


def main(rounds: int, shapes: str, result: str) -> None:
    text = [
        "# A step with help over a step without", "",
        f"`python -m benchmarks.help_speed --shapes={shapes}` wrote this: one {jax.devices()[0].device_kind},",
        f"jax {jax.__version__},",
        f"{count('--rounds', rounds)} rounds, arms in turn; in brackets the middle half. FLOPs: with the teacher's",
        "forward pass, where it is in the step.",
    ]  # fmt: skip
    for name in shapes.split(","):
        shape = SHAPES[one_of("--shapes", name, SHAPES)]
        sizes = f"{shape.student.num_params():,} parameters, the teacher {shape.teacher.num_params():,}"
        batch = f"{shape.rows} rows of {shape.tokens} tokens, a vocabulary of {shape.student.vocab_size:,}"
        text += ["", f"## {name}: {sizes}; {batch}", "", "| help, from | time | FLOPs | time over FLOPs |"]
        text += ["|---|---|---|---|"]
        for arm, times, cost in measure(shape, rounds):
            low, middle, high = np.percentile(times, (25, 50, 75))
            text.append(f"| {arm} | {middle:.3f} ({low:.3f} to {high:.3f}) | {cost:.3f} | {middle / cost:.3f} |")
    pathlib.Path(result).write_text("\n".join([*text, ""]))
    print("\n".join(text))


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--result", default="benchmarks/results/help_speed.md")
    return parser


if __name__ == "__main__":
    run_flags(main, flags())
