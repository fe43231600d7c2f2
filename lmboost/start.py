"""Where the student starts, if not at random: another model's parameters, layers of it, or a part that is cut out."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from lmboost import checkpoint
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.plan import Plan
from lmboost.surgery import inherit, subnet

# Fields of a model in which the student may differ from its parent without a word.
_NEUTRAL = {"init_std", "vocab_multiple", "dtype", "attention", "remat"}


def from_init(run: Plan, random: Any, mesh: Mesh) -> tuple[Any, list[str]]:
    """(the student's parameters, lines that say what they are) by the config's `init`.

    Args:
      random: the student's parameters as they were drawn; the parts that are not inherited come from here.

    Raises a UserError where the parent's tokens are others, in number or by the tokenizer: rows would stand for what
    they do not mean; and where its layers do not fit.
    """
    c = run.config.init
    directory = checkpoint.find(c.path, c.step, "init.path")
    manifest = checkpoint.read_manifest(directory)
    parent = ModelConfig(**manifest["model"])
    if manifest["data"]["tokenizer"] not in (None, run.train_data.tokenizer_fingerprint):
        raise UserError(
            f"init.path: the model in {directory} was trained with another tokenizer than the data: its embeddings "
            "stand for other tokens. Prepare the data with its tokenizer, or choose another model."
        )
    if parent.vocab_size != run.student.vocab_size:
        raise UserError(
            f"model.vocab_size={run.student.vocab_size}, but the model in {directory} (init.path) has "
            f"{parent.vocab_size}: set it to that, or give another model."
        )
    if c.kind == "copy" and not c.layers and not c.fresh:
        return checkpoint.load_params(directory, random, mesh), remarks(run.student, parent)
    taken = (subnet if c.kind == "subnet" else inherit).plan(c.kind, c.layers, c.fresh, parent, run.student)
    parent = dataclasses.replace(parent, vocab_multiple=run.student.vocab_multiple)
    like = jax.eval_shape(lambda: transformer.init(parent, jax.random.key(0)))
    params = checkpoint.load_params(directory, like, mesh)
    places = jax.tree.map(lambda x: x.sharding, random)
    return jax.jit(taken, out_shardings=places)(params, random), taken.report(random)


def remarks(student: ModelConfig, parent: ModelConfig) -> list[str]:
    """What the student computes otherwise than the model that it starts from, where their parameters fit."""
    neutral = _NEUTRAL | ({"max_seq_len"} if student.position == "rope" else set())
    pairs = ((f.name, getattr(student, f.name), getattr(parent, f.name)) for f in dataclasses.fields(ModelConfig))
    return [
        f"the student has {name}={here!r}, the model it starts from {there!r}"
        for name, here, there in pairs
        if here != there and name not in neutral
    ]
