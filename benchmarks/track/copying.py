"""What a model makes of its context: the loss on random tokens that it has just read, less that on new ones.

Distillation is reported to cost copying, which a loss on text does not show.
"""

import jax
import numpy as np

from lmboost import checkpoint, sharding
from lmboost.models.model_config import ModelConfig
from lmboost.train_step import make_eval_step

SPECIAL = 8  # the first so many tokens are not drawn: special ones are among them


def batch(model: ModelConfig, rows: int, seq_len: int, again: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of random tokens, the second half of a row as the first; only one of the halves has weight.

    again: whether it is the second, without its first token, which nothing announces.
    """
    half = seq_len // 2
    tokens = np.random.default_rng(seed).integers(SPECIAL, model.vocab_size, (rows, half)).astype(np.int32)
    tokens = np.concatenate([tokens, tokens], 1)
    place = np.broadcast_to(np.arange(seq_len, dtype=np.int32), tokens.shape)
    weights = (place >= half) & (place < seq_len - 1) if again else place < half - 1
    return {
        "tokens": tokens, "targets": np.roll(tokens, -1, 1), "segment_ids": np.ones_like(tokens), "positions": place,
        "weights": weights.astype(np.float32),
    }  # fmt: skip


def measure(path: str, rows: int, seq_len: int, block_tokens: int = 512) -> float:
    """Nats a token, of the model in a run or checkpoint: loss on what it has read less loss on what is new."""
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        saved = checkpoint.Saved.find(path)
        model = saved.model_for(seq_len, "float32")
        params, step = saved.load(mesh, model=model), jax.jit(make_eval_step(model, block_tokens))
        loss, count = (
            np.array([step(params, sharding.put_batch(batch(model, rows, seq_len, again), mesh)) for again in (1, 0)]).T
        )  # fmt: skip
    return float(loss[0] / count[0] - loss[1] / count[1])
