"""Help that ends by itself: what the step measures, when help ends, and that a run goes on exactly around it."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost import checkpoint, sharding, train
from lmboost.errors import UserError
from lmboost.objective import auto
from lmboost.objective.align import Alignment
from lmboost.objective.auto import Auto
from lmboost.train_step import make_eval_step
from tests import runs
from tests.compare import assert_same, lines, losses
from tests.test_train_step import MESHES, STUDENT, TEACHER, assert_close, make_batch, models, objective, run_step

LEAD = st.floats(-3, 3, width=32)


@settings(max_examples=50, deadline=None)
@given(leads=st.lists(LEAD, min_size=1, max_size=8), end=st.floats(-1, 1, width=32), smoothing=st.floats(0, 0.99))
def test_help_follows_the_smoothed_lead_and_ends_once(leads, end, smoothing):
    rule = Auto(frozenset({"kd"}), end + 0.5, end, smoothing)
    watch, past, ended = auto.begin(), [], None
    assert auto.share(rule, watch) == 0, "nothing is known yet"
    for step, lead in enumerate(leads):
        watch = auto.update(rule, watch, jnp.float32(lead), jnp.bool_(True), jnp.int32(step))
        past.append(lead)
        weights = smoothing ** np.arange(len(past))[::-1]
        mean = np.sum(weights * past) / np.sum(weights)
        assert float(watch.lead) == pytest.approx(mean, abs=1e-4)
        if abs(mean - end) < 1e-4:
            return  # rounding decides
        ended = step + 1 if ended is None and mean < end else ended
        assert int(watch.ended) == (auto.NEVER if ended is None else ended)
        expected = 0.0 if ended is not None else min(max((mean - end) / 0.5, 0), 1)
        assert float(auto.share(rule, watch)) == pytest.approx(expected, abs=1e-3)
    same = auto.update(rule, watch, jnp.float32(jnp.nan), jnp.bool_(False), jnp.int32(len(leads)))
    assert_same(same, watch)


def watched(helps, weight=0.5, **fields):
    """An objective whose weights are `weight` times the share."""
    weights = {"kd": lambda _, share: weight * share, "align": lambda _, share: weight * share}
    return objective(weights=weights, auto=Auto(frozenset(helps)), align=Alignment(((2, 2),)), **fields)


@pytest.mark.parametrize("helps, mesh", [({"kd"}, None), ({"align"}, "all"), ({"kd", "align"}, None)])
def test_the_lead_is_the_difference_of_the_losses_and_the_first_step_is_plain(helps, mesh):
    batch = make_batch()
    params, teacher_params = models()
    loss = lambda model, p: np.divide(*jax.jit(make_eval_step(model, 128))(p, batch))  # noqa: E731
    expected = loss(STUDENT, params["model"]) - loss(TEACHER, teacher_params)
    obj = dataclasses.replace(watched(helps), block_tokens=32)
    found, metrics = run_step(obj, helps, batch, accumulation=2, mesh=mesh and sharding.make_mesh(*MESHES[mesh]))
    assert metrics["lead"] == pytest.approx(expected, abs=1e-5) and abs(expected) > 0.1
    assert metrics[auto.ENDED] == (1 if expected < obj.auto.end else auto.NEVER)
    assert_close(found["model"], run_step(objective(), (), batch)[0]["model"])


AUTO = ("--config.objective.kd.weight=0.5", "--config.objective.kd.stop=auto", "--config.objective.kd.handover=linear")
BOTH = (*AUTO, "--config.objective.align.weight=0.5", "--config.objective.align.stop=auto")
EACH = ("--config.checkpoint.every=1", "--config.checkpoint.keep=8")


@pytest.mark.slow
@pytest.mark.parametrize("around", [(0,), (-1, 1)])
def test_a_run_goes_on_exactly_wherever_its_help_ends(tmp_path, recipe, data, teacher, monkeypatch, around):
    arguments = (data, teacher, *BOTH, *EACH, "--config.objective.auto.smoothing=0")
    runs.run(recipe, tmp_path / "never", *arguments, "--config.objective.auto.end=-9")
    leads = losses(tmp_path / "never", "lead")
    ended = 4  # the lead is below that of all steps before for the first time after the fourth
    end = (leads[ended] + min(leads[step] for step in range(1, ended))) / 2
    assert end > leads[ended], leads
    arguments = (*arguments, f"--config.objective.auto.end={end}", f"--config.objective.auto.full={end + 1}")

    alive, compiled = {}, train.jit_train_step

    def spy(program, *rest):
        alive[program.helps] = sum(x.dtype == jnp.bfloat16 for x in jax.live_arrays())
        return compiled(program, *rest)

    monkeypatch.setattr(train, "jit_train_step", spy)
    whole = runs.run(recipe, tmp_path / "whole", *arguments)
    assert int(whole.watch.ended) == ended
    assert alive[frozenset({"kd", "align"})] > 0 and alive[frozenset()] == 0, "the teacher is freed"
    weights = losses(tmp_path / "whole", "kd_weight")
    assert weights[1] == 0 and weights[ended] > 0 and weights[ended + 1] == 0 and ended + 2 not in weights
    flops = np.diff([0, *losses(tmp_path / "whole", "flops").values()])
    assert np.ptp(flops[: ended + 1]) == np.ptp(flops[ended + 1 :]) == 0 and flops[0] > flops[-1]

    numbers = {line["step"]: line["loss"] for line in lines(tmp_path / "whole") if "loss" in line}
    for stopped in (ended + apart for apart in around):
        part = tmp_path / f"part{stopped}"
        shutil.copytree(tmp_path / "whole", part)
        for step in checkpoint.Run(part).steps():
            if step > stopped:
                shutil.rmtree(part / "checkpoints" / str(step))
        assert_same(runs.run(recipe, part, *arguments), whole)
        assert losses(part) == numbers


@pytest.mark.slow
def test_a_teacher_that_knows_nothing_is_let_go_at_once(home, recipe, data, teacher):
    state = runs.run(
        recipe, home / "random", data, teacher, "--config.teacher.random=true", "--config.objective.align.weight=2",
        "--config.objective.align.stop=auto", "--config.objective.auto.end=0.1",
    )  # fmt: skip
    assert int(state.watch.ended) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (["kd.stop=atuo"], "objective.kd.stop='atuo': expected a fraction of the run, a number from 0 to 1, or 'auto'"),
        (["align.weight=1", "align.stop=true"], "objective.align.stop=True: expected a fraction of the run"),
        (["kd.stop=auto", "kd.handover=constant"], "objective.kd.stop=auto with objective.kd.handover='constant'"),
        (["kd.stop=auto", "kd.decay_from=0.1"], "objective.kd.decay_from=0.1: help that ends by itself begins"),
        (["kd.stop=auto", "auto.end=1"], "objective.auto.full=1.0 must be above objective.auto.end=1.0"),
        (["kd.stop=auto", "auto.smoothing=1"], "objective.auto.smoothing=1.0 is out of range"),
    ],
)
def test_what_is_no_rule_is_refused(tmp_path, recipe, data, teacher, changes, message):
    flags = [f"--config.objective.{change}" for change in ("kd.weight=0.5", *changes)]
    with pytest.raises(UserError, match=re.escape(message)):
        runs.run(recipe, tmp_path / "run", data, teacher, *flags)
