"""Where the student starts, if not at random: another model's parameters, layers of it, or a part that is cut out."""

import dataclasses
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import checkpoint, optimizers, sharding
from lmboost.checkpoint import Saved
from lmboost.data.loader import DataInfo
from lmboost.errors import UserError, one_of
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.objective import auto
from lmboost.run.checkpointer import check_fingerprints, restore_state
from lmboost.stages import Stage
from lmboost.surgery import grow, inherit, subnet
from lmboost.train_step import TrainState, init_state

# init.kind: what makes the student's parameters of the parent's, from (init.layers, init.fresh, parent, student).
# "copy" is the parent as it is, of which no part is taken, "continue" the parent with its optimizer (stages.py).
KINDS = {
    "copy": None, "continue": None, "inherit": inherit.plan, "stack": inherit.plan_stack,
    "expand": inherit.plan_expand, "subnet": subnet.plan,
}  # fmt: skip


def check(path: str, kind: str, layers: str, fresh: str, growth: str = "") -> None:
    """Raises a UserError where the fields of `init` make no sense together."""
    one_of("init.kind", kind, KINDS)
    if growth and kind != "continue":
        raise UserError(f"init.grow={growth!r} needs init.kind='continue', not {kind!r}.")
    for name, value, default in (("kind", kind, "copy"), ("layers", layers, ""), ("fresh", fresh, "")):
        if value != default and not path:
            raise UserError(f"init.{name}={value!r}, but init.path is empty: give the model that it is about.")
    if KINDS[kind] is None and (layers or fresh):
        raise UserError(f"init.layers and init.fresh need init.kind='inherit', 'stack' or 'expand', not {kind!r}.")


def from_init(
    parent: Saved, kind: str, layers: str, fresh: str, student: ModelConfig, data: DataInfo, random: Any, mesh: Mesh
) -> tuple[Any, list[str]]:
    """(the student's parameters, lines that say what they are).

    Args:
      parent: the model of `init.path`.
      kind, layers, fresh: the fields of `init`.
      data: what the student is trained on.
      random: the student's parameters as they were drawn; the parts that are not inherited come from here.

    Raises a UserError where the parent's tokens are others, in number or by the tokenizer: rows would stand for what
    they do not mean; and where its layers do not fit.
    """
    parent.check_tokenizer(data, unknown_too=True)
    if parent.model.vocab_size != student.vocab_size:
        raise UserError(
            f"model.vocab_size={student.vocab_size}, but the model in {parent.directory} ({parent.field}) has "
            f"{parent.model.vocab_size}: set it to that, or give another model."
        )
    if kind == "copy":
        remarks = [  # on what the student computes otherwise, where the parameters fit
            f"the student has {name}={getattr(student, name)!r}, the model it starts from "
            f"{getattr(parent.model, name)!r}"
            for name in student.differences(parent.model)
        ]
        return parent.load(mesh, model=student), remarks
    taken = KINDS[kind](layers, fresh, parent.model, student)
    params = parent.load(mesh, model=dataclasses.replace(parent.model, vocab_multiple=student.vocab_multiple))
    places = jax.tree.map(lambda x: x.sharding, random)
    return jax.jit(taken, out_shardings=places)(params, random), taken.report(random)


def from_stage(
    c: ConfigDict, stage: Stage, student: ModelConfig, fresh: TrainState, mesh: Mesh
) -> tuple[TrainState, list[str]]:
    """(the state at the beginning of a stage, lines that say what is new in it).

    All of the parent's state goes on; where the student is deeper, as `init.grow` says. What belongs to the teacher
    alone, the learned maps to its states with their moments and the measured lead, is that of `fresh` where it is asked
    for newly or otherwise.

    Raises a UserError where the parent's model is another one, or the parent was removed.
    """
    directory = epath.Path(stage.directory)
    if not (directory / "training").exists():
        raise UserError(f"init.path: {directory}, with which this stage begins, is not there any more: put it back.")
    growth = None
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)  # noqa: E731
    there, params = checkpoint.tree_metadata(directory, "training"), {"model": shapes(fresh.params["model"])}
    if c.init.grow:
        layers = Saved.find(stage.directory).model
        parent = student.with_layers(layers.sizes, layers.kinds)
        growth = grow.plan(c.init.grow, parent, student)
        params = {"model": jax.eval_shape(lambda: transformer.init(parent, jax.random.key(0)))}
    params |= {"align": shapes(there["align"])} if "align" in there else {}
    tx, _ = optimizers.make_optimizer(c.optimizer, c.steps, params)
    like = jax.eval_shape(lambda params: init_state(params, tx), params)
    like = like.replace(watch=jax.eval_shape(auto.begin) if "watch" in there else None)
    state, position = restore_state(directory, like, sharding.tree_sharding(like, mesh))
    check_fingerprints(directory, state, position)
    if growth:
        state = _grown(growth, state, fresh, mesh)
    state, new = _onto(fresh, state, stage.taught_alike)
    return state, ([growth.report()] if growth else []) + [f"{name} is new" for name in new]


def _grown(growth: grow.Growth, state: TrainState, fresh: TrainState, mesh: Mesh) -> TrainState:
    """The parent's state with the child's layers; `fresh` is the child's at step 0."""

    def of_child(params: Any, moments: Any, random: Any, zeros: Any) -> tuple[Any, Any]:
        return growth(params, random), growth.state(moments, zeros)

    given = state.params["model"], state.opt_state, fresh.params["model"], fresh.opt_state
    places = sharding.tree_sharding(jax.eval_shape(of_child, *given), mesh)
    model, moments = jax.jit(of_child, out_shardings=places)(*given)
    return state.replace(params={**state.params, "model": model}, opt_state=moments)


def _onto(fresh: TrainState, state: TrainState, taught_alike: bool) -> tuple[TrainState, list[str]]:
    """(`fresh` with all that `state` has of it, the names of what it has not)."""
    old, new = dict(checkpoint.named(state)), []

    def leaf(keys, x):
        name = sharding.path_name(keys)
        of_teacher = {"align", "watch"} & set(name.split("/"))
        if name in old and old[name].shape == x.shape and (taught_alike or not of_teacher):
            return old[name]
        new.append(name)
        return x

    return jax.tree_util.tree_map_with_path(leaf, fresh), new
