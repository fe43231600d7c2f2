"""What a config asks for, checked: what can be wrong is found here, before anything is compiled or written."""

import dataclasses
import functools
import json
import os
import sys
from typing import Any

import jax
from ml_collections import ConfigDict

from lmboost import checkpoint, flops, schedules, sharding, start
from lmboost import config as configs
from lmboost import teacher as helpers
from lmboost.checkpoint import PACKAGES, versions
from lmboost.data import loader
from lmboost.data.rows import Rows, parse_ranges
from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.objective import align, select
from lmboost.objective.kd import Distillation
from lmboost.train_step import Objective


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, ready to be built."""

    config: ConfigDict
    student: ModelConfig
    objective: Objective
    phases: list[tuple[int, frozenset[str]]]  # (first step, active helps)
    rows: Rows
    train_data: loader.DataInfo
    validation_data: loader.DataInfo
    teacher: helpers.Helper | None
    scorer: helpers.Helper | None
    manifest: dict[str, Any]

    def helps(self, step: int) -> frozenset[str]:
        """Which helps are active in a step."""
        return schedules.active_helps(self.phases, step)

    def spans(self) -> list[tuple[int, int, frozenset[str]]]:
        """(first step, step after the last, active helps) of each phase."""
        return spans(self.phases, self.config.steps)

    def flops(self, step: int) -> float:
        """Model FLOPs of the first `step` steps, helpers included."""
        c, total = self.config, 0.0
        for first, end, helps in self.spans():
            layers = [t for _, t in self.objective.align.pairs] if "align" in helps else [None]
            one = flops.step_flops(
                self.student, c.batch_size, c.seq_len,
                teacher=self.teacher.model if self.teacher else None, kd="kd" in helps, align_layer=max(layers),
                scorer=self.scorer.model if "select" in helps else None, candidates=self.objective.select.candidates,
            )  # fmt: skip
            total += one * max(min(step, end) - first, 0)
        return total

    def position(self, step: int) -> dict[str, Any]:
        """Where the data stands before `step`; equal positions give equal batches from there on.

        What data.skip leaves out from there on is no part of it: a checkpoint is gone on from with other rows ahead.
        """
        return {
            "step": step,
            "first_row": self.rows.stand(step),
            "seq_len": self.config.seq_len,
            "seed": self.config.seed,
            "fingerprint": self.train_data.fingerprint,
        }

    def check_position(self, position: dict[str, Any], origin: str) -> None:
        """Raises a UserError where the run, going on from a checkpoint at `position`, would read other rows.

        `origin` says which checkpoint that is.
        """
        step, skip = position["step"], self.config.data.skip
        if position == self.position(step):
            return
        missed = self.rows.missed_jump(step, position["first_row"])
        if missed is not None and position == self.position(step) | {"first_row": position["first_row"]}:
            first, last = parse_ranges(skip, self.config.steps)[missed]
            at = self.rows.jumps[missed][0]
            raise UserError(
                f"data.skip={skip!r}: what is left out for {first}-{last} begins at step {at + 1}, but the run goes on "
                f"from step {step} ({origin}): rows of it have been read already. Choose a resume.step of at most "
                f"{at}, or leave {first}-{last} out of data.skip."
            )
        raise UserError(
            f"{origin} stands at data position {position}, but this config is at {self.position(step)} there: "
            "the rows that follow would not be the ones that have not been seen."
        )


def make(config: ConfigDict, workdir: str, platform: str, num_devices: int) -> Plan:
    """Checks the config against data, helpers, workdir and machine. Raises a UserError on the first misfit."""
    check_numbers(config, num_devices)
    student = ModelConfig(**config.model).fit(config.seq_len, platform)
    train_data, validation_data = _data(config, student)
    _check_tasks(config)
    _check_init(config)
    phases = schedules.help_phases(config.objective, config.steps)
    active = frozenset().union(*(helps for _, helps in phases))
    teacher = scorer = None
    if active:
        find = functools.partial(
            helpers.find, helps=active, data=train_data, seq_len=config.seq_len, dtype=config.teacher.dtype,
            platform=platform,
        )  # fmt: skip
        needs_teacher = active & {"kd", "align"} or not config.objective.select.scorer
        if needs_teacher:
            teacher = find("teacher.path", config.teacher.path, config.teacher.step)
        scorer = teacher
        if "select" in active and config.objective.select.scorer:
            tree = config.objective.select
            scorer = find("objective.select.scorer", tree.scorer, tree.scorer_step)
    objective = make_objective(config, student, teacher.model if teacher else None, active)
    selecting = tuple((first, end) for first, end, helps in spans(phases, config.steps) if "select" in helps)
    rows = Rows(config.batch_size, objective.select.candidates, selecting)
    rows = rows.without(parse_ranges(config.data.skip, config.steps), config.steps)
    manifest = _manifest(config, student, train_data, validation_data, teacher, scorer)
    _check_workdir(config, workdir)
    return Plan(config, student, objective, phases, rows, train_data, validation_data, teacher, scorer, manifest)


def spans(phases: list[tuple[int, frozenset[str]]], steps: int) -> list[tuple[int, int, frozenset[str]]]:
    """(first step, step after the last, active helps) of each phase of a run."""
    ends = [first for first, _ in phases[1:]] + [steps]
    return [(first, end, helps) for (first, helps), end in zip(phases, ends, strict=True)]


def make_objective(
    config: ConfigDict, student: ModelConfig, teacher: ModelConfig | None, active: frozenset[str]
) -> Objective:
    """The objective subtree as plain values."""
    tree, steps = config.objective, config.steps
    names = ("temperature", "temperature_on", "divergence", "top_k", "top_p", "tail")
    kd = Distillation(**{n: tree.kd[n] for n in names}).validate()
    if "kd" in active and kd.divergence == "reverse" and teacher.vocab_size < student.vocab_size:
        raise UserError(
            f"objective.kd.divergence='reverse' needs a teacher with the student's vocabulary: the teacher has "
            f"{teacher.vocab_size} rows, model.vocab_size={student.vocab_size}."
        )
    alignment = None
    if "align" in active:
        pairs = align.parse_pairs(tree.align.pairs, student.num_layers, teacher.num_layers)
        names = ("scale", "map", "centre", "final_norm")
        alignment = align.Alignment(pairs, **{n: tree.align[n] for n in names}).validate()
    candidates, fraction = tree.select.candidates, tree.select.fraction
    selection = select.Selection(
        candidates, 1 / max(candidates, 1) if fraction == -1 else fraction, tree.select.k, tree.select.others
    ).validate()
    return Objective(
        kd=kd,
        align=alignment,
        select=selection,
        kd_weight=schedules.kd_weight(tree.kd, steps),
        align_weight=schedules.align_weight(tree.align, steps),
        ce_weight=tree.kd.ce_weight,
        z_loss=tree.z_loss,
        block_tokens=tree.block_tokens,
    )


def check_numbers(config: ConfigDict, num_devices: int) -> None:
    """Raises a UserError on the first number of the config that cannot be, on so many devices."""
    for field in ("steps", "batch_size", "seq_len", "accumulation", "log.every", "checkpoint.every", "checkpoint.keep"):
        if (value := configs.flatten(config)[field]) < 1:
            raise UserError(f"{field}={value} must be at least 1.")
    for field in ("checkpoint.seconds", "checkpoint.keep_every", "checkpoint.retry_seconds", "watchdog.seconds"):
        if (value := configs.flatten(config)[field]) < 0:
            raise UserError(f"{field}={value} must be at least 0.")
    if config.eval.batches < 1 and config.eval.batches != -1:
        raise UserError(f"eval.batches={config.eval.batches} must be at least 1, or -1 for the whole split.")
    sizes = sharding.mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, num_devices)
    shards = sizes[0] * sizes[1]
    if config.batch_size % (shards * config.accumulation):
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of mesh.data * mesh.fsdp * accumulation = "
            f"{sizes[0]} * {sizes[1]} * {config.accumulation}: every device takes equally many rows of each part."
        )


def _data(config: ConfigDict, student: ModelConfig) -> tuple[loader.DataInfo, loader.DataInfo]:
    if not config.data.train:
        raise UserError("data.train is empty: give a directory that lmboost.prepare wrote.")
    train_data = loader.info(config.data.train, "train")
    validation_data = loader.info(config.data.validation or config.data.train, "validation")
    if validation_data.tokenizer_fingerprint != train_data.tokenizer_fingerprint:
        raise UserError(
            f"data.validation={config.data.validation!r} was prepared with another tokenizer than "
            f"data.train={config.data.train!r}: prepare both with one."
        )
    if train_data.vocab_size > student.vocab_size:
        raise UserError(
            f"data.train={config.data.train!r} was prepared with a tokenizer of {train_data.vocab_size} pieces, but "
            f"model.vocab_size={student.vocab_size}: prepare the data with the model's tokenizer, or set the size."
        )
    return train_data, validation_data


def _check_init(config: ConfigDict) -> None:
    if config.resume.step != -1 and not config.resume.path:
        raise UserError(f"resume.step={config.resume.step}, but resume.path is empty: give the run that it is about.")
    start.check(config.init.path, config.init.kind, config.init.layers, config.init.fresh)


def _check_tasks(config: ConfigDict) -> None:
    if config.eval.tasks_every < 0:
        raise UserError(f"eval.tasks_every={config.eval.tasks_every} must be at least 0; 0 is only at the end.")
    if config.eval.tasks:
        from lmboost import harness  # needs a package that is not always there

        harness.find_tasks(harness.names_of(config.eval.tasks), config.eval.tasks_include, "eval.tasks")
    elif config.eval.tasks_every:
        raise UserError(
            f"eval.tasks_every={config.eval.tasks_every}, but eval.tasks is empty: name tasks, or set it to 0."
        )


def _check_workdir(config: ConfigDict, workdir: str) -> None:
    if not (manifest := checkpoint.Run(workdir).manifest()):
        return
    if changed := configs.differences(ConfigDict(manifest["config"]), ConfigDict(json.loads(config.to_json()))):
        raise UserError(
            f"--workdir={workdir} holds a run of another config ({'; '.join(changed[:5])}"
            f"{'; ...' if len(changed) > 5 else ''}): choose another workdir, or give its config."
        )


def _manifest(config, student, train_data, validation_data, teacher, scorer) -> dict[str, Any]:
    def helper(h: helpers.Helper | None):
        return h and {
            "directory": str(h.saved.directory), "model": dataclasses.asdict(h.model), "data": h.saved.manifest["data"]
        }  # fmt: skip

    return {
        "config": json.loads(config.to_json()),
        "model": dataclasses.asdict(dataclasses.replace(student, attention=config.model.attention)),
        "data": {
            "train": train_data.fingerprint,
            "fingerprint": validation_data.fingerprint,
            "tokenizer": train_data.tokenizer_fingerprint,
        },
        "teacher": helper(teacher),
        "scorer": helper(scorer),
        "versions": {"python": sys.version.split()[0]} | versions(PACKAGES),
        "command": [os.path.basename(sys.executable), *sys.argv],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
