"""A recipe's step as it is given to the compiler: its helpers' model, its plan, its program before any pass."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import config as configs
from lmboost import optimizers, plan, sharding
from lmboost.data import windows
from lmboost.data.retokenize import Retokenizer
from lmboost.data.scored import Parts
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.models.presets import preset
from lmboost.objective import terms
from lmboost.teacher import Helper, quantized
from lmboost.train_step import init_state, jit_train_step


def teacher_of(c: ConfigDict, recipe: str, named: str = "") -> ModelConfig | None:
    """The helpers' model: the preset that is named, or that of the recipe's variant "teacher"; None if none helps."""
    if not any(span.helps for span in terms.spans(c.objective, c.steps)):
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
    """The plan of a run on TPUs, without data or checkpoints: no program depends on them. The teacher scores, too.

    With `teacher.seq_len` it has another tokenizer, and rows of so many tokens.
    """
    plan.check_numbers(c, num_devices)
    student, helper = ModelConfig(**c.model).fit(c.seq_len, "tpu"), None
    if teacher:
        model = dataclasses.replace(
            teacher, dtype=c.teacher.dtype, quantize=quantized(c), remat="none", attention="auto"
        )
        own = c.teacher.seq_len
        retokenizer = Retokenizer("teacher", data="", path="", seq_len=own) if own else None
        helper = Helper(None, model.fit(own or c.seq_len, "tpu", "the teacher's model"), retokenizer)
    return plan.outline(c, student, helper, helper)


def lower(c: ConfigDict, run: plan.Plan, mesh: Mesh, span: terms.Span, known: Parts | None = None) -> Any:
    """The lowered step of a span, on arguments laid out as those of a run are.

    known: what the helpers have said before the run; then they are not in the step.
    """

    def place(tree):
        places = sharding.tree_sharding(tree, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)

    with jax.set_mesh(mesh):
        params = jax.eval_shape(run.init_params)
        tx, learning_rate = optimizers.make_optimizer(c.optimizer, run.steps, params)
        state = place(jax.eval_shape(lambda params: init_state(params, tx, run.objective.auto), params))
        helpers = {}
        for name in terms.needed(span.helps) if not known else ():
            like = jax.eval_shape(lambda: transformer.init(run.teacher.model, jax.random.key(0)))
            helpers[name] = place(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, c.teacher.dtype), like))
        _, rows = run.rows(span.first)
        if known:
            bases = {str(s.layer): (s.width, s.kept) for s in known.states if s.kept < s.width}
            everywhere = sharding.replicated(mesh)
            shapes = {k: jax.ShapeDtypeStruct(shape, "float32", sharding=everywhere) for k, shape in bases.items()}
            helpers = {"targets": shapes}
        said = known and known.like(1, terms.groups(run.objective, span.helps))
        batch = windows.batch_of([], 1, run.seq_len, said)
        for retokenizer in () if known else run.retokenizers(span.first):
            batch |= retokenizer.padded(1, run.seq_len)
        batch = sharding.batch_like(batch, rows, mesh)
        program = dataclasses.replace(run.program(span.helps), known=known)
        return jit_train_step(program, tx, learning_rate, state).lower(state, helpers, batch)
