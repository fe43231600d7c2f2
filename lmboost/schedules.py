"""The learning rate as a function of the step, and the fractions of a run that become steps.

A schedule is a function of the number of steps done so far, 0 to steps - 1, that is computed in the graph. Weights of
helps are schedules, too: each stands beside its term in objective/, and follows from `share` instead of the step where
the help ends by itself (objective/auto.py).

Fractions of a run become steps by `round(fraction * steps)`. Differences of steps are taken as integers, so that a
weight is exactly 0 from its last step on and never before it.
"""

from collections.abc import Callable

import jax
import optax

from lmboost.errors import UserError, fraction, number, one_of

SCHEDULES = ("cosine", "wsd", "linear", "constant")

Schedule = Callable[[jax.Array | int], jax.Array]  # int32 step -> float32
Weight = Callable[..., jax.Array]  # (int32 step, float32 share = 1) -> float32


def learning_rate(config, steps: int) -> Schedule:
    """The learning rate of each step, from the config's `optimizer` subtree.

    Warm-up is linear: (step + 1) / warmup_steps, so that the first step already moves. Then, with x from 0
    at the end of the warm-up to 1 at the end of the run, the rate falls from 1 to `final_fraction`:
    cosine (1 + cos(pi x)) / 2; linear 1 - x; wsd stays at 1 and falls linearly over the last `decay_fraction`
    of the run; constant stays at 1. The end is reached after the last step, so none is taken at rate 0.

    With `begin`, all of that is of the run from that step on, as if it were one of so many steps less.

    Raises a UserError on an unknown schedule, and on phases that do not fit into the run.
    """
    if config.begin:
        return _later(config, steps)
    name = one_of("optimizer.schedule", config.schedule, SCHEDULES)
    peak = number("optimizer.learning_rate", config.learning_rate)
    final = fraction("optimizer.final_fraction", config.final_fraction)
    check_steps(steps)
    warmup = config.warmup_steps
    if not 0 <= warmup <= steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup} does not fit into the run: expected 0 to steps={steps}. "
            "Shorten the warm-up or lengthen the run."
        )
    decay = steps - warmup
    if name == "wsd":
        decay = stop_step("optimizer.decay_fraction", config.decay_fraction, steps)
    if warmup + decay > steps:
        raise UserError(
            f"optimizer.warmup_steps={warmup} and optimizer.decay_fraction={config.decay_fraction} ({decay} steps) "
            f"together are longer than the run (steps={steps}): shorten one of them."
        )
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    fall = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, max(decay, 1), alpha=final),
        "linear": lambda: optax.linear_schedule(peak, peak * final, max(decay, 1)),
        "wsd": lambda: optax.linear_schedule(peak, peak * final if decay else peak, max(decay, 1)),
        "constant": lambda: optax.constant_schedule(peak),
    }[name]()
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, steps - decay])


def _later(config, steps: int) -> Schedule:
    """The schedule of the steps from `begin` on; before them the rate is that of the first."""
    if not 0 < config.begin < steps:
        raise UserError(
            f"optimizer.begin={config.begin} does not lie in the run: expected 0 to steps - 1 = {steps - 1}, the step "
            "at which the learning rate is to rise again."
        )
    rest = config.copy_and_resolve_references()
    rest.begin = 0
    part = learning_rate(rest, steps - config.begin)
    return lambda step: part(step - config.begin)


def stop_step(field: str, stop: float, steps: int) -> int:
    """The step that a fraction of the run is; raises a UserError naming the field where it is none."""
    check_steps(steps)
    return round(fraction(field, stop) * steps)


def check_steps(steps: int) -> None:
    """Raises a UserError where a run has no step."""
    if steps < 1:
        raise UserError(f"steps={steps}: a run has at least 1 step.")
