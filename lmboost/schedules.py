"""Learning rate and help weights as pure functions of the step.

A schedule is a function of the number of steps done so far, 0 to steps - 1. Given a Python int it computes
with numpy and returns a Python float, without touching a device; given a jax array, traced or not, it
computes the same formula in the graph and returns float32.

Fractions of a run become steps by `round(fraction * steps)`. Differences of steps are taken as integers, so
that a weight is exactly 0 from its last step on and never before it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmboost.errors import UserError, fraction, number, one_of

SCHEDULES = ("cosine", "wsd", "linear", "constant")
HANDOVERS = ("hard", "linear", "linear_ratio", "constant")
HELPS = ("kd", "align", "select")

Schedule = Callable[[Any], Any]


def learning_rate(config, steps: int) -> Schedule:
    """The learning rate of each step, from the config's `optimizer` subtree.

    Warm-up is linear: (step + 1) / warmup_steps, so that the first step already moves. Then, with x from 0
    at the end of the warm-up to 1 at the end of the run, the rate falls from 1 to `final_fraction`:
    cosine (1 + cos(pi x)) / 2; linear 1 - x; wsd stays at 1 and falls linearly over the last `decay_fraction`
    of the run; constant stays at 1. The end is reached after the last step, so none is taken at rate 0.

    Raises a UserError on an unknown schedule, and on phases that do not fit into the run.
    """
    name = one_of("optimizer.schedule", config.schedule, SCHEDULES)
    peak = number("optimizer.learning_rate", config.learning_rate)
    final = fraction("optimizer.final_fraction", config.final_fraction)
    _check_steps(steps)
    warmup = config.warmup_steps
    if not 0 <= warmup <= steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup} does not fit into the run: expected 0 to steps={steps}. "
            "Shorten the warm-up or lengthen the run."
        )
    decay = (
        round(fraction("optimizer.decay_fraction", config.decay_fraction) * steps) if name == "wsd" else steps - warmup
    )
    if name == "wsd" and warmup + decay > steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup} and optimizer.decay_fraction={config.decay_fraction} ({decay} steps) "
            f"together are longer than the run (steps={steps}): shorten one of them."
        )

    def rate(xp, step):
        x = xp.clip((step - (steps - decay)) / max(decay, 1), 0.0, 1.0)
        fall = {
            "cosine": lambda: 0.5 * (1 + xp.cos(math.pi * x)),
            "linear": lambda: 1 - x,
            "wsd": lambda: 1 - x,
            "constant": lambda: 1.0,
        }[name]()
        rise = xp.minimum((step + 1) / max(warmup, 1), 1.0)
        return peak * rise * (final + (1 - final) * fall)

    return _schedule(rate)


def kd_weight(config, steps: int) -> Schedule:
    """The weight w of the soft-label term at each step, from the config's `objective.kd` subtree.

    With x the share of the hand-over that is still to come, 1 up to `decay_from` and 0 at `stop`:
    hard w until `stop`; linear w * x; linear_ratio keeps w' / (1 - w') = x * w / (1 - w), that is
    w' = x w / (1 - w + x w); constant w to the end of the run, whatever `stop` says. Source: SALT (arXiv 2410.18779).

    Raises a UserError where these are not defined; linear_ratio asks for w < 1, as the ratio of 1 is infinite.
    """
    handover = one_of("objective.kd.handover", config.handover, HANDOVERS)
    w = number("objective.kd.weight", config.weight)
    if config.ce_weight == -1 and w > 1:
        raise UserError(
            f"objective.kd.weight={w} leaves ce the weight 1 - {w}: expected at most 1, "
            "or give objective.kd.ce_weight a value of its own."
        )
    if handover == "linear_ratio" and w >= 1:
        raise UserError(
            f"objective.kd.weight={w} with objective.kd.handover='linear_ratio': the ratio w / (1 - w) needs a weight "
            "below 1. Take, say, 0.99, or objective.kd.handover='linear'."
        )
    stop, start = _kd_stop(config, steps), round(fraction("objective.kd.decay_from", config.decay_from) * steps)
    falls = handover in ("linear", "linear_ratio")
    if w and falls and config.decay_from >= config.stop:
        raise UserError(
            f"objective.kd.decay_from={config.decay_from} is not before objective.kd.stop={config.stop}: "
            "the hand-over begins at the first and ends at the second, both fractions of the run."
        )

    def weight(xp, step):
        left = xp.minimum(xp.maximum(stop - step, 0) / max(stop - start, 1), 1.0)
        if not falls:
            left = xp.where(left > 0, 1.0, 0.0)
        return xp.where(left > 0, w * left / (1 - w + w * left), 0.0) if handover == "linear_ratio" else w * left

    return _schedule(weight)


def align_weight(config, steps: int) -> Schedule:
    """weight * max(0, (stop - step) / stop), from the config's `objective.align` subtree; `stop` in steps.

    Source: LET (arXiv 2602.05393).
    """
    weight = number("objective.align.weight", config.weight)
    stop = _stop_step("objective.align.stop", config.stop, steps)
    return _schedule(lambda xp, step: weight * (xp.maximum(stop - step, 0) / max(stop, 1)))


def select_active(config, steps: int) -> Callable[[int], bool]:
    """Whether a step selects its examples, from the config's `objective.select` subtree. On the host only."""
    stop = _select_stop(config, steps)
    return lambda step: bool(step < stop)


def help_phases(config, steps: int) -> list[tuple[int, frozenset[str]]]:
    """The run cut where a help ends: [(first step, names of the helps with non-zero weight)].

    `config` is the `objective` subtree; names are of `HELPS`. A phase lasts up to the next one's first step,
    the last one to the end of the run. All helps begin at step 0, so the sets only ever shrink: once a name
    is gone, no later step needs it.
    """
    kd_weight(config.kd, steps), align_weight(config.align, steps)  # for their checks
    stops = {
        "kd": _kd_stop(config.kd, steps) if config.kd.weight else 0,
        "align": _stop_step("objective.align.stop", config.align.stop, steps) if config.align.weight else 0,
        "select": _select_stop(config.select, steps),
    }
    firsts = sorted({0, *(s for s in stops.values() if s < steps)})
    return [(first, frozenset(name for name in HELPS if first < stops[name])) for first in firsts]


def active_helps(phases: Sequence[tuple[int, frozenset[str]]], step: int) -> frozenset[str]:
    """The helps of the phase that `step` lies in."""
    return next(active for first, active in reversed(phases) if step >= first)


def _schedule(formula: Callable[[Any, Any], Any]) -> Schedule:
    """`formula(xp, step)` as a function of the step: numpy for a Python int, jax.numpy for a jax array."""

    def at(step):
        if isinstance(step, jax.Array):
            return jnp.asarray(formula(jnp, step), jnp.float32)
        return float(formula(np, step))

    return at


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise UserError(f"steps={steps}: a run has at least 1 step.")


def _stop_step(field: str, stop: float, steps: int) -> int:
    _check_steps(steps)
    return round(fraction(field, stop) * steps)


def _kd_stop(config, steps: int) -> int:
    stop = _stop_step("objective.kd.stop", config.stop, steps)
    return steps if config.handover == "constant" else stop


def _select_stop(config, steps: int) -> int:
    """First step without selection; 0 where it is off: as many candidates as rows, all of which count."""
    if config.candidates < 1:
        raise UserError(
            f"objective.select.candidates={config.candidates}: expected at least 1 for each row of the batch."
        )
    most = 1 / config.candidates
    share = most if config.fraction == -1 else config.fraction
    if not 0 < share <= most + 1e-9:
        raise UserError(
            f"objective.select.fraction={config.fraction} with objective.select.candidates={config.candidates}: "
            f"expected above 0 and at most 1 / candidates = {most:g}, or -1 for just that."
        )
    stop = _stop_step("objective.select.stop", config.stop, steps)
    return stop if config.candidates > 1 or share < 1 else 0
