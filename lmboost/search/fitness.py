"""The validation loss of untrained cuts of one parent, all of them by one compiled function."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmboost import sharding
from lmboost.data import loader
from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import subnet, view
from lmboost.surgery.subnet import Cut
from lmboost.train_step import make_eval_step

ROWS_AT_ONCE = 8  # of the data, for each candidate; more where there are more devices


class Fitness:
    """Mean cross-entropy of cuts, nats per token, over fixed rows of held-out text.

    Every cut is a view of the parent in one hull, so nothing is compiled but once. Several cuts are computed together;
    the rows are spread over the devices, and the parent's parameters lie as they do in training.

    Args:
      parent, params: the model that is cut, on the mesh in use.
      hull: a config with room for every cut (`view.hull_config`).
      batches: int32 and float32 [n, B, T] of a batch's keys, as `put_rows` gives them.
      at_once: cuts that are computed together.
      block_tokens: tokens, per device, projected to the vocabulary at a time.
    """

    def __init__(
        self, parent: ModelConfig, params: Any, hull: ModelConfig, batches: Any, at_once: int, block_tokens: int
    ):
        self._parent, self._params = parent, params
        self._hull, self._batches = hull, batches
        self._at_once, self._block_tokens = at_once, block_tokens
        self.losses = jax.jit(self._losses_of)  # (params, stacked views, batches) -> a loss for each view

    def __call__(self, cuts: Sequence[Cut]) -> list[float]:
        """The losses of at most `at_once` cuts."""
        views = [view.place(self._parent, self._hull, cut) for cut in cuts]
        views += views[:1] * (self._at_once - len(views))
        stacked = jax.tree.map(lambda *xs: np.stack(xs), *views)
        return np.asarray(self.losses(self._params, stacked, self._batches))[: len(cuts)].tolist()

    def alone(self, cut: Cut) -> float:
        """The loss of one cut as a model of its own: extracted, compiled, evaluated."""
        child = subnet.child_config(self._parent, cut)
        params = jax.jit(lambda params: subnet.extract(self._parent, params, cut))(self._params)
        return float(jax.jit(functools.partial(self._mean_loss, child))(params, self._batches))

    def _losses_of(self, params, views, batches):
        def one(placed):
            return self._mean_loss(self._hull, view.apply(self._parent, params, self._hull, placed), batches)

        return jax.vmap(one)(views)

    def _mean_loss(self, model: ModelConfig, params, batches):
        step = make_eval_step(model, self._block_tokens)
        losses, counts = jax.lax.map(lambda batch: step(params, batch), batches)
        return losses.sum() / counts.sum()


def read_rows(spec: str, seq_len: int, count: int, mesh: jax.sharding.Mesh) -> list[Mapping[str, np.ndarray]]:
    """This process's share of the first `count` rows of a validation split, as batches [B, T] of one shape.

    Raises a UserError where the split has fewer.
    """
    shards = sharding.batch_shards(mesh)
    at_once = -(-min(ROWS_AT_ONCE, count) // shards) * shards
    if count < 1 or count % at_once:
        raise UserError(
            f"search.rows={count} must be a multiple of {at_once}: that many rows are computed at once, and each of "
            f"the {shards} parts of the mesh takes equally many."
        )
    data = loader.Loader(spec, "validation", seq_len, 0, *sharding.host_share(mesh))
    if len(data.rows_in_order) < count:
        raise UserError(
            f"search.rows={count}, but the validation split of {spec!r} has {len(data.rows_in_order)} rows of "
            f"seq_len={seq_len} tokens: set it to at most that."
        )
    return list(data.eval_batches(at_once, count // at_once))


def put_rows(batches: Sequence[Mapping[str, np.ndarray]], mesh: jax.sharding.Mesh) -> Mapping[str, jax.Array]:
    """What `read_rows` gives as stacked batches [n, B, T] on the mesh in use."""

    def stack(*xs):
        return sharding.constrain(jnp.stack(xs), (None, *sharding.row_axes(xs[0].ndim)))

    put = [sharding.put_batch(batch, mesh) for batch in batches]
    return jax.jit(lambda batches: jax.tree.map(stack, *batches))(put)
