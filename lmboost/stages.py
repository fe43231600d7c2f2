"""Stages: a run that goes on where another one has stood, with something changed.

`init.kind=continue` takes parameters, optimizer and step from the parent, so that the place in the schedule stays what
it was: `steps` are those of the whole chain, and so are all fractions of it. Tokens and FLOPs count on, too, and
metrics.jsonl begins with the parent's lines. The data goes on at the parent's row where data, row length and seed are
the same; else it begins anew, in an order of its own. What changes is in the manifest, one entry for each stage.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lmboost import checkpoint, places
from lmboost import config as configs
from lmboost.data.loader import DataInfo
from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import grow

_EARLIER = "it was written before there were stages: resume.path goes on from it with an unchanged data position"


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where a run begins in a chain of runs.

    Attributes:
      directory: the checkpoint that it begins with.
      step: that the run counts on from.
      row: the first row of the data's order that it reads.
      order: the seed of that order.
      tokens, flops: that the chain has spent before.
      changes: "field: old -> new", of what is computed otherwise than before.
      evaluated: whether the parent has evaluated itself at this step, as the same model on the same rows.
    """

    directory: str
    step: int = 0
    row: int = 0
    order: int = 0
    tokens: float = 0
    flops: float = 0.0
    changes: tuple[str, ...] = ()
    evaluated: bool = False

    @property
    def taught_alike(self) -> bool:
        """Whether what was measured of the teacher, and the maps to its states, still hold."""
        fields = ("teacher.", "objective.align.map", "objective.align.pairs", "objective.auto.")
        return not any(line.startswith(fields) for line in self.changes)


def find(
    c: ConfigDict, student: ModelConfig, train: DataInfo, validation: DataInfo
) -> tuple[Stage, list[dict[str, Any]]]:
    """(the stage that a config asks for, the entries of the stages before it).

    Raises a UserError where the parent is no run, has not come to its end and no step of it is named, has another
    tokenizer or optimizer, stands at `steps` or after it or before `optimizer.begin`, or cannot become the student.
    """
    parent = checkpoint.Saved.find(c.init.path, c.init.step, "init.path")
    directory = parent.directory
    if not parent.config or not (directory / "training").exists():
        raise UserError(
            f"init.path={c.init.path!r}: {directory} has parameters alone, no optimizer to go on with. Give a run, or "
            "set init.kind='copy', which starts anew from its parameters."
        )
    parent.check_tokenizer(train, unknown_too=True)
    position = checkpoint.read_json(directory, "position")
    step, old = position["step"], configs.of_manifest(parent.config, f"{directory}")
    whole = places.find(c.init.path, "init.path") != directory  # a run, not one of its checkpoints
    if whole and c.init.step == -1 and step < old.steps:
        raise UserError(
            f"init.path={c.init.path!r} has not come to its end: its last checkpoint is of step {step} of {old.steps}. "
            f"Let it finish, or set init.step={step} to go on from there."
        )
    if old.optimizer.name != c.optimizer.name:
        raise UserError(
            f"optimizer.name={c.optimizer.name!r}, but the run in {c.init.path} has the moments of "
            f"{old.optimizer.name!r}: a stage goes on with the same optimizer. Set it to that, or init.kind='copy'."
        )
    if c.steps <= step:
        raise UserError(
            f"steps={c.steps}, but {directory} stands at step {step}: a stage counts on from there, and steps is the "
            "number of the whole chain. Give a larger one."
        )
    if c.optimizer.begin > step:
        raise UserError(
            f"optimizer.begin={c.optimizer.begin}, but {directory} stands at step {step}: the schedule begins anew "
            "where a stage begins, or one before it. Set it to at most that."
        )
    if c.init.grow:
        grow.plan(c.init.grow, student.with_layers(parent.model.sizes, parent.model.kinds), student)
        if c.optimizer.name == "adafactor":
            raise UserError("init.grow: the statistics of optimizer.name='adafactor' can't be given to more layers.")
    elif parent.model.num_layers != student.num_layers:
        raise UserError(
            f"model.num_layers={student.num_layers}, but the run in {c.init.path} has {parent.model.num_layers}: set "
            f"it to that, or init.grow to one of {', '.join(grow.GROWTHS)} where it is to become deeper."
        )
    if "spent" not in position:
        raise UserError(f"init.path={c.init.path!r}: {directory} does not say what it has cost, as {_EARLIER}.")
    own = {"fingerprint": train.fingerprint, "seq_len": c.seq_len}
    same = all(position.get(name) == value for name, value in own.items()) and old.seed == c.seed
    changes = _changes(old, c, position.get("fingerprint") == train.fingerprint)
    alike = not any(line.startswith(("model.", "seq_len")) for line in changes)  # so is the loss on the same rows
    alike &= parent.manifest["data"].get("fingerprint") == validation.fingerprint
    stage = Stage(
        directory=str(directory),
        step=step,
        row=position["first_row"] if same else 0,
        order=position["seed"] if same else _order(c.seed, step),
        **position["spent"],
        changes=tuple(changes),
        evaluated=position.get("evaluated", False) and alike,
    )
    return stage, parent.manifest.get("stages", [])


def _order(seed: int, step: int) -> int:
    """A seed for the order of data that begins anew: with the run's own, the same rows would come as before."""
    return int.from_bytes(hashlib.sha256(f"{seed} from {step}".encode()).digest()[:4])


def _changes(old: ConfigDict, new: ConfigDict, same_data: bool) -> list[str]:
    """Lines of what is computed otherwise; where a run starts is none, nor where the same data lies."""
    about = ("init.", "data.train:") if same_data else ("init.",)
    return [line for line in configs.differences(old, new) if not line.startswith(about)]


def entry(stage: Stage) -> dict[str, Any]:
    """A stage as the manifest has it."""
    return dataclasses.asdict(stage) | {"changes": list(stage.changes)}


def of_entry(values: Mapping[str, Any]) -> Stage:
    """The stage that `entry` has written."""
    return Stage(**{**values, "changes": tuple(values["changes"])})
