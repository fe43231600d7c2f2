"""The config's `optimizer` subtree as an optax transformation.

Every optimizer is the same chain: clip the gradient by its norm over all parameters, turn it into a
direction (Adam, Adafactor, Muon or Lion), add decayed weights, multiply by the negative learning rate.
So weight decay means the same for all of them: each step takes learning_rate * weight_decay off a matrix.

The layers' parameters are stacked on a leading axis. Whatever an optimizer computes over a whole matrix
(factored statistics, clipping by RMS, the scale of a parameter, orthogonalisation) is per layer.

Shape suffixes: D model width, H heads, N head size, L layers.
"""

import math
from typing import Any

import jax
import optax

from lmboost import axes, errors, schedules, sharding
from lmboost.errors import one_of

NAMES = ("adamw", "adafactor", "muon", "lion")

# Moonlight's match of Muon's update to the RMS of AdamW's, so that one learning rate and one weight decay serve
# the matrices and the rest alike (arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2

MIN_FACTORED = 128  # Adafactor factors matrices of at least this many rows and columns (optax's default)


def make_optimizer(config, steps: int, params_shapes: Any) -> tuple[optax.GradientTransformation, schedules.Schedule]:
    """Builds the optimizer.

    - adamw: b1, b2, eps.
    - lion: b1, b2.
    - muon: orthogonalised Nesterov momentum (coefficient b1) for the matrices of the layers; embeddings, head,
      norms, biases and alignment projections go through Adam (b1, b2, eps; optax gives it Nesterov momentum,
      too), with the same learning rate schedule.
    - adafactor: factored second moment, its decay 1 - t^-0.8, without momentum: b1, b2 and eps are not used. The
      update is clipped to an RMS of 1 and multiplied by the RMS of the parameter, so `learning_rate` is
      relative: 1e-2 (PaLM's) rather than 3e-4.

    Args:
      config: the `optimizer` subtree.
      steps: of the run.
      params_shapes: the optimised tree, arrays or ShapeDtypeStructs: {"model": ..., "align": ...}.

    Returns:
      (transformation, learning rate as a function of the step). Moments lie in the state under the paths of
      their parameters (".../layers/attn/q/kernel").

    Raises:
      UserError: an unknown name, or a number out of range.
    """
    name = one_of("optimizer.name", config.name, NAMES)
    b1 = errors.number("optimizer.b1", config.b1, below=1.0)
    b2 = errors.number("optimizer.b2", config.b2, below=1.0)
    eps = errors.number("optimizer.eps", config.eps)
    clip = errors.number("optimizer.clip_norm", config.clip_norm)
    decay = errors.number("optimizer.weight_decay", config.weight_decay)
    rate = schedules.learning_rate(config, steps)
    direction = {
        "adamw": lambda: optax.scale_by_adam(b1, b2, eps),
        "lion": lambda: optax.scale_by_lion(b1, b2),
        "muon": lambda: _muon(b1, b2, eps),
        "adafactor": lambda: _adafactor(params_shapes),
    }[name]()
    transformation = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        direction,
        optax.add_decayed_weights(decay, mask=decay_mask(params_shapes, config.decay_embeddings)),
        optax.scale_by_learning_rate(rate),
    )
    return transformation, rate


def decay_mask(params: Any, decay_embeddings: bool = True) -> Any:
    """A tree of booleans: which parameters are decayed. Matrices are, norms and biases are not.

    Decided by what their axes are, as the number of them says nothing about stacked and per-head parameters: a bias
    of the queries is [L, H, N].
    """

    def is_decayed(keys, _):
        inputs, _ = axes.sides(sharding.path_name(keys))
        return decay_embeddings if inputs in (("vocab",), ("positions",)) else bool(inputs)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _matrix_axes(path: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(input axes, output axes) of a layer's kernel as a matrix, counted from the last; None for other parameters.

    Projections to heads [D, H, N] are D x (H N), the one back [H, N, D] is (H N) x D.
    """
    inputs, outputs = map(len, axes.sides(path))
    if "layers" not in path.split("/") or not inputs:
        return None
    return tuple(range(-inputs - outputs, -outputs)), tuple(range(-outputs, 0))


def _muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def dimension_numbers(params):
        # Axes that are neither input nor output, here the stacked layers, are a batch of matrices to optax.
        def leaf(keys, _):
            sides = _matrix_axes(sharding.path_name(keys))
            return sides and optax.contrib.MuonDimensionNumbers(*sides)

        return jax.tree_util.tree_map_with_path(leaf, params)

    # A rate of -1 undoes the sign that it puts on the step: decay and learning rate come later in the chain.
    return optax.contrib.muon(
        learning_rate=-1.0,
        beta=b1,
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        consistent_rms=MUON_RMS,
        muon_weight_dimension_numbers=dimension_numbers,
    )


def _adafactor(params_shapes: Any) -> optax.GradientTransformation:
    """optax.adafactor up to its learning rate, per layer for what is stacked."""
    plain = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=MIN_FACTORED),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )

    def label(keys, x):  # stacks of unequal depth are mapped over one by one
        return f"layers{x.shape[0]}" if "layers" in sharding.path_name(keys).split("/") else "rest"

    labels = jax.tree_util.tree_map_with_path(label, params_shapes)
    matrices = _as_matrices(plain)
    # Mapped over the leading axis of every leaf; the counter, too, is one per layer.
    per_layer = optax.GradientTransformation(jax.vmap(matrices.init), jax.vmap(matrices.update))
    kinds = sorted(set(jax.tree.leaves(labels)))  # in one order: all processes must trace one program
    return optax.partition({k: plain if k == "rest" else per_layer for k in kinds}, labels)


def _as_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Shows one layer's kernels to `inner` as matrices.

    optax factors the two largest axes if both have 128 entries or more. Of [D, H, N] with heads of 64 that is
    none, and the second moment would be kept whole; with heads of 128 it is D and either H or N. As
    D x (H N), every projection has one statistic per input and one per output, whatever its heads. A kernel
    too small to be factored keeps its shape, and so its moment does.
    """

    def flat(tree):
        def leaf(keys, x):
            sides = _matrix_axes(sharding.path_name(keys)) or ()
            shape = [math.prod(x.shape[axis] for axis in side) for side in sides]
            return x.reshape(shape) if shape and min(shape) >= MIN_FACTORED else x

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def update(updates, state, params):
        new, state = inner.update(flat(updates), state, flat(params))
        return jax.tree.map(lambda n, u: n.reshape(u.shape), new, updates), state

    return optax.GradientTransformation(lambda params: inner.init(flat(params)), update)
