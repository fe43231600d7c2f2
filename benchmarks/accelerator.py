"""Speed on one accelerator, as it is: steps of several sizes, plain and helped, and the loss of a large vocabulary.

    python -m benchmarks.accelerator [--rounds=10] [--shapes=50m,124m,350m,1.3b] [--result=FILE.md]

Steps are of random parameters and rows, arms in turn, in bfloat16 with the platform's attention kernel; times are of
what runs on the device. The result is named by the device unless --result says where.
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.help_speed import ALIGN, KD, Shape, stepper
from lmboost import flops
from lmboost.errors import count, one_of, run_flags
from lmboost.models.model_config import ModelConfig
from lmboost.models.vocabulary import Head
from lmboost.objective.blend import Coefficients, blend
from lmboost.objective.kd import Distillation, SoftTargets


def _model(layers: int, width: int, mlp: int, vocab: int, remat: str = "none") -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, vocab_multiple=128, num_layers=layers, d_model=width, num_heads=width // 64,
        num_kv_heads=width // 64, head_dim=64, mlp_dim=mlp, dtype="bfloat16", remat=remat,
    )  # fmt: skip


SHAPES = {  # student, a teacher of about half its size, rows, tokens of a row, steps of a round
    "50m": Shape(_model(12, 512, 1408, 8192), _model(8, 448, 1216, 8192), 32, 2048, 10),
    "124m": Shape(_model(12, 768, 2048, 50257), _model(8, 512, 1408, 50257), 32, 1024, 10),
    "350m": Shape(_model(24, 1024, 2816, 50257), _model(12, 768, 2048, 50257), 32, 1024, 5),
    "1.3b": Shape(_model(24, 2048, 5504, 50257, "dots"), _model(24, 1024, 2816, 50257), 16, 1024, 5),
}
HELPS = {"plain": {}, "kd": KD, "align": ALIGN}
LOSSES = ((2048, 1024, 128_256, 8192), (4096, 2048, 128_256, 8192))  # width, the teacher's, vocabulary, tokens


def seconds(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median of each arm's seconds over rounds, arms in turn; the first round compiles."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for at in range(rounds + 1):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            if at:
                spent[name].append(time.perf_counter() - began)
    return {name: float(np.median(times)) for name, times in spent.items()}


def steps_of(shape: Shape, rounds: int) -> list[list[str]]:
    """A row for each help: tokens a second, MFU of the model FLOPs, time over the plain step's, FLOPs over its."""
    platform = jax.default_backend()
    student, teacher = (m.fit(shape.tokens, platform) for m in (shape.student, shape.teacher))
    shape = dataclasses.replace(shape, student=student, teacher=teacher)
    steppers = {name: stepper(shape, fields, False) for name, fields in HELPS.items()}
    times = seconds({name: run for name, (run, _) in steppers.items()}, rounds)
    plain = flops.step_flops(student, shape.rows, shape.tokens)
    rows = []
    for name, spent in times.items():
        one, cost = spent / shape.steps, steppers[name][1]
        mfu = flops.mfu(plain * cost / one, jax.devices()[0].device_kind, jax.device_count())
        rate = f"{shape.rows * shape.tokens / one:,.0f}"
        share = "unknown" if mfu is None else f"{mfu:.1%}"
        rows.append([name, rate, share, f"{spent / times['plain']:.3f}", f"{cost:.3f}"])
    return rows


def loss_of(width: int, teacher_width: int, vocab: int, tokens: int, rounds: int) -> list[str]:
    """Milliseconds and GiB of temporaries of CE + KD of so many tokens, forward and backward."""

    def loss(h, kernel, teacher_h, teacher_kernel, labels, weights):
        soft = SoftTargets(teacher_h, teacher_kernel, vocab, Distillation())
        return blend(h, Head(kernel, vocab), labels, weights, Coefficients(0.5, 0.5), soft, block_tokens=0).loss

    shapes = ((1, tokens, width), (width, vocab), (1, tokens, teacher_width), (teacher_width, vocab))
    given = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
    given += [jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens), jnp.float32)]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given).compile()
    spent = seconds({"": lambda: jax.block_until_ready(compiled(*given))}, rounds)[""]
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
    return [f"{width:,}", f"{teacher_width:,}", f"{vocab:,}", f"{tokens:,}", f"{spent * 1e3:.1f}", f"{memory:.2f}"]


def main(rounds: int, shapes: str, result: str) -> None:
    device = jax.devices()[0].device_kind
    text = [
        f"# Speed on one {device}", "",
        f"`python -m benchmarks.accelerator --shapes={shapes}` wrote this: jax {jax.__version__},",
        f"medians of {count('--rounds', rounds)} rounds, arms in turn.",
    ]  # fmt: skip
    for name in shapes.split(","):
        shape = SHAPES[one_of("--shapes", name, SHAPES)]
        sizes = f"{shape.student.num_params():,} parameters, the teacher {shape.teacher.num_params():,}"
        text += ["", f"## {name}: {sizes}; {shape.rows} rows of {shape.tokens:,} tokens", ""]
        text += ["| help | tokens a second | MFU | time over plain | FLOPs over plain |", "|---|---|---|---|---|"]
        text += [f"| {' | '.join(row)} |" for row in steps_of(shape, rounds)]
        print("\n".join(text[-4:]), flush=True)
    text += ["", "## CE and KD alone, forward and backward, heads in bfloat16", ""]
    text += ["| width | the teacher's | vocabulary | tokens | ms | temporaries, GiB |", "|---|---|---|---|---|---|"]
    text += [f"| {' | '.join(loss_of(*sizes, rounds))} |" for sizes in LOSSES]
    print("\n".join(text[-len(LOSSES) :]))
    result = result or f"benchmarks/results/accelerator_{device.lower().replace(' ', '_')}.md"
    pathlib.Path(result).write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--result", default="")
    run_flags(main, parser)
