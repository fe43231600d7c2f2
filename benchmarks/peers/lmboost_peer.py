"""lmboost's own step, as the train verb compiles it."""

import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from benchmarks.peers.shapes import BETAS, DECAY, EPSILON, KD_WEIGHT, LEARNING_RATE, Shape, Sizes, serve
from lmboost import config, optimizers, plan, sharding
from lmboost.data import windows
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.teacher import Helper
from lmboost.train_step import init_state, jit_train_step


def model(sizes: Sizes, shape: Shape) -> ModelConfig:
    return ModelConfig(
        vocab_size=shape.vocab, num_layers=sizes.layers, d_model=sizes.width, num_heads=sizes.heads,
        num_kv_heads=sizes.heads, head_dim=sizes.width // sizes.heads, mlp_dim=sizes.mlp, dtype="float32",
    )  # fmt: skip


def build(shape: Shape, kd: bool, threads: int) -> Callable[[int], float]:
    del threads  # jax takes the cores that the process is given
    c = config.base()
    c.steps, c.batch_size, c.seq_len = 10**6, shape.rows, shape.tokens
    c.model, c.teacher.dtype = config.model(model(shape.student, shape)), "float32"
    c.optimizer.update(
        {"learning_rate": LEARNING_RATE, "b1": BETAS[0], "b2": BETAS[1], "eps": EPSILON, "weight_decay": DECAY}
    )
    c.optimizer.update({"schedule": "constant", "warmup_steps": 0, "clip_norm": 1.0})
    if kd:
        c.objective.kd.update({"weight": KD_WEIGHT, "stop": 1.0, "handover": "constant"})
    helper = Helper(None, model(shape.teacher, shape)) if kd else None
    run, mesh = plan.outline(c, ModelConfig(**c.model), helper, helper), sharding.make_mesh()
    with jax.set_mesh(mesh):
        params = run.init_params()
        tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, params)
        state = init_state(params, tx)
        helpers = {"teacher": transformer.init(helper.model, jax.random.key(1))} if kd else {}
        batch, draws = windows.batch_of([], shape.rows, shape.tokens), np.random.default_rng(0)
        for name in ("tokens", "targets"):
            batch[name] = draws.integers(0, shape.vocab, (shape.rows, shape.tokens)).astype(np.int32)
        batch["segment_ids"], batch["weights"] = batch["segment_ids"] + 1, batch["weights"] + 1
        batch["positions"] = batch["positions"] + np.arange(shape.tokens, dtype=np.int32)
        put = sharding.put_batch(batch, mesh)
        step = jit_train_step(run.program(run.spans[0].helps), tx, learning_rate, state)

    def steps(n: int) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            for _ in range(n):
                state, metrics = step(state, helpers, put)
        total, tokens = metrics["loss"]
        return float(total) / float(tokens)

    return steps


if __name__ == "__main__":
    serve(build)
