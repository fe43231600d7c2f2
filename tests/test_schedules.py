"""Schedules: host and graph agree, and a help's weight is non-zero exactly where its phase says so."""

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


def objective(**fields):
    c = base().objective
    for name, value in fields.items():
        help_, field = name.split("_", 1)
        c[help_][field] = value
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
    values = np.array([rate(s) for s in range(steps)])
    peak = max(c.warmup_steps - 1, 0)
    assert (values > 0).all(), "no step at rate 0, neither the first nor the last"
    assert values.max() <= c.learning_rate * (1 + 1e-9)
    assert (np.diff(values[: peak + 1]) > 0).all() and (np.diff(values[peak:]) <= 1e-12).all()
    assert (values[peak:] >= c.learning_rate * c.final_fraction * (1 - 1e-9)).all()
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
        assert rate(name)(0) == pytest.approx(1 / 20) and rate(name)(9) == pytest.approx(0.5) and rate(name)(20) == 1.0
    assert rate("cosine")(70) == rate("linear")(70) == pytest.approx(0.55)
    assert rate("cosine")(45) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi / 4)))
    assert rate("wsd")(96) == 1.0 and rate("wsd")(108) == pytest.approx(0.55)
    assert rate("constant")(119) == 1.0


@st.composite
def objectives(draw):
    handover = draw(st.sampled_from(schedules.HANDOVERS))
    stop = draw(fractions)
    falls = handover in ("linear", "linear_ratio")
    weight = draw(st.sampled_from([0.0, 1e-3, 0.5, 0.9, 0.99, 1.0][: 5 if handover == "linear_ratio" else 6]))
    start = draw(st.floats(0, stop, exclude_max=True)) if falls and stop > 0 else 0.0
    if falls and weight and start >= stop:
        weight = 0.0
    c = objective(
        kd_weight=weight,
        kd_handover=handover,
        kd_stop=stop,
        kd_decay_from=start,
        align_weight=draw(st.sampled_from([0.0, 0.1, 10.0])),
        align_stop=draw(fractions),
        select_candidates=(candidates := draw(st.sampled_from([1, 2, 4]))),
        select_fraction=draw(st.sampled_from([-1.0, 1 / candidates, 0.5 / candidates])),
        select_stop=draw(fractions),
    )
    return c, draw(st.integers(1, 120) | st.just(1000))


@settings(max_examples=100, deadline=None)
@given(objectives())
def test_weights_are_non_zero_exactly_on_their_phases(case):
    c, steps = case
    kd, align = schedules.kd_weight(c.kd, steps), schedules.align_weight(c.align, steps)
    select = schedules.select_active(c.select, steps)
    phases = schedules.help_phases(c, steps)
    firsts = [first for first, _ in phases]
    assert firsts[0] == 0 and firsts == sorted(set(firsts)) and firsts[-1] < steps
    assert all(later < earlier for (_, earlier), (_, later) in zip(phases, phases[1:], strict=False)), (
        "helps only ever end"
    )
    for s in range(steps):
        on = {name for name, weight in (("kd", kd(s)), ("align", align(s)), ("select", select(s))) if weight != 0}
        assert on == schedules.active_helps(phases, s), s
        assert 0 <= kd(s) <= c.kd.weight * (1 + 1e-9) and 0 <= align(s) <= c.align.weight
    assert align(0) == (c.align.weight if round(c.align.stop * steps) else 0)


@settings(max_examples=40, deadline=None)
@given(objectives(), rates())
def test_host_and_graph_agree(case, rate_case):
    c, steps = case
    for exact_zero, schedule, length in (
        (True, schedules.kd_weight(c.kd, steps), steps),
        (True, schedules.align_weight(c.align, steps), steps),
        (False, schedules.learning_rate(*rate_case), rate_case[1]),
    ):
        at = np.linspace(0, length, 9).astype(int)  # always 9: compiled once
        graph = np.array(jax.vmap(schedule)(jnp.asarray(at)))
        host = [schedule(int(s)) for s in at]
        assert all(type(v) is float for v in host) and graph.dtype == np.float32
        np.testing.assert_allclose(graph, host, rtol=2e-5, atol=1e-7)
        if exact_zero:  # a rate may be too small for float32, a weight is 0 on both sides or on none
            np.testing.assert_array_equal(graph == 0, np.array(host) == 0)


def test_weights_stay_exact_at_steps_that_float32_cannot_hold():
    c, steps = objective(align_weight=1.0, align_stop=1.0).align, 2**25
    weight = jax.jit(schedules.align_weight(c, steps))
    assert weight(jnp.int32(steps - 1)) > 0 and weight(jnp.int32(steps)) == 0


def test_handovers():
    def kd(**fields):
        return schedules.kd_weight(objective(**{f"kd_{k}": v for k, v in fields.items()}).kd, 100)

    hard = kd(weight=0.6, handover="hard", stop=0.2)
    assert [hard(0), hard(19), hard(20)] == [0.6, 0.6, 0.0]
    linear = kd(weight=0.6, handover="linear", stop=0.4, decay_from=0.2)
    assert [linear(20), linear(30), linear(40)] == pytest.approx([0.6, 0.3, 0.0])
    ratio = kd(weight=0.6, handover="linear_ratio", stop=0.4, decay_from=0.2)
    assert [ratio(s) / (1 - ratio(s)) for s in (0, 20, 25, 30, 40)] == pytest.approx([1.5, 1.5, 1.125, 0.75, 0])
    constant = kd(weight=1.0, handover="constant", stop=0.0)
    assert constant(0) == constant(99) == 1.0


def test_a_hand_over_shorter_than_a_step_is_a_switch():
    c = objective(kd_weight=0.5, kd_handover="linear", kd_stop=0.5, kd_decay_from=0.49).kd
    weight = schedules.kd_weight(c, 10)
    assert [weight(4), weight(5)] == [0.5, 0.0]


def test_phases_read_as_documented():
    c = objective(kd_weight=0.5, kd_stop=0.2, align_weight=0.1, align_stop=0.3, select_candidates=4, select_stop=0.2)
    expected = [(0, frozenset({"kd", "align", "select"})), (20, frozenset({"align"})), (30, frozenset())]
    assert schedules.help_phases(c, 100) == expected
    assert schedules.help_phases(objective(), 100) == [(0, frozenset())]
    rkd = objective(kd_weight=0.5, kd_handover="constant")
    assert schedules.help_phases(rkd, 100) == [(0, frozenset({"kd"}))]


@pytest.mark.parametrize(
    "fields, steps, message",
    [
        ({"schedule": "cosin"}, 10, r"optimizer.schedule='cosin' is not known \(did you mean 'cosine'\?\)"),
        ({"warmup_steps": 11}, 10, "optimizer.warmup_steps=11 does not fit .* 0 to steps=10. Shorten"),
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


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kd_handover": "linaer"}, r"objective.kd.handover='linaer' is not known \(did you mean 'linear'\?\)"),
        ({"kd_weight": -0.1}, "objective.kd.weight=-0.1 is out of range"),
        ({"kd_weight": 1.5}, r"objective.kd.weight=1.5 leaves ce the weight 1 - 1.5.*objective.kd.ce_weight"),
        ({"kd_weight": 1.0, "kd_handover": "linear_ratio"}, "objective.kd.weight=1.0 with .*'linear_ratio'.*Take, say"),
        (
            {"kd_weight": 0.5, "kd_handover": "linear", "kd_decay_from": 0.2},
            "objective.kd.decay_from=0.2 is not before",
        ),
        ({"kd_stop": 1.2}, "objective.kd.stop=1.2 is not a fraction"),
        ({"kd_decay_from": -0.2}, "objective.kd.decay_from=-0.2 is not a fraction"),
        ({"align_weight": float("inf")}, "objective.align.weight=inf is out of range"),
        ({"align_stop": -1.0}, "objective.align.stop=-1.0 is not a fraction"),
        ({"select_candidates": 0}, "objective.select.candidates=0: expected at least 1"),
        (
            {"select_candidates": 4, "select_fraction": 0.5},
            "objective.select.fraction=0.5 .*at most 1 / candidates = 0.25",
        ),
        ({"select_fraction": 0.0}, "objective.select.fraction=0.0"),
        ({"select_stop": 2.0}, "objective.select.stop=2.0 is not a fraction"),
    ],
)
def test_bad_helps_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        schedules.help_phases(objective(**fields), 100)


def test_kd_may_weigh_more_than_one_beside_a_ce_weight_of_its_own():
    c = objective(kd_weight=1.5, kd_ce_weight=0.3).kd
    assert schedules.kd_weight(c, 100)(0) == 1.5
