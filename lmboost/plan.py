"""What a config asks for, checked: what can be wrong is found here, before anything is compiled or written."""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from lmboost import answers, checkpoint, flops, going_on, sharding, stages, start
from lmboost import config as configs
from lmboost.data import loader
from lmboost.data.retokenize import Retokenizer
from lmboost.data.rows import Rows, parse_ranges
from lmboost.data.scored import Scored
from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.objective import auto, terms
from lmboost.objective.terms import Objective, make_objective
from lmboost.run import commit
from lmboost.run.processes import say
from lmboost.run.trackers import table as trackers
from lmboost.stages import Stage
from lmboost.teacher import Helper, quantized
from lmboost.teacher import find as find_helper
from lmboost.train_step import Program, init_params


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, ready to be built: plain values, checked. What has a default is not there in an `outline`.

    Attributes:
      stops: the first step without each help; the end of the run where help ends by itself and has not yet.
      rows: which rows of the data a step reads.
      seed: of the parameters, and of the order of the data where a stage has none of its own.
      skip: steps whose rows are left out, as they were given.
      scored: what the helpers have said of the rows before the run; then they are not needed, only what they are.
      stage: where the run begins, if it goes on from another one.
    """

    student: ModelConfig
    objective: Objective
    stops: Mapping[str, int]
    rows: Rows
    steps: int
    batch_size: int
    seq_len: int
    accumulation: int
    seed: int
    skip: str
    teacher: Helper | None
    scorer: Helper | None
    train_data: loader.DataInfo | None = None
    validation_data: loader.DataInfo | None = None
    manifest: dict[str, Any] | None = None
    scored: Scored | None = None
    stage: Stage | None = None

    @functools.cached_property
    def spans(self) -> tuple[terms.Span, ...]:
        """The steps with the same helps, from the first to the last."""
        return terms.cut(self.stops, self.steps)

    def ended(self, step: int) -> "Plan":
        """The same where the help that ends by itself has no weight from `step` on.

        That step is taken with the teacher still: what it says is known to the host one step late.
        """
        rule = self.objective.auto
        if step == auto.NEVER or not rule:
            return self
        ends = {name: min(step + 1, stop) for name, stop in self.stops.items() if name in rule.helps}
        return dataclasses.replace(self, stops={**self.stops, **ends})

    def span(self, step: int) -> terms.Span:
        """The one that a step lies in."""
        return next(span for span in self.spans if step < span.end)

    def needed(self, step: int) -> frozenset[str]:
        """Which helpers' parameters are needed in this step or a later one; "targets" are those of known answers."""
        needed = terms.needed(frozenset().union(*(span.helps for span in self.spans if span.end > step)))
        return frozenset({"targets"} if needed else ()) if self.scored else needed

    def groups(self, step: int) -> tuple[str, ...]:
        """Which groups of known answers the step reads."""
        return terms.groups(self.objective, self.span(step).helps) if self.scored else ()

    def program(self, helps: frozenset[str]) -> Program:
        """What the step of a span is compiled for."""
        models = {name: helper.model if helper else None for name, helper in self.helpers().items()}
        known = self.scored and self.scored.parts
        rows = {f"{name}_rows": self._rows_of(name) for name in models}
        return Program(
            self.student, self.objective, helps, accumulation=self.accumulation, known=known, **models, **rows
        )

    def _rows_of(self, name: str) -> str:
        """Whose rows of a batch a helper reads: "" the student's own, or those of a retokenizer of this name."""
        helper = self.helpers()[name]
        return helper.retokenizer.name if helper and helper.retokenizer else ""

    def retokenizers(self, step: int) -> tuple[Retokenizer, ...]:
        """What makes the rows of other tokenizers that the step reads, no more of them than it asks for."""
        helps, found = self.span(step).helps, {}
        watches = self.program(helps).watches
        of_teacher = {"index": "align" in helps, "chunks": "kd" in helps or watches}
        asks = {"teacher": {name for name, there in of_teacher.items() if there}, "scorer": {"bytes"}}
        for name in sorted(terms.needed(helps)):
            if retokenizer := self.helpers()[name].retokenizer:
                before = found.get(retokenizer.name, dataclasses.replace(retokenizer, asks=frozenset()))
                found[retokenizer.name] = dataclasses.replace(before, asks=before.asks | asks[name])
        return tuple(found.values())

    def helpers(self) -> dict[str, Helper | None]:
        return {"teacher": self.teacher, "scorer": self.scorer}

    def init_params(self) -> Any:
        """The random parameters that a run begins with, see `train_step.init_params`."""
        return init_params(self.student, self.objective, self.seed, self.teacher.model if self.teacher else None)

    @property
    def order(self) -> int:
        """The seed of the data's order."""
        return self.stage.order if self.stage else self.seed

    def tokens(self, step: int) -> float:
        """Of the first `step` steps, those before this stage included."""
        begin, before = (self.stage.step, self.stage.tokens) if self.stage else (0, 0)
        return before + (step - begin) * self.batch_size * self.seq_len

    def flops(self, step: int) -> float:
        """Model FLOPs of the first `step` steps, helpers included, but for what they have said before."""
        models = {name: helper and helper.model for name, helper in self.helpers().items()}
        begin, total = (self.stage.step, self.stage.flops) if self.stage else (0, 0.0)
        for first, end, helps in self.spans:
            forwards = [] if self.scored else terms.forwards(self.objective, helps, models, self._own_lengths())
            if "kd" in helps and self._rows_of("teacher"):  # by chunks: the student's losses on labels once more
                forwards.append(flops.Forward(self.student, layers=0))
            one = flops.step_flops(self.student, self.batch_size, self.seq_len, forwards)
            total += one * max(min(step, end) - max(first, begin), 0)
        return total

    def _own_lengths(self) -> dict[str, int]:
        """Tokens of the rows of helpers that have rows of their own."""
        return {n: h.retokenizer.seq_len for n, h in self.helpers().items() if h and h.retokenizer}

    def position(self, step: int) -> dict[str, Any]:
        """Where the data stands before `step`; equal positions give equal batches from there on.

        What data.skip leaves out from there on is no part of it: a checkpoint is gone on from with other rows ahead.
        """
        return {
            "step": step,
            "first_row": self.rows.stand(step),
            "seq_len": self.seq_len,
            "seed": self.order,
            "fingerprint": self.train_data.fingerprint,
        }

    def check_position(self, position: dict[str, Any], origin: str) -> None:
        """Raises a UserError where the run, going on from a checkpoint at `position`, would read other rows.

        `origin` says which checkpoint that is.
        """
        step = position["step"]
        if position == self.position(step):
            return
        missed = self.rows.missed_jump(step, position["first_row"])
        if missed is not None and position == self.position(step) | {"first_row": position["first_row"]}:
            first, last = parse_ranges(self.skip, self.steps)[missed]
            at = self.rows.jumps[missed][0]
            raise UserError(
                f"data.skip={self.skip!r}: what is left out for {first}-{last} begins at step {at + 1}, but the run "
                f"goes on from step {step} ({origin}): rows of it have been read already. Choose a resume.step of at "
                f"most {at}, or leave {first}-{last} out of data.skip."
            )
        going_on.check_position(position, self.position(step), origin)


def make(config: ConfigDict, workdir: str, platform: str, num_devices: int) -> Plan:
    """Checks the config against data, helpers, workdir and machine. Raises a UserError on the first misfit.

    workdir: empty where nothing is written to one.
    """
    check_numbers(config, num_devices)
    student = ModelConfig(**config.model).fit(config.seq_len, platform)
    if student.quantize != "none":
        raise UserError(
            f"model.quantize={student.quantize!r}: what is trained needs gradients, which products of 8 bits have not; "
            "set it to 'none' (teacher.quantize is for helpers)."
        )
    train_data, validation_data = _data(config, student)
    _check_tasks(config)
    if workdir:
        trackers.check(trackers.names_of(config.log.trackers, config.log.tensorboard))
    _check_init(config)
    scored = Scored.find(config.teacher.targets) if config.teacher.targets else None
    teacher, scorer = answers.helpers(scored, config) if scored else _helpers(config, train_data, platform)
    entries = _stages(config, workdir, student, train_data, validation_data)
    run = outline(config, student, teacher, scorer, stages.of_entry(entries[-1]) if entries else None)
    if run.stops["kd"] and teacher and teacher.retokenizer and run.objective.kd.temperature == 1:
        say(
            "kd: compares likelihoods of chunks of text, which at objective.kd.temperature=1 are near 0 on both sides "
            "where chunks are long or models young; ALM (arXiv 2503.20083) takes 100, with temperature_on=both"
        )
    if scored:
        stops = answers.check(
            scored, train_data, run.seq_len, run.order, student, teacher, run.objective, run.stops, run.rows.stand
        )
        run = dataclasses.replace(run, stops=stops)
    manifest = _manifest(config, student, train_data, validation_data, teacher, scorer, scored)
    manifest |= {"stages": entries} if entries else {}
    if workdir:
        going_on.check_workdir(config, workdir, manifest["data"])
    data = {"train_data": train_data, "validation_data": validation_data}
    return dataclasses.replace(run, **data, manifest=manifest, scored=scored)


def _stages(
    config: ConfigDict, workdir: str, student: ModelConfig, train: loader.DataInfo, validation: loader.DataInfo
) -> list[dict[str, Any]]:
    """The chain of stages that the run ends, as the manifest has it; that of the workdir's run where it has begun."""
    if config.init.kind != "continue":
        return []
    begun = (checkpoint.Run(workdir).manifest() or {}) if workdir else {}
    if begun.get("stages"):
        return begun["stages"]
    stage, before = stages.find(config, student, train, validation)
    return [*before, stages.entry(stage)]


def outline(
    config: ConfigDict, student: ModelConfig, teacher: Helper | None, scorer: Helper | None, stage: Stage | None = None
) -> Plan:
    """The plan of a run as far as its compiled programs depend on it: without data, manifest and workdir."""
    stops = terms.stops(config.objective, config.steps)
    by_chunks = bool(teacher and teacher.retokenizer)
    objective = make_objective(config.objective, config.steps, student, teacher and teacher.model, by_chunks)
    selecting = ((0, stops["select"]),) if stops["select"] else ()
    begin = (stage.step, stage.row) if stage else (0, 0)
    rows = Rows(config.batch_size, objective.select.candidates, selecting, begin=begin)
    names = ("steps", "batch_size", "seq_len", "accumulation", "seed")
    return Plan(
        student, objective, stops, rows.without(parse_ranges(config.data.skip, config.steps), config.steps),
        **{name: config[name] for name in names}, skip=config.data.skip, teacher=teacher, scorer=scorer, stage=stage,
    )  # fmt: skip


def _helpers(config: ConfigDict, data: loader.DataInfo, platform: str) -> tuple[Helper | None, Helper | None]:
    """(teacher, scorer), as far as the helps of the objective need them; the scorer is the teacher if none is named."""
    active = frozenset().union(*(span.helps for span in terms.spans(config.objective, config.steps)))
    needed, select = terms.needed(active), config.objective.select
    find = functools.partial(
        find_helper,
        helps=active,
        data=data,
        seq_len=config.seq_len,
        dtype=config.teacher.dtype,
        quantize=quantized(config),
        platform=platform,
    )
    teacher = scorer = None
    if "scorer" in needed and select.scorer:
        named = ("objective.select.scorer", select.scorer, select.scorer_step)
        scorer = find(*named, name="scorer", own_seq_len=0)
    if "teacher" in needed or ("scorer" in needed and not scorer):
        named = ("teacher.path", config.teacher.path, config.teacher.step)
        teacher = find(*named, name="teacher", own_seq_len=config.teacher.seq_len)
    scorer = scorer or (teacher if "scorer" in needed else None)
    return (teacher if "teacher" in needed else None), scorer


def check_numbers(config: ConfigDict, num_devices: int) -> None:
    """Raises a UserError on the first number of the config that cannot be, on so many devices."""
    for field in (
        "steps", "batch_size", "seq_len", "accumulation", "log.every", "log.profile_steps", "checkpoint.every",
        "checkpoint.keep", "max_nonfinite",
    ):  # fmt: skip
        if (value := configs.flatten(config)[field]) < 1:
            raise UserError(f"{field}={value} must be at least 1.")
    for field in (
        "checkpoint.seconds", "checkpoint.keep_every", "checkpoint.keep_best", "checkpoint.retry_seconds",
        "watchdog.seconds", "eval.every", "data.workers", "objective.block_tokens", "seed", "teacher.seq_len",
    ):  # fmt: skip
        if not (value := configs.flatten(config)[field]) >= 0:  # a NaN, too
            raise UserError(f"{field}={value} must be at least 0.")
    both = config.eval.every and math.lcm(config.checkpoint.every, config.eval.every)
    if config.checkpoint.keep_best and not 0 < both < config.steps and not config.checkpoint.seconds:
        raise UserError(
            f"checkpoint.keep_best={config.checkpoint.keep_best}: no step before the last is both saved and evaluated "
            f"(checkpoint.every={config.checkpoint.every}, eval.every={config.eval.every}): make one a multiple of the "
            "other."
        )
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
    if config.optimizer.begin and config.init.kind != "continue":
        raise UserError(
            f"optimizer.begin={config.optimizer.begin} is for stages, which count on from another run's step "
            f"(init.kind='continue', here {config.init.kind!r}): leave it 0, where a run begins so does its schedule."
        )
    start.check(**{name: config.init[name] for name in ("path", "kind", "layers", "fresh")}, growth=config.init.grow)


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


def _manifest(config, student, train_data, validation_data, teacher, scorer, scored) -> dict[str, Any]:
    def helper(h: Helper | None):
        if not h or not h.saved:
            return None
        directory, model, rows = str(h.saved.directory), dataclasses.asdict(h.model), h.retokenizer
        about = {"directory": directory, "model": model, "data": h.saved.manifest["data"]}
        if rows:
            about["rows"] = {"tokenizer": h.saved.tokenizer_fingerprint, "seq_len": rows.seq_len, "aligned_by": "bytes"}
        return about

    return {
        "config": json.loads(config.to_json()),
        "model": dataclasses.asdict(dataclasses.replace(student, attention=config.model.attention)),
        "data": {
            "train": train_data.fingerprint,
            "fingerprint": validation_data.fingerprint,
            "tokenizer": train_data.tokenizer_fingerprint,
        },
        "teacher": scored.manifest["teacher"] if scored else helper(teacher),
        "scorer": scored.manifest["scorer"] if scored else helper(scorer),
        "targets": scored
        and {"directory": str(scored.directory), **{name: scored.manifest[name] for name in ("fingerprint", "flops")}},
        "commit": commit.of_checkout(),
        "versions": {"python": sys.version.split()[0]} | checkpoint.versions(),
        "command": [os.path.basename(sys.executable), *sys.argv],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
