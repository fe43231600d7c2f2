"""Whether a run can go on from where it, or another one, has stood; and what begins again when it does."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lmboost import checkpoint, schedules
from lmboost import config as configs
from lmboost.errors import UserError
from lmboost.hf import reader
from lmboost.objective import terms

_POSITION = {"first_row": "row of the data", "seq_len": "seq_len", "seed": "seed", "fingerprint": "training data"}
_RISE = 1.05  # a learning rate that is so much higher than the one before is said


def check_workdir(config: ConfigDict, workdir: str, data: Mapping[str, str]) -> None:
    """Raises a UserError where a workdir holds a run of another config or data, or is no place for a run.

    Args:
      data: the fingerprints of "train" and of the validation set ("fingerprint"), as in a manifest. Where they are
        those of the run, its data may have moved; so may helpers, which are compared when they are read.
    """
    run = checkpoint.Run(workdir)
    if not (manifest := run.manifest()):
        _check_free(run)
        return
    old, new = configs.of_manifest(manifest["config"], f"{run.manifest_path}"), ConfigDict(json.loads(config.to_json()))
    before = manifest.get("data", {})
    moved = {"data.train"} if before.get("train") == data["train"] else set()
    moved |= {"data.validation"} if before.get("fingerprint") == data["fingerprint"] else set()
    moved |= {"teacher.path"} if _is_marked(manifest.get("teacher")) else set()
    moved |= {"teacher.targets"} if _is_marked(manifest.get("targets")) and new.teacher.targets else set()
    moved |= {"objective.select.scorer"} if _is_marked(manifest.get("scorer")) else set()
    if changed := [line for line in configs.differences(old, new) if line.partition(":")[0] not in moved]:
        more = f"\n  and {len(changed) - 8} more" if len(changed) > 8 else ""
        raise UserError(
            f"--workdir={workdir} holds a run of another config:{_lines(changed[:8])}{more}\nGive that run's config, "
            f"or another workdir. There, resume.path={workdir} goes on from it where its data and seed stay the same, "
            f"and init.path={workdir} starts from its parameters alone."
        )
    for name, done, field in (("train", "trained", "data.train"), ("fingerprint", "validated", "data.validation")):
        if before.get(name) not in (None, data[name]):
            raise UserError(
                f"--workdir={workdir} holds a run that was {done} on other data (fingerprint {before[name][:12]}, now "
                f"{data[name][:12]}): {field} has changed since, and its losses could not be compared. Give the data "
                "of before, or choose another workdir."
            )


def _is_marked(helper: Any) -> bool:
    """Whether what a manifest says of a helper has its fingerprint."""
    return isinstance(helper, dict) and isinstance(helper.get("fingerprint"), str)


def _check_free(run: checkpoint.Run) -> None:
    what = "a search" if (run.workdir / "search.json").exists() else None
    if reader.is_directory(run.workdir):
        what = "a Hugging Face Hub directory"
    if (run.workdir / "params").exists() and (run.workdir / "manifest").exists():
        what = "a checkpoint"
    if what:
        raise UserError(f"--workdir={run.workdir} is {what}, not a run's: choose another directory.")


def check_position(position: Mapping[str, Any], own: Mapping[str, Any], origin: str) -> None:
    """Raises a UserError where a checkpoint's data position is not `own`, the one of this config at its step."""
    changed = [
        f"{_POSITION.get(name, name)}: {position.get(name)} -> {own.get(name)}"
        for name in sorted({*position, *own})
        if position.get(name) != own.get(name)
    ]
    if changed:
        raise UserError(
            f"{origin} has another data position than this config at its step:{_lines(changed)}\nThe rows that follow "
            "would not be the ones that have not been seen. Set what has changed back, or start from its parameters "
            "alone with init.path."
        )


def _lines(items: list[str]) -> str:
    return "".join(f"\n  {item[:300]}" for item in items)


def what_begins_again(old: Mapping[str, Any], config: ConfigDict, step: int) -> list[str]:
    """What had ended before `step` and does not stay so when a run of config `old` goes on with another one.

    Fractions of a run are other steps of a longer one: help that had ended begins again, and the learning rate rises.
    """
    before = configs.base()
    tree = configs.of_manifest(old, "the manifest of the run that is gone on from")
    values = {configs.modern(name): value for name, value in configs.flatten(tree).items()}
    known = {name: value for name, value in values.items() if name in configs.flatten(before)}
    try:
        before.update_from_flattened_dict(known)
        ended = frozenset().union(*(s.helps for s in terms.spans(before.objective, before.steps) if s.end <= step))
        going = next((s.helps for s in terms.spans(before.objective, before.steps) if s.first < step <= s.end), ended)
        rate = float(schedules.learning_rate(before.optimizer, before.steps)(min(step, before.steps) - 1))
    except (TypeError, ValueError):  # it is of another age: a UserError, too
        return ["the config of the run that is gone on from cannot be compared with this one."]
    now = frozenset().union(*(s.helps for s in terms.spans(config.objective, config.steps) if s.end > step))
    remarks = [
        f"help by {name} had ended before step {step} of {before.steps}, and begins again: its stop is a fraction of "
        f"steps={config.steps} now. To leave it ended set its weight to 0, or its stop to at most "
        f"{step / config.steps:.4f}."
        for name in sorted((ended - going) & now)
    ]
    after = float(schedules.learning_rate(config.optimizer, config.steps)(step))
    if after > _RISE * rate and not config.optimizer.begin:
        remarks.append(
            f"the learning rate rises from {rate:.3g} to {after:.3g} at step {step}: its schedule is that of "
            f"steps={config.steps} now. Where that is not meant, start from the parameters with init.path."
        )
    return remarks
