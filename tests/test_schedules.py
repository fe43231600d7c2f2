"""The learning rate rises and falls as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost import schedules
from lmboost.config import base
from lmboost.errors import UserError

fractions = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.999, 1.0])


def optimizer(**fields):
    c = base().optimizer
    c.update(fields)
    return c


@st.composite
def rates(draw):
    steps = draw(st.integers(1, 400))
    decay = draw(fractions)
    warmup = draw(st.integers(0, steps - round(decay * steps)))
    c = optimizer(
        schedule=draw(st.sampled_from(schedules.SCHEDULES)),
        warmup_steps=warmup,
        decay_fraction=decay,
        final_fraction=draw(fractions),
        learning_rate=draw(st.floats(1e-6, 1)),
    )
    return c, steps


@settings(max_examples=150, deadline=None)
@given(rates())
def test_learning_rate_rises_then_falls_within_its_bounds(case):
    c, steps = case
    rate = schedules.learning_rate(c, steps)
    values = np.array(jax.vmap(rate)(jnp.arange(400)))[:steps]  # always 400: compiled fast
    peak = max(c.warmup_steps - 1, 0)
    assert (values > 0).all(), "no step at rate 0, neither the first nor the last"
    assert values.max() <= c.learning_rate * (1 + 1e-6)
    assert (np.diff(values[: peak + 1]) > 0).all() and (
        np.diff(values[peak:]) <= 1e-6 * c.learning_rate
    ).all()  # float32
    assert (values[peak:] >= c.learning_rate * c.final_fraction * (1 - 1e-6)).all()
    assert values[peak] == pytest.approx(c.learning_rate)
    end = (
        1.0
        if c.schedule == "constant" or (c.schedule == "wsd" and not round(c.decay_fraction * steps))
        else c.final_fraction
    )
    if c.warmup_steps < steps:
        assert rate(steps) == pytest.approx(c.learning_rate * end), "the end is reached after the last step"


def test_shapes_of_the_learning_rate():
    def rate(name):
        return schedules.learning_rate(
            optimizer(schedule=name, learning_rate=1.0, warmup_steps=20, final_fraction=0.1), 120
        )

    for name in schedules.SCHEDULES:
        assert [rate(name)(s) for s in (0, 9, 19, 20)] == pytest.approx([1 / 20, 0.5, 1.0, 1.0])
    assert rate("cosine")(70) == pytest.approx(0.55) and rate("linear")(70) == pytest.approx(0.55)
    assert rate("cosine")(45) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 4)))
    assert rate("wsd")(96) == pytest.approx(1.0) and rate("wsd")(108) == pytest.approx(0.55)
    assert rate("constant")(119) == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(rates(), st.integers(1, 50))
def test_a_schedule_that_begins_anew_is_that_of_the_rest_of_the_run(case, begin):
    c, steps = case
    whole = schedules.learning_rate(c, steps)
    c.begin = begin
    later = schedules.learning_rate(c, steps + begin)
    for step in {0, c.warmup_steps, steps // 2, steps - 1}:
        assert later(begin + step) == whole(step)
    assert later(0) == later(begin)


@pytest.mark.parametrize(
    "fields, steps, message",
    [
        ({"schedule": "cosin"}, 10, r"optimizer.schedule='cosin' is not known \(did you mean 'cosine'\?\)"),
        ({"warmup_steps": 11}, 10, "optimizer.warmup_steps=11 does not fit .* 0 to steps=10. Shorten"),
        ({"begin": 10}, 10, "optimizer.begin=10 does not lie in the run: expected 0 to steps - 1 = 9"),
        ({"begin": -1}, 10, "optimizer.begin=-1 does not lie in the run"),
        ({"begin": 8, "warmup_steps": 3}, 10, "warmup_steps=3 does not fit into the run: expected 0 to steps=2"),
        ({"warmup_steps": -1}, 10, "optimizer.warmup_steps=-1 does not fit"),
        ({"warmup_steps": 9, "schedule": "wsd"}, 10, r"warmup_steps=9 and optimizer.decay_fraction=0.2 \(2 steps\)"),
        ({"final_fraction": 1.1}, 200, "optimizer.final_fraction=1.1 is not a fraction"),
        ({"decay_fraction": -0.1, "schedule": "wsd"}, 200, "optimizer.decay_fraction=-0.1 is not a fraction"),
        ({"learning_rate": -1.0}, 200, "optimizer.learning_rate=-1.0 is out of range: expected a finite number"),
        ({"learning_rate": float("nan")}, 200, "optimizer.learning_rate=nan is out of range"),
        ({"warmup_steps": 0}, 0, "steps=0: a run has at least 1 step"),
    ],
)
def test_bad_learning_rates_are_named(fields, steps, message):
    with pytest.raises(UserError, match=message):
        schedules.learning_rate(optimizer(**fields), steps)
