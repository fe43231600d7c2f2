"""Stages: a run that goes on from another one with something changed, by the bits of its state and its numbers."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from lmboost import checkpoint
from lmboost.errors import UserError
from lmboost.report.curves import load_run
from tests import runs
from tests.compare import assert_same, lines, losses

QUIET = ("--noconfig.log.tensorboard", "--config.checkpoint.keep=9")


@pytest.fixture(scope="module")
def run(recipe, data):
    """Trains in a workdir with the flags given besides; returns the last state."""
    return lambda workdir, *flags: runs.run(recipe, workdir, data, *QUIET, *flags)


@pytest.fixture(scope="module")
def parent(home, run):
    """(workdir, last state) of a run of 8 steps that is saved every 2."""
    return home / "parent", run(home / "parent")


def stage(workdir, step: int, *flags: str) -> tuple[str, ...]:
    return f"--config.init.path={workdir}", "--config.init.kind=continue", f"--config.init.step={step}", *flags


def numbers(workdir) -> list[dict]:
    """The lines of metrics.jsonl without what a clock has measured."""
    timed = ("tokens_per_second", "mfu", "goodput")
    return [{name: x for name, x in line.items() if name not in timed} for line in lines(workdir)]


def helped(teacher) -> tuple[str, ...]:
    return (
        f"--config.teacher.path={teacher}", "--config.teacher.dtype=float32", "--config.objective.kd.weight=0.5",
        "--config.objective.kd.stop=auto", "--config.objective.align.weight=0.5",
        "--config.objective.align.map=projection", "--config.objective.align.stop=0.9",
    )  # fmt: skip


@pytest.mark.slow
def test_a_stage_with_nothing_changed_is_the_run_that_was_not_split(tmp_path, run, parent):
    assert_same(run(tmp_path / "second", *stage(parent[0], 4)), parent[1])
    assert numbers(tmp_path / "second") == numbers(parent[0])
    with_help = (*helped(parent[0]), "--config.optimizer.name=muon")
    whole = run(tmp_path / "whole", *with_help)
    assert_same(run(tmp_path / "third", *with_help, *stage(tmp_path / "whole", 4)), whole)
    assert numbers(tmp_path / "third") == numbers(tmp_path / "whole")


CHANGES = {
    "batch": ["--config.batch_size=16"],
    "row length": ["--config.seq_len=16"],
    "schedule": [
        "--config.optimizer.schedule=wsd", "--config.optimizer.decay_fraction=0.3", "--config.optimizer.begin=4",
        "--config.steps=10",
    ],
    "rotary base": ["--config.model.rope_theta=50000"],
    "data": ["--config.data.train=DATA=0.5,OTHER=0.5"],
    "help": [*helped("PARENT")],
    "depth": ["--config.model.num_layers=4", "--config.init.grow=identity"],
}  # fmt: skip


@pytest.fixture(scope="module")
def filled(home, parent, data):
    """Fills in the places of what the tests share."""
    known = data.partition("=")[2]
    other = runs.write_data(home, seed=1, tokenizer=f"{known}/tokenizer")
    names = {"DATA": known, "OTHER": other, "PARENT": str(parent[0])}

    def fill(flags):
        for name, value in names.items():
            flags = [flag.replace(name, value) for flag in flags]
        return flags

    return fill


@pytest.mark.parametrize("change", ["all", *(pytest.param(change, marks=pytest.mark.slow) for change in CHANGES)])
def test_a_stage_that_is_killed_goes_on_bit_for_bit(tmp_path, run, parent, filled, capsys, change):
    flags = filled(sum(CHANGES.values(), []) if change == "all" else CHANGES[change])
    state = run(tmp_path / "run", *stage(parent[0], 4, *flags))
    said = capsys.readouterr().out
    assert f"start: init.path {parent[0]}/checkpoints/4, step 4" in said
    entry = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"][0]
    assert entry["step"] == 4 and all(f"changed, {line}" in said for line in entry["changes"])
    assert {line.split(":")[0] for line in entry["changes"]} == {
        re.sub(r"^--config\.", "", flag).split("=")[0] for flag in flags if "init." not in flag
    }
    anew = change in ("row length", "data", "all")
    assert ("the data begins anew" in said) == anew and (entry["row"] == 0) == anew

    last = max(checkpoint.Run(tmp_path / "run").steps())
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(last))
    assert_same(run(tmp_path / "again", *stage(parent[0], 4, *flags)), state)
    assert numbers(tmp_path / "again") == numbers(tmp_path / "run")


def test_a_run_that_grows_with_the_help_of_what_it_was(tmp_path, run, parent, capsys):
    grown = ("--config.model.num_layers=4", "--config.init.grow=zero", "--config.eval.every=2")
    teacher = (*helped(parent[0]), "--config.teacher.step=4")
    run(tmp_path / "run", *teacher, *stage(parent[0], 4, *grown))
    assert (
        "init.path: layers 1,3 are new: copies of the parent's 0-1, and add nothing at first" in capsys.readouterr().out
    )
    before, after = losses(parent[0], "val_loss"), losses(tmp_path / "run", "val_loss")
    assert sum(line["step"] == 4 and "val_loss" in line for line in lines(tmp_path / "run")) == 2  # its own, too
    assert after[4] == pytest.approx(before[4], rel=1e-5) and after[8] < before[4]


@pytest.mark.slow
def test_tokens_flops_and_rows_count_on_through_a_chain(tmp_path, run, parent):
    run(tmp_path / "wide", *stage(parent[0], 4, "--config.batch_size=16", "--config.steps=6"))
    run(tmp_path / "long", *stage(tmp_path / "wide", -1, "--config.batch_size=16", "--config.seq_len=16"))
    chain = json.loads((tmp_path / "long" / "manifest.json").read_text())["stages"]
    assert [(one["step"], one["tokens"]) for one in chain] == [(4, 4 * 8 * 32), (6, 4 * 8 * 32 + 2 * 16 * 32)]
    tokens, flops = losses(tmp_path / "long", "tokens"), losses(tmp_path / "long", "flops")
    assert tokens[8] == chain[1]["tokens"] + 2 * 16 * 16
    before = losses(parent[0], "flops")
    assert flops[4] == before[4] and flops[6] == before[8] and flops[6] < flops[8] < before[8] * 1.3
    assert load_run(str(tmp_path / "long")).stages == (chain[0]["tokens"], chain[1]["tokens"])
    assert sorted(tokens) == list(range(1, 9)) and all(np.diff([tokens[step] for step in sorted(tokens)]) > 0)


@pytest.mark.slow
def test_a_stage_that_has_begun_does_not_need_its_parent(tmp_path, run, parent):
    shutil.copytree(parent[0], tmp_path / "parent")
    flags = stage(tmp_path / "parent", 4, "--config.batch_size=16")
    run(tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "parent")
    steps = checkpoint.Run(tmp_path / "run")
    shutil.rmtree(steps.at(8))
    run(tmp_path / "run", *flags)
    assert checkpoint.read_json(steps.at(8), "position")["first_row"] == 4 * 8 + 4 * 16
    shutil.rmtree(steps.checkpoints)
    with pytest.raises(UserError, match="with which this stage begins, is not there any more"):
        run(tmp_path / "run", *flags)


@pytest.mark.slow
def test_maps_and_the_lead_of_another_teacher_begin_anew(tmp_path, run, parent, capsys):
    run(tmp_path / "first", *helped(parent[0]))
    capsys.readouterr()
    run(tmp_path / "second", *helped(parent[0]), "--config.teacher.step=6", *stage(tmp_path / "first", 4))
    said = capsys.readouterr().out
    assert "init.path: params/align/1 is new" in said and "init.path: watch/total is new" in said
    assert not re.search("params/model.*is new", said)
    plain = run(tmp_path / "third", *stage(tmp_path / "first", 4))  # what is not needed any more is left
    assert set(plain.params) == {"model"} and plain.watch is None and jax.device_get(plain.step) == 8


WRONG = {
    "not a run": (["--config.init.path=BARE"], "has parameters alone, no optimizer"),
    "no path": (["--config.init.path="], "init.kind='continue', but init.path is empty"),
    "not finished": (
        ["--config.init.path=PART", "--config.init.step=-1"],
        "has not come to its end: its last checkpoint is of step 4 of 8. Let it finish, or set init.step=4",
    ),
    "optimizer": (["--config.optimizer.name=lion"], "has the moments of 'adamw': a stage goes on with the same"),
    "begin": (["--config.optimizer.begin=5"], "optimizer.begin=5, but .* stands at step 4: the schedule begins anew"),
    "begin alone": (["--config.optimizer.begin=2", "--config.init.kind=copy"], "begin=2 is for stages, which count on"),
    "steps": (["--config.steps=4"], "stands at step 4: a stage counts on from there"),
    "depth": (["--config.model.num_layers=4"], "set it to that, or init.grow to one of stack, interpose, zero"),
    "less": (["--config.model.num_layers=1", "--config.init.grow=zero"], "the parent has 2 layers; give more"),
    "multiple": (["--config.model.num_layers=3", "--config.init.grow=stack"], "is no multiple of the parent's 2"),
    "growth": (["--config.init.grow=zeros", "--config.model.num_layers=3"], "did you mean 'zero'|expected one of"),
    "growth alone": (["--config.init.grow=zero", "--config.init.kind=copy"], "needs init.kind='continue', not 'copy'"),
    "model": (["--config.model.mlp_dim=32"], "has shape .* give the config of the checkpoint's model"),
    "parts": (["--config.init.layers=0"], "need init.kind='inherit', 'stack' or 'expand', not 'continue'"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_told(tmp_path, run, parent, mistake):
    flags, message = WRONG[mistake]
    bare, part = tmp_path / "bare", tmp_path / "part"
    if mistake == "not a run":
        shutil.copytree(checkpoint.Run(parent[0]).at(4), bare)
        shutil.rmtree(bare / "training")
    if mistake == "not finished":
        shutil.copytree(parent[0], part)
        for step in (6, 8):
            shutil.rmtree(part / "checkpoints" / str(step))
    flags = [flag.replace("BARE", str(bare)).replace("PART", str(part)) for flag in flags]
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", *stage(parent[0], 4, *flags))
    assert not (tmp_path / "run" / "checkpoints").exists() or not checkpoint.Run(tmp_path / "run").steps()
