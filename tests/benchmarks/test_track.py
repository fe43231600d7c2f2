"""The track: its arms are what the trainer takes, a run of it is a run, and its table says no more than its lines."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from benchmarks.track import arms, copying, one, report, seconds
from benchmarks.track.__main__ import Runner, ordered
from benchmarks.track.setting import NANO, TIERS, decoder, recipe
from lmboost import checkpoint, plan
from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.search.space import Orders, Space
from lmboost.teacher import Helper
from tests import runs
from tests.compare import losses

TINY = dataclasses.replace(
    NANO, models={name: decoder(1, 8, 1, 8) for name in NANO.models}, evaluations=2, validation_batches=2,
    final_batches=2, batch_size=16,
)  # fmt: skip


@pytest.mark.parametrize("tier", TIERS)
def test_every_arm_is_a_plan(tier):
    tier = TIERS[tier]
    for name, arm in arms.ARMS.items():
        if not arm.fits(tier):
            continue
        c = recipe(tier, tier.models[arm.model], tier.steps_of(tier.models[arm.steps_of or arm.model], arm.length))
        c.update_from_flattened_dict(arm.changes)
        plan.check_numbers(c, 1)
        teacher, scorer = (
            Helper(None, tier.models[arms.ARMS[other].model]) if other else None for other in (arm.teacher, arm.scorer)
        )
        teacher = Helper(None, tier.student) if arm.hub else teacher
        made = plan.outline(c, ModelConfig(**c.model), teacher, scorer)
        assert bool(made.spans[0].helps) == bool(arm.teacher or arm.scorer or arm.hub), name
        if arm.search:
            c.search.update(tier.search)
            large = tier.models["large"]
            cuts = Space.from_config(c.search, large, Orders.natural(large))
            found = cuts.num_params(cuts.sample(np.random.default_rng(0)))
            assert found == pytest.approx(tier.student.num_params(), rel=0.05)
        assert bool(arm.parent) == (c.init.kind != "copy" or arm.search), name


def test_what_an_arm_needs_comes_first_and_once():
    found = ordered(["inherit", "auto", "plain", "salt"], [0, 1])
    assert len(found) == len(set(found)) == 12
    for arm, seed in found:
        for needed in arms.ARMS[arm].needs:
            assert found.index((needed, seed)) < found.index((arm, seed))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A place for runs of the track, with the same text for training and as both other texts."""
    out = tmp_path_factory.mktemp("track")
    (out / "data").mkdir()
    made = runs.write_data(out, tokenizer="train:320")
    for name in ("train", "bible", "javascript"):
        (out / "data" / name).symlink_to(made)
    return out


@pytest.mark.slow
def test_a_run_of_the_track(out):
    teacher = one.run(TINY, arms.ARMS["auto"].teacher, 3, out)
    line = one.run(TINY, "auto", 3, out)
    workdir = arms.workdir_of(out, "nano", "auto", 3)
    assert line["curve"] == [[s, x, f] for (s, x), f in zip(
        losses(workdir, "val_loss").items(), [line["curve"][0][2], line["flops"]], strict=True)]  # fmt: skip
    assert line["steps"] == TINY.steps_of(TINY.student) and line["config"]["objective.align.stop"] == "auto"
    assert line["teacher"] == teacher["arm"] and teacher["config"]["seed"] == 3 + one.HELPER_SEEDS
    assert line["flops"] > teacher["flops"] and line["final"] == pytest.approx(line["bible"])
    assert json.loads(json.dumps(line)) == line and abs(line["copying"]) < 1


@pytest.mark.slow
def test_a_run_of_the_track_by_answers_from_disk(out):
    one.run(TINY, arms.ARMS["disk-both"].teacher, 4, out)
    line = one.run(TINY, "disk-both", 4, out)
    assert line["answers"]["flops"] > 0 and 10 < line["answers"]["bytes"]
    assert line["flops"] == line["curve"][-1][2] == pytest.approx(one.run(TINY, "plain", 4, out)["flops"])
    assert "teacher.targets" not in line["config"]


@pytest.mark.slow
def test_a_searched_cut_is_where_a_run_starts(out):
    space = {
        "params": "0.0035M-0.0045M",
        "layers": "1",
        "d_model": "6-8:2",
        "mlp_dim": "4-8:2",
        "rows": 8,
        "candidates": 16,
    }
    tier = dataclasses.replace(TINY, search=space)
    for name in ("large", "search", "cut-short", "cut-shape-short"):
        directory = arms.workdir_of(out, "nano", name, 3)
        directory.mkdir(parents=True)
        directory.joinpath("log.txt").touch()  # as the runner does
        line = one.run(tier, name, 3, out)
        directory.joinpath("line").write_text(json.dumps(line))
    found = [
        json.loads(arms.workdir_of(out, "nano", n, 3).joinpath("line").read_text()) for n in ("search", "cut-short")
    ]
    winner = checkpoint.Saved.find(str(arms.workdir_of(out, "nano", "search", 3) / one.FOUND / "winner"))
    assert found[1]["parameters"] == line["parameters"] == winner.model.num_params() <= 4500
    assert (
        found[0]["flops"] > 0
        and found[0]["seed"] == 3
        and "curve" not in found[0]
        and found[0]["final"] < line["curve"][0][1]
    )


def test_a_step_is_timed_that_trains(monkeypatch):
    monkeypatch.setattr(seconds, "STEPS", 2)
    steps, cost = seconds.stepper(TINY, "auto")
    steps()
    assert cost > seconds.stepper(TINY, "plain")[1] > 0


def test_only_what_was_read_before_counts_as_read():
    """What follows in the second half has followed the same tokens before; of the first half nothing is known."""
    for again in (True, False):
        batch = copying.batch(TINY.student, 4, 16, again)
        known, weights = batch["tokens"][:, :-7] == batch["targets"][:, 7:], batch["weights"] > 0
        assert weights.sum() == 4 * 7 and known[weights[:, 7:]].all() and weights[:, 7:].any() == again
        assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:]).all()


@pytest.mark.slow
def test_a_shuffled_teacher_has_the_same_numbers_elsewhere(out):
    one.run(TINY, "teacher-fifth", 3, out)
    source = str(arms.workdir_of(out, "nano", "teacher-fifth", 3))
    path = one.shuffled(source, str(out / "shuffled"), 0)
    import jax

    from lmboost import sharding

    a, b = (checkpoint.Saved.find(p).load(sharding.make_mesh(), "float32") for p in (source, path))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.array_equal(np.sort(x, None), np.sort(y, None)) and (np.ptp(x) == 0 or not np.array_equal(x, y))


def test_a_line_of_an_arm_that_was_changed_is_refused(tmp_path):
    place = arms.workdir_of(tmp_path, "nano", "plain", 0)
    place.mkdir(parents=True)
    line = {"final": 1.0, "seconds": 1.0, "asked": arms.asked("plain")}
    (place / arms.LINE).write_text(json.dumps(line))
    Runner("nano", tmp_path, [0])([("plain", 0)])
    assert json.loads((tmp_path / "nano.jsonl").read_text()) == line
    (place / arms.LINE).write_text(json.dumps(line | {"asked": arms.asked("adamw")}))
    with pytest.raises(UserError, match="holds a run of plain as it was before arms.py was changed: remove it"):
        Runner("nano", tmp_path, [0])([("plain", 0)])


def lines_of(**finals):
    """Lines of arms whose curves fall from 4 to their ends in four evaluations."""
    return [
        {
            "arm": arm, "seed": seed, "data": {}, "steps": 4, "flops": 8.0, "final": end, "bible": end,
            "javascript": end, "curve": [[i + 1, 4 - (4 - end) * (i + 1) / 4, 2.0 * (i + 1)] for i in range(4)],
        }
        for arm, ends in finals.items() for seed, end in enumerate(ends)
    ]  # fmt: skip


def write(path: pathlib.Path, lines) -> pathlib.Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_table_calls_nothing_better_that_is_noise(tmp_path):
    lines = lines_of(plain=[2.0, 2.1, 2.2], salt=[1.0, 1.13, 1.2], let=[2.0, 2.08], both=[2.3], auto=[1.98])
    rows = {row.arm: row for row in report.compare(report.read(write(tmp_path / "nano.jsonl", lines)))}
    assert rows["plain"].steps == rows["plain"].flops == 1 and rows["plain"].p is None
    assert rows["salt"].p < 0.01 and rows["salt"].differences == pytest.approx([-1, -0.97, -1])
    # Its mean curve falls from 4 to 1.11, and plain's end is 2.1.
    assert rows["salt"].steps == pytest.approx((4 - 2.1) / (4 - 1.11), rel=1e-6)
    assert rows["let"].p > 0.05 and rows["let"].steps is None and rows["both"].steps is None
    assert rows["auto"].p == pytest.approx(2 * 0.1241, rel=0.01), "0.02 are 1.155 times the spread of salt's pairs"
    assert rows["auto"].steps is None
    report.main([str(tmp_path / "nano.jsonl")], str(tmp_path), "")
    assert "| salt | 3 | 1.1100 | -0.9900 | 0.0173 |" in (tmp_path / "nano.md").read_text()
    assert (tmp_path / "nano.png").stat().st_size > 10_000


def test_lines_of_several_data_sets_are_not_compared(tmp_path):
    lines = lines_of(plain=[2.0, 2.1])
    lines[0]["data"] = {"train": "another"}
    with pytest.raises(UserError, match="lines of 2 data sets"):
        report.read(write(tmp_path / "nano.jsonl", lines))


def test_runs_made_again_are_compared_with_those_that_were(tmp_path, capsys):
    there = lines_of(plain=[2.0, 2.1, 2.2], salt=[1.0, 1.13, 1.2])
    here = lines_of(plain=[2.0], salt=[1.04], let=[1.0])
    paths = [str(write(tmp_path / name, lines)) for name, lines in (("nano.jsonl", here), ("there.jsonl", there))]
    report.main(paths[:1], str(tmp_path), paths[1])
    printed = capsys.readouterr().out
    assert "| salt | 0 | 1.0400 | 1.0000 | +0.0400 |" in printed and "1 of 2 within 0.035" in printed
    with pytest.raises(UserError, match="one file, and 2 are given"):
        report.main(paths, str(tmp_path), paths[1])
    with pytest.raises(UserError, match="no arm and seed in common"):
        report.agreement(report.read(pathlib.Path(paths[0])), {"plain": [{**here[0], "seed": 7}]})
    with pytest.raises(UserError, match="different data"):
        report.agreement({"plain": [{**here[0], "data": {"train": "another"}}]}, {"plain": here[:1]})
