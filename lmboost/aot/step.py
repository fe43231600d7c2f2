"""A recipe's step as it is given to the compiler: its helpers' model, its plan, its program before any pass."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import config as configs
from lmboost import optimizers, plan, schedules, sharding
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.models.presets import preset
from lmboost.train_step import init_params, init_state, jit_train_step


def teacher_of(c: ConfigDict, recipe: str, named: str = "") -> ModelConfig | None:
    """The helpers' model: the preset that is named, or that of the recipe's variant "teacher"; None if none helps."""
    if not any(helps for _, helps in schedules.help_phases(c.objective, c.steps)):
        return None
    if named:
        return preset(named)
    path, _, variant = recipe.partition(":")
    words = [w for w in variant.split(",") if w.strip() == "tiny"]
    try:
        return ModelConfig(**configs.load_recipe(":".join([path, ",".join(["teacher", *words])])).model)
    except UserError as error:
        raise UserError(
            f"--config={recipe} has help, but no variant 'teacher' that says by what: give --teacher=PRESET."
        ) from error


def make_run(c: ConfigDict, teacher: ModelConfig | None, num_devices: int) -> plan.Plan:
    """The plan of a run on TPUs, as `plan.make` has it, without data or checkpoints: no program depends on them."""
    plan.check_numbers(c, num_devices)
    student = plan.check_model(c, ModelConfig(**c.model), "model", "tpu")
    phases = schedules.help_phases(c.objective, c.steps)
    active = frozenset().union(*(helps for _, helps in phases))
    helper = None
    if active:
        model = dataclasses.replace(teacher, dtype=c.teacher.dtype, remat="none", attention="auto")
        helper = plan.Helper(None, plan.check_model(c, model, "the teacher's model", "tpu"), {})
    objective = plan.make_objective(c, student, helper and helper.model, active)
    selecting = tuple((first, end) for first, end, helps in plan.spans(phases, c.steps) if "select" in helps)
    rows = plan.Rows(c.batch_size, objective.select.candidates, selecting)
    return plan.Plan(c, student, objective, phases, rows, None, None, helper, helper, {})


def lower(run: plan.Plan, mesh: Mesh, first: int, helps: frozenset[str]) -> Any:
    """The lowered step of the phase that begins at step `first`, on arguments laid out as those of a run are."""
    c, teacher = run.config, run.teacher and run.teacher.model

    def place(tree):
        places = sharding.tree_sharding(tree, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)

    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda: init_params(run.student, run.objective, c.seed, teacher))
        tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, params)
        state = place(jax.eval_shape(lambda params: init_state(params, tx), params))
        helpers = {}
        if helps:
            like = jax.eval_shape(lambda: transformer.init(teacher, jax.random.key(0)))
            like = place(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, c.teacher.dtype), like))
            needed = {"teacher": helps & {"kd", "align"}, "scorer": helps & {"select"}}
            helpers = {name: like for name, wanted in needed.items() if wanted}
        place_row = sharding.batch_sharding(mesh)
        row = jax.ShapeDtypeStruct((run.rows(first)[1], c.seq_len), jnp.int32, sharding=place_row)
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
        batch["weights"] = jax.ShapeDtypeStruct(row.shape, jnp.float32, sharding=place_row)
        return jit_train_step(run, tx, learning_rate, helps, state).lower(state, helpers, batch)
