"""What a compiled step must not do: move logits, gather all layers at once, sum gradients in less than float32."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from lmboost import sharding
from lmboost.aot import hlo
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig

# What a step must not do, by the report's fields.
PROBLEMS = {
    "rematerialised": "the partitioner could only replicate",
    "moved_logits": "a collective moves logits of more than a block",
    "moved_stacks": "a collective moves all layers unsharded",
    "rounded_sums": "gradients are added up in less than float32",
}


def moved_logits(collective: hlo.Collective, models: Sequence[ModelConfig], block_tokens: int, mesh: Mesh) -> bool:
    """Whether a collective moves the logits of more than a block of tokens.

    An array with the vocabulary (or a chip's part of it) among its dimensions is logits, unless the others are the
    model's width or a chip's part of it: then it is the embedding, the head, or the gradient of one of them. (A batch
    of as many tokens as the width, in one dimension, could not be told from these.)
    """
    fsdp, tensor = sharding.shards("embed", mesh), sharding.shards("vocab", mesh)
    vocabularies = {size for m in models for size in (m.vocab_rows, m.vocab_rows // tensor)}
    tables = [t for m in models for t in ([m.d_model], [m.d_model // fsdp], sorted([fsdp, m.d_model // fsdp]))]
    for array in collective.arrays:
        for size in vocabularies & set(array.dims):
            others = sorted(n for n in array.dims if n > 1)
            others.remove(size)
            if others not in tables and array.elements // size > block_tokens:
                return True
    return False


def moved_stack(collective: hlo.Collective, models: Sequence[ModelConfig], mesh: Mesh) -> bool:
    """Whether a collective moves the matrices of all layers unsharded, in one array or together.

    Layers are stacked on a leading axis and gathered one at a time, in the loop over them. A stack is known by its
    dimensions, or by its size if nothing else is as large (so a toy's activations may be taken for one); what is split
    over the tensor axis only is unsharded, too. Vectors (norms, biases) are small, and may go as a stack. Without an
    fsdp axis every chip has all parameters by design, and nothing is looked for.
    """
    if sharding.shards("embed", mesh) == 1:
        return False
    tensor = sharding.shards("mlp", mesh)
    for model in models:
        shapes = jax.eval_shape(lambda model=model: transformer.init(model, jax.random.key(0)))
        stacks = [x.shape for x in jax.tree.leaves(shapes["layers"]) if x.shape[0] > 1 and x.ndim > 2]
        largest_piece = max(model.vocab_rows * model.d_model, *(math.prod(stack[1:]) for stack in stacks))
        for stack in stacks:
            parts = [(*stack[:i], stack[i] // tensor, *stack[i + 1 :]) for i in range(1, len(stack))]
            known = [sorted(n for n in whole if n > 1) for whole in (stack, *parts)]
            sizes = {math.prod(dims) for dims in known if math.prod(dims) > largest_piece}
            if any(sorted(n for n in a.dims if n > 1) in known or a.elements in sizes for a in collective.arrays):
                return True
        if collective.elements > model.num_params() // tensor:
            return True
    return False


def rounded_sum(collective: hlo.Collective, mesh: Mesh) -> bool:
    """Whether a collective adds up floats of less than 32 bits over the devices that the batch is spread over.

    Over the tensor axis it may: activations are added up there, in the compute dtype.
    """
    adds = collective.kind.startswith(("all-reduce", "reduce-scatter")) and collective.adds
    narrow = any(a.dtype.startswith(("bf", "f")) and a.bytes < 4 * a.elements for a in collective.operands)
    return adds and narrow and not 1 < collective.group == mesh.shape["tensor"]


def describe(one: hlo.Collective) -> str:
    return f"{one.kind} of {one.largest} over {one.group}, {one.times} times: {one.name}"
