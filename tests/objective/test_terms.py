"""The table of helps: a weight is non-zero exactly where its span says so, and each row says what the step does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost.config import base
from lmboost.data import windows
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.objective import kd as kds
from lmboost.objective import terms
from lmboost.train_step import Program, init_params, init_state, make_train_step

fractions = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.999, 1.0])


def objective(**fields):
    c = base().objective
    for name, value in fields.items():
        help_, field = name.split("_", 1)
        c[help_][field] = value
    return c


@st.composite
def objectives(draw):
    handover = draw(st.sampled_from(kds.HANDOVERS))
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


def weights(c, steps):
    return {name: help_.schedule(c[name], steps)[0] for name, help_ in terms.HELPS.items()}


@settings(max_examples=100, deadline=None)
@given(objectives())
def test_weights_are_non_zero_exactly_on_their_spans(case):
    c, steps = case
    spans = terms.spans(c, steps)
    firsts = [span.first for span in spans]
    assert firsts[0] == 0 and firsts == sorted(set(firsts)) and spans[-1].end == steps
    assert [span.end for span in spans[:-1]] == firsts[1:]
    assert all(later.helps < earlier.helps for earlier, later in zip(spans, spans[1:], strict=False)), "only ever end"
    at = np.unique([*np.linspace(0, steps, 5).astype(int), *(s + d for s in firsts for d in (-1, 0, 1))])
    at = np.resize(at[(at >= 0) & (at < steps)], 16)  # always 16: compiled fast
    values = {name: np.array(jax.vmap(weight)(jnp.asarray(at))) for name, weight in weights(c, steps).items()}
    for i, step in enumerate(at):
        (span,) = (span for span in spans if span.first <= step < span.end)
        on = {name for name in values if values[name][i] != 0 and (name == "select" or c[name].weight)}
        if c.select.candidates == 1 and c.select.fraction in (-1, 1):
            on -= {"select"}
        assert on == span.helps, step
        assert 0 <= values["kd"][i] <= c.kd.weight * (1 + 1e-6) and 0 <= values["align"][i] <= c.align.weight * (
            1 + 1e-6
        )


def test_weights_stay_exact_at_steps_that_float32_cannot_hold():
    steps = 2**25
    weight = jax.jit(weights(objective(align_weight=1.0, align_stop=1.0), steps)["align"])
    assert weight(jnp.int32(steps - 1)) > 0 and weight(jnp.int32(steps)) == 0


def test_handovers():
    def kd(**fields):
        weight = weights(objective(**{f"kd_{k}": v for k, v in fields.items()}), 100)["kd"]
        return lambda step: float(weight(step))

    hard = kd(weight=0.6, handover="hard", stop=0.2)
    assert [hard(0), hard(19), hard(20)] == pytest.approx([0.6, 0.6, 0.0])
    linear = kd(weight=0.6, handover="linear", stop=0.4, decay_from=0.2)
    assert [linear(20), linear(30), linear(40)] == pytest.approx([0.6, 0.3, 0.0])
    ratio = kd(weight=0.6, handover="linear_ratio", stop=0.4, decay_from=0.2)
    assert [ratio(s) / (1 - ratio(s)) for s in (0, 20, 25, 30, 40)] == pytest.approx([1.5, 1.5, 1.125, 0.75, 0])
    constant = kd(weight=1.0, handover="constant", stop=0.0)
    assert constant(0) == constant(99) == 1.0


def test_a_hand_over_shorter_than_a_step_is_a_switch():
    c = objective(kd_weight=0.5, kd_handover="linear", kd_stop=0.5, kd_decay_from=0.49)
    weight = weights(c, 10)["kd"]
    assert [weight(4), weight(5)] == [0.5, 0.0]


def test_spans_read_as_documented():
    c = objective(kd_weight=0.5, kd_stop=0.2, align_weight=0.1, align_stop=0.3, select_candidates=4, select_stop=0.2)
    expected = ((0, 20, {"kd", "align", "select"}), (20, 30, {"align"}), (30, 100, set()))
    assert terms.spans(c, 100) == expected
    assert terms.spans(objective(), 100) == ((0, 100, set()),)
    rkd = objective(kd_weight=0.5, kd_handover="constant")
    assert terms.spans(rkd, 100) == ((0, 100, {"kd"}),)


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
        terms.spans(objective(**fields), 100)


def test_kd_may_weigh_more_than_one_beside_a_ce_weight_of_its_own():
    assert weights(objective(kd_weight=1.5, kd_ce_weight=0.3), 100)["kd"](0) == 1.5


@pytest.mark.parametrize("name", terms.HELPS)
def test_the_step_gives_the_numbers_that_the_table_names(name):
    """Of the program with this help alone, which is given the one model that the table says."""
    model = ModelConfig(vocab_size=32, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
    c = objective(kd_weight=0.5, align_weight=0.5, select_candidates=2)
    made = terms.make_objective(c, 100, model, model)
    program = Program(model, made, frozenset({name}), model, model)
    batch = windows.batch_of([], 8 * terms.HELPS[name].forward(made, model).rows, 4)
    tx, plain = optax.sgd(1.0), Program(model, made)
    state = jax.eval_shape(lambda: init_state(init_params(model, made, 0, model), tx))
    helper = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    helped, alone = (
        set(jax.eval_shape(make_train_step(p, tx, lambda s: 1.0), state, helpers, batch)[1])
        for p, helpers in ((program, {terms.HELPS[name].needs: helper}), (plain, {}))
    )
    assert helped - alone == set(terms.HELPS[name].metrics)


@pytest.mark.parametrize("field, value", [("top_k", 3), ("divergence", "reverse"), ("temperature_on", "both")])
def test_heads_in_blocks_of_columns_ask_for_a_kd_that_is_a_distribution(field, value):
    tree = base().objective
    tree.kd.weight, tree.kd.temperature, tree.scatter_head = 0.5, 2.0, True
    model = ModelConfig(vocab_size=16, num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8)
    assert terms.make_objective(tree, 10, model, model).scatter_head
    tree.kd[field] = value
    with pytest.raises(UserError, match="objective.scatter_head=True needs a kd whose gradient"):
        terms.make_objective(tree, 10, model, model)
    tree.kd.weight = 0.0
    assert terms.make_objective(tree, 10, model, None).scatter_head
