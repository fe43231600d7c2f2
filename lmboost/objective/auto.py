"""Help that knows when to end: the less of it, the less the teacher is ahead of the student, and none below a lead.

With `objective.kd.stop=auto` or `objective.align.stop=auto` the step compares teacher and student on the labels of
the same tokens, or where the teacher reads other tokens, on the text of the same chunks (`chunks`): then the lead is
what the student loses more on that text, for each of its own tokens in it. The teacher's lead, smoothed, is part of the
run's state: weights follow from it inside the graph, so that a run is the same on any number of hosts and goes on
exactly.

Help ends while the teacher still leads: who follows a teacher comes up to it ever more slowly, and is overtaken by who
does not (benchmarks/track/LOG.md).
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lmboost.errors import UserError, number
from lmboost.schedules import check_steps, stop_step

AUTO = "auto"
EVERY = 8  # steps between two measurements where nothing but them asks for the teacher's logits
NEVER = -1  # as the step at which help has ended
ENDED = "help_ended"  # the metric that is this step


@dataclasses.dataclass(frozen=True)
class Auto:
    """Which helps end by themselves, and what their share is, given the teacher's lead in nats per token.

    share = clip((lead - end) / (full - end), 0, 1), and 0 for good from the first lead below `end`
    """

    helps: frozenset[str]
    full: float = 1.0
    end: float = 0.25
    smoothing: float = 0.95

    def validate(self, field: str = "objective.auto") -> "Auto":
        number(f"{field}.smoothing", self.smoothing, below=1.0)
        if not self.end < self.full:
            raise UserError(f"{field}.full={self.full} must be above {field}.end={self.end}; both are nats per token.")
        return self


class Watch(flax.struct.PyTreeNode):
    """What a run knows of its teacher: scalars, the same on all devices.

    `total` / `count` is the mean of the measured leads, in which each weighs `smoothing` times as much as that of the
    step after it.
    """

    total: jax.Array  # float32, nats per token
    count: jax.Array  # float32, 0 before the first measurement
    ended: jax.Array  # int32, the first step without help, or NEVER

    @property
    def lead(self) -> jax.Array:
        """The student's loss on the labels less the teacher's, smoothed; 0 before the first measurement."""
        return self.total / jnp.maximum(self.count, 1e-6)


def latest_stop(field: str, stop: float | str, steps: int) -> int:
    """The step that a fraction of the run is, and its end for help that ends by itself ("auto").

    Raises a UserError naming the field where it is neither.
    """
    check_steps(steps)
    if stop == AUTO:
        return steps
    if isinstance(stop, bool) or not isinstance(stop, int | float):
        raise UserError(f"{field}={stop!r}: expected a fraction of the run, a number from 0 to 1, or 'auto'.")
    return stop_step(field, stop, steps)


def from_config(tree: ConfigDict) -> Auto | None:
    """The rule of the `objective` subtree; None where no help ends by it."""
    helps = frozenset(name for name in ("kd", "align") if tree[name].weight and tree[name].stop == AUTO)
    return Auto(helps, **tree.auto).validate() if helps else None


def begin() -> Watch:
    """Nothing is known yet. Each number is an array of its own: the step donates them."""
    return Watch(jnp.float32(0), jnp.float32(0), jnp.int32(NEVER))


def share(rule: Auto, watch: Watch) -> jax.Array:
    """How much of its weight a help has, 0 to 1; nothing before the first measurement."""
    ahead = jnp.clip((watch.lead - rule.end) / (rule.full - rule.end), 0.0, 1.0)
    return jnp.where((watch.count > 0) & (watch.ended == NEVER), ahead, 0.0)


def update(rule: Auto, watch: Watch, lead: jax.Array, measured: jax.Array, step: jax.Array, every: int = 1) -> Watch:
    """After `step`, in which the teacher had this lead; as it was where that was not `measured`.

    every: steps between two measurements.
    """
    keep = rule.smoothing**every
    new = watch.replace(total=keep * watch.total + (1 - keep) * lead, count=keep * watch.count + (1 - keep))
    lost = (watch.ended == NEVER) & (new.lead < rule.end)
    new = new.replace(ended=jnp.where(lost, step + 1, watch.ended))
    return jax.tree.map(lambda after, before: jnp.where(measured, after, before), new, watch)
