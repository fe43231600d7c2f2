"""Reports: crossings are where the curves cross, costs add up, and runs that cannot be compared are refused."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost import places
from lmboost.errors import UserError
from lmboost.report import __main__ as report
from lmboost.report import curves, plot
from lmboost.run import goodput


def save(directory, losses, every=100, flops_per_token=10.0, fingerprint=None, extra=()):
    """A run of 10 tokens per step, with an evaluation every `every` steps."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "metrics.jsonl", "w") as file:
        for i, loss in enumerate(losses, 1):
            step = every * i
            flops = None if flops_per_token is None else flops_per_token * 10 * step
            # The numbers of training and of the evaluation may come on two lines.
            file.write(json.dumps({"step": step - 1, "tokens": 10 * (step - 1), "loss": 1.0, "val_loss": None}) + "\n")
            file.write(json.dumps({"step": step, "tokens": 10 * step, "flops": flops, "loss": 1.0}) + "\n")
            file.write(json.dumps({"step": step, "val_loss": loss, "val_perplexity": float(np.exp(loss))}) + "\n")
        file.writelines(extra)
    if fingerprint:
        manifest = {"config": {}, "data": {"fingerprint": fingerprint, "tokenizer": "t"}}
        (directory / "manifest.json").write_text(json.dumps(manifest))
    return str(directory)


def run_main(tmp_path, *flags):
    report.main(**vars(report.flags().parse_args([*flags, f"--out={tmp_path / 'out'}"])))
    return json.loads((tmp_path / "out" / "report.json").read_text())


def a_run(losses, tokens=None, name="run"):
    losses = np.asarray(losses, float)
    tokens = np.arange(1.0, len(losses) + 1) * 1000 if tokens is None else np.asarray(tokens, float)
    return curves.Run(
        name, tokens, losses, 10 * tokens, tokens / 50, tokens / 10, {"val_loss": float(losses[-1])}, float(tokens[-1])
    )


class Tags(HTMLParser):
    """The tags of a page; asserts that each is closed, and that the page fetches and runs nothing."""

    VOID = ("meta", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "img", "link", "iframe", "object")
        for name, value in attributes:
            assert name not in ("src", "href") and not name.startswith("on")
            assert name not in ("d", "style") or not re.search("nan|inf", value), value
        self.seen.append(tag)
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def assert_the_page_is_whole(path):
    page = Tags(path.read_text())
    assert page.seen.count("svg") >= 4 and page.seen.count("table") >= 2
    return page


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1, 10), min_size=2, max_size=20), st.floats(1, 10))
def test_a_crossing_is_the_first_point_of_the_curve_at_the_target(losses, target):
    run = a_run(losses)
    found = curves.crossing(run, target)
    if found is None:
        assert min(losses) > target
        return
    assert found.first == (losses[0] <= target)
    if not found.first:
        assert curves.loss_at(run, found.tokens) == pytest.approx(target, abs=1e-6)
        assert found.flops == pytest.approx(10 * found.tokens), "FLOPs are taken at the same place"
        assert found.seconds == pytest.approx(found.tokens / 50)
    earlier = run.val_loss[run.tokens < found.tokens - 1e-6]
    assert (earlier > target).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0.01, 3))
def test_labels_keep_their_order_and_do_not_touch(heights, gap):
    heights = sorted(heights)
    placed = np.array(plot.spread(heights, gap))
    assert (np.diff(placed) >= gap - 1e-9).all()
    if (np.diff(heights) >= gap).all():
        np.testing.assert_allclose(placed, heights)


def test_the_report_of_a_faster_and_a_slower_run(tmp_path, capsys):
    baseline = save(tmp_path / "plain", [5.0, 4.0, 3.5, 3.0], fingerprint="a")
    fast = save(tmp_path / "fast", [4.0, 3.2, 2.8, 2.5], flops_per_token=12.0, fingerprint="a")
    slow = save(tmp_path / "slow", [5.5, 4.5, 4.0, 3.6], fingerprint="a")
    helper = save(tmp_path / "helper", [6.0, 5.0], flops_per_token=1.0, fingerprint="other")
    out = run_main(tmp_path, f"--baseline={baseline}", f"--run={fast}", f"--run={slow}", f"--helper={helper}")
    assert out["target_loss"] == 3.0 and out["helper_flops"] == 2000.0
    row = out["runs"][0]
    assert row["tokens_to_target"] == pytest.approx(2500.0) and row["tokens_fraction"] == pytest.approx(0.625)
    assert row["flops_to_target"] == pytest.approx(30000.0) and row["flops_fraction"] == pytest.approx(0.75)
    assert row["flops_with_helper"] == pytest.approx(32000.0)
    assert row["flops_with_helper_fraction"] == pytest.approx(0.8)
    assert row["loss_at"] == {"0.1": None, "0.25": 4.0, "0.5": 3.2, "0.75": 2.8, "1": 2.5}
    assert row["final"]["val_perplexity"] == pytest.approx(np.exp(2.5)) and row["final"]["val_bits_per_byte"] is None
    assert out["baseline"]["tokens_fraction"] == 1.0 and out["baseline"]["flops_with_helper"] is None
    never = out["runs"][1]
    assert not never["reached"] and never["tokens_to_target"] is None and never["flops_with_helper"] is None
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| fast | 2.5k | 0.62 | 3e+04 | 0.75 | - | - |" in text and "| fast | 3.2e+04 | 0.80 | - | - |" in text
    assert "| slow | - | - | - | - | - | - |" in text and "![Validation loss against tokens](report.png)" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert_the_page_is_whole(tmp_path / "out" / "report.html")
    shown = capsys.readouterr().out
    assert "plain (baseline)" in shown and "0.62" in shown and "2000 FLOPs" not in text


def test_seconds_are_those_of_the_steps(tmp_path):
    """By the tokens a second that were written down; where none are, as at the start, by the next ones."""

    def timed(name, losses, rates):
        save(tmp_path / name, losses)
        with open(tmp_path / name / "metrics.jsonl", "a") as file:
            for i, rate in enumerate(rates, 1):
                file.write(json.dumps({"step": 100 * i, "tokens_per_second": rate}) + "\n")
        return str(tmp_path / name)

    baseline, helper = timed("plain", [5.0, 4.0, 3.0], [None, 100.0, 50.0]), timed("helper", [6.0], [20.0])
    helped, silent = timed("helped", [4.0, 2.0], [50.0, 25.0]), save(tmp_path / "silent", [3.0])
    flags = [f"--baseline={baseline}", f"--run={helped}", f"--run={silent}"]
    out = run_main(tmp_path, *flags, f"--helper={helper}")
    assert out["baseline"]["seconds_to_target"] == pytest.approx(10 + 10 + 20)
    row = out["runs"][0]
    assert row["seconds_to_target"] == pytest.approx(20 + 20) and row["seconds_fraction"] == pytest.approx(1.0)
    assert row["seconds_with_helper_fraction"] == pytest.approx((40 + 50) / 40) and out["helper_seconds"] == 50
    assert out["runs"][1]["reached"] and out["runs"][1]["seconds_to_target"] is None
    assert run_main(tmp_path, *flags, f"--helper={silent}")["runs"][0]["seconds_with_helper"] is None


def test_the_final_loss_may_be_the_mean_of_the_last_evaluations(tmp_path):
    baseline = save(tmp_path / "plain", [5.0, 3.0, 3.4, 3.2])
    other = save(tmp_path / "other", [5.0, 3.5, 3.1, 2.9])
    out = run_main(tmp_path, f"--baseline={baseline}", f"--run={other}", "--last=2")
    assert out["target_loss"] == pytest.approx(3.3) and out["runs"][0]["final"]["val_loss"] == pytest.approx(3.0)
    assert out["runs"][0]["tokens_to_target"] == pytest.approx(2500.0)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "mean of the last 2 evaluations" in text
    assert "The baseline itself first touches its final loss at 46% of its tokens" in text


def test_a_run_that_begins_below_the_target_is_marked_as_a_bound(tmp_path):
    baseline, early = save(tmp_path / "plain", [5.0, 4.0]), save(tmp_path / "early", [3.5, 3.0])
    row = run_main(tmp_path, f"--baseline={baseline}", f"--run={early}")["runs"][0]
    assert row["reached_by_first_evaluation"] and row["tokens_to_target"] == 1000.0
    assert "| early | ≤ 1k | ≤ 0.50 |" in (tmp_path / "out" / "report.md").read_text()


def test_flops_that_were_not_written_are_not_made_up(tmp_path):
    baseline = save(tmp_path / "plain", [5.0, 4.0], flops_per_token=None)
    other = save(tmp_path / "other", [4.5, 3.5], flops_per_token=None)
    row = run_main(tmp_path, f"--baseline={baseline}", f"--run={other}")["runs"][0]
    assert row["reached"] and row["flops_to_target"] is None and row["flops_fraction"] is None


def test_a_run_that_diverged_after_its_last_finite_evaluation_is_noted(tmp_path):
    baseline = save(tmp_path / "plain", [5.0, 4.0, 3.0])
    lost = save(tmp_path / "lost", [4.5, 3.5], extra=['{"step": 300, "tokens": 3000, "val_loss": null}\n'])
    run_main(tmp_path, f"--baseline={baseline}", f"--run={lost}")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "lost: its last evaluation with a finite loss is at 67%" in text and "plain: its last" not in text


def test_an_evaluation_before_training_alone_divides_nothing_by_zero(tmp_path):
    a, b = (save(tmp_path / name, [4.0], every=0) for name in "ab")
    row = run_main(tmp_path, f"--baseline={a}", f"--run={b}")["runs"][0]
    assert row["reached"] and row["tokens_fraction"] is None


def test_runs_of_one_name_are_told_apart_and_names_are_text(tmp_path):
    a, b = save(tmp_path / "a" / "run", [5.0, 4.0]), save(tmp_path / "b" / "run", [5.0, 4.0])
    c = save(tmp_path / "c|$x_$", [5.0, 3.0])
    out = run_main(tmp_path, f"--baseline={a}", f"--run={b}", f"--run={c}")
    assert [out["baseline"]["name"], *(r["name"] for r in out["runs"])] == [a, b, "c|$x_$"]
    assert [group["name"] for group in out["groups"]] == ["run", "c|$x_$"]


def test_names_are_text_to_the_page(tmp_path):
    a = save(tmp_path / "a</title><script>x()", [5.0, 4.0])
    b = save(tmp_path / '"><img src=x onerror=x()> & b', [5.0, 3.0])
    run_main(tmp_path, f"--baseline={a}", f"--run={b}")
    page = assert_the_page_is_whole(tmp_path / "out" / "report.html")
    assert page.text.count('"><img src=x onerror=x()> & b') >= 4


def helped(step, tokens):
    """A line of a run whose kd falls to 0 at step 50, and whose select ends at step 20."""
    kd = {"kd": 0.5, "kd_weight": 0.5 - step / 100, "teacher_ce": 2.0} if step < 50 else {"kd": None}
    return {"step": step, "tokens": tokens, "loss": 3.0, "ce": 4.0, **kd, "kept_fraction": 0.5 if step <= 20 else None}


def test_how_much_help_there_was_and_until_when(tmp_path):
    lines = [json.dumps(helped(step, 10 * step) | {"lead": "others wrote this"}) + "\n" for step in range(1, 101)]
    baseline, other = save(tmp_path / "plain", [5.0, 4.0]), save(tmp_path / "other", [3.0], every=100, extra=lines)
    out = run_main(tmp_path, f"--baseline={baseline}", f"--run={other}")
    row = out["runs"][0]
    assert row["helps"] == {
        "kd": {"tokens": 490.0, "step": 49, "ended": True}, "select": {"tokens": 200.0, "step": 20, "ended": True}
    }  # fmt: skip
    training = row["training"]
    assert set(training) == {"tokens", "loss", "ce", "kd", "kd_weight", "teacher_ce", "kept_fraction"}
    assert training["kd_weight"][:2] == pytest.approx([0.49, 0.48]) and training["kd_weight"][60] is None
    assert out["baseline"]["helps"] == {} and out["baseline"]["curve"]["val_loss"] == [5.0, 4.0]
    text = " ".join(assert_the_page_is_whole(tmp_path / "out" / "report.html").text)
    assert "Help: kd until step 49 (490 tokens), select until step 20 (200 tokens)." in text
    assert "Weights of helps" in text and "The teacher's lead" not in text and "kd ended" in text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.none() | st.floats(-10, 10), min_size=1, max_size=1000).filter(any))
def test_a_long_run_is_thinned_to_means(values):
    found = curves._training([{"tokens": i, "loss": value} for i, value in enumerate(values)])
    assert len(found["loss"]) == len(found["tokens"]) == min(len(values), curves.POINTS)
    known = [value for value in values if value is not None]
    assert min(known) - 1e-9 <= np.nanmin(found["loss"]) and np.nanmax(found["loss"]) <= max(known) + 1e-9
    if len(values) <= curves.POINTS:
        assert [None if np.isnan(x) else x for x in found["loss"]] == values


def test_runs_of_one_name_are_repetitions(tmp_path):
    plain = [save(tmp_path / seed / "plain", [5.0, end]) for seed, end in (("a", 3.0), ("b", 3.2))]
    other = [save(tmp_path / seed / "other", [4.0, end]) for seed, end in (("a", 2.0), ("b", 2.5), ("c", 3.5))]
    out = run_main(tmp_path, f"--baseline={plain[0]}", *(f"--run={run}" for run in (plain[1], *other)))
    first, second = out["groups"]
    assert first["name"] == "plain" and first["runs"] == 2 and first["reached"] == 1
    assert first["final_val_loss"]["mean"] == pytest.approx(3.1)
    assert first["final_val_loss"]["deviation"] == pytest.approx(np.std([3.0, 3.2], ddof=1))
    assert first["tokens_fraction"] == {"mean": 1.0, "deviation": None}, "of the one that reaches it"
    assert second["reached"] == 2 and second["runs"] == 3
    reached = [(1 + (4 - 3) / (4 - end)) / 2 for end in (2.0, 2.5)]
    assert second["tokens_fraction"]["mean"] == pytest.approx(np.mean(reached))
    assert (
        f"| other | 3 | 2.6667 ± {np.std([2.0, 2.5, 3.5], ddof=1):.4f} | 2 of 3 |"
        in (tmp_path / "out" / "report.md").read_text()
    )


def test_a_run_in_progress_with_a_half_written_line_can_be_reported(tmp_path):
    baseline = save(tmp_path / "plain", [5.0, 4.0])
    other = save(tmp_path / "other", [4.5, 3.5], extra=['{"step": 300, "val_lo'])
    assert run_main(tmp_path, f"--baseline={baseline}", f"--run={other}")["runs"][0]["reached"]


def spend(directory, begin, start_step, stop_step, seconds):
    """An attempt that starts in 10 seconds, compiles in 20 and trains for so many."""
    now = [begin]
    clock = goodput.Clock(directory, started=begin, clock=lambda: now[0])
    now[0] += 10
    clock.begin(start_step)
    with clock.measure("compile"):
        now[0] += 20
    now[0] += seconds
    clock.write(stop_step)


def test_where_the_time_went(tmp_path, capsys):
    baseline, other, old = (save(tmp_path / name, [5.0, 4.0, 3.0]) for name in ("plain", "other", "old"))
    spend(baseline, 1000.0, 0, 300, 70.0)
    spend(other, 1000.0, 0, 200, 1770.0)
    spend(other, 3000.0, 150, 300, 1570.0)
    out = run_main(tmp_path, f"--baseline={baseline}", f"--run={other}", f"--run={old}")
    assert out["baseline"]["goodput"]["shares"]["step"] == pytest.approx(0.7)
    assert out["baseline"]["goodput"]["attempts"] == 1 and "goodput" not in out["runs"][1]
    time = out["runs"][0]["goodput"]
    assert time["wall_seconds"] == 3600 and sum(time["seconds"].values()) == pytest.approx(3600)
    assert time["seconds"]["lost"] == pytest.approx(1770 / 4) and time["seconds"]["restarting"] == pytest.approx(200)
    text = (tmp_path / "out" / "report.md").read_text()
    for line in (
        "| of the wall clock | plain (baseline) | other | old |", "| steps | 70.0% | 80.5% | - |",
        "| starting | 10.0% | 0.6% | - |", "| compiling | 20.0% | 1.1% | - |",
        "| steps that were lost | 0.0% | 12.3% | - |", "| between attempts | 0.0% | 5.6% | - |",
        "| attempts | 1 | 2 | - |", "| hours | 0.03 | 1.00 | - |",
    ):  # fmt: skip
        assert line in text
    assert "| saving |" not in text, "kinds that took no time"
    assert "Where the time went" in capsys.readouterr().out
    run_main(tmp_path, f"--baseline={old}", f"--run={old}")
    assert "Where the time went" not in (tmp_path / "out" / "report.md").read_text()


def test_remote_runs_have_names_of_their_own():
    assert places.name_of("gs://bucket/some/run/") == "run" and places.name_of("runs/a/../b/") == "b"
    runs = [a_run([1.0]), a_run([2.0])]
    assert [run.name for run in report.distinct(runs, ["gs://a/run", "gs://b/run/"])] == ["gs://a/run", "gs://b/run"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    good = save(tmp_path / "good", [5.0, 4.0], fingerprint="a")
    other = save(tmp_path / "other", [5.0, 4.0], fingerprint="b")
    blind = save(tmp_path / "blind", [])
    free = save(tmp_path / "free", [5.0], flops_per_token=None)
    edited = save(tmp_path / "edited", [5.0], fingerprint="a")
    (tmp_path / "edited" / "manifest.json").write_text("[]")
    missing = str(tmp_path / "missing")
    for flags, message in (
        ([f"--baseline={missing}", f"--run={good}"], r"--baseline=.*missing: there is no run.*No such file.*--workdir"),
        ([f"--baseline={good}", f"--run={missing}"], "--run=.*missing: there is no run"),
        (
            [f"--baseline={good}", f"--run={blind}"],
            "--run=.*blind: 0 evaluations .* at least 1. Train with --config.eval",
        ),
        ([f"--baseline={good}", f"--run={good}", "--last=3"], "--baseline=.*good: 2 evaluations .* at least 3"),
        ([f"--baseline={good}", f"--run={good}", "--last=0"], "--last=0: expected at least 1"),
        ([f"--baseline={good}", f"--run={other}"], "other and the baseline good .* different data .*b and a"),
        (
            [f"--baseline={good}", f"--run={good}", f"--helper={missing}"],
            "--helper=.*missing: there is no run, as metrics.jsonl",
        ),
        ([f"--baseline={good}", f"--run={good}", f"--helper={free}"], "--helper=.*free: metrics.jsonl has no flops"),
        ([f"--baseline={good}", f"--run={edited}"], "edited.manifest.json: the whole is a list"),
    ):
        with pytest.raises(UserError, match=message):
            run_main(tmp_path, *flags)


def test_the_verb_ends_on_a_short_message(tmp_path):
    command = [sys.executable, "-m", "lmboost.report", "--baseline=none", "--run=none", f"--out={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --baseline=none: there is no run") and "Traceback" not in result.stderr
    assert "Traceback" in subprocess.run([*command, "--traceback"], capture_output=True, text=True).stderr


def test_links_in_the_place_of_a_report_are_replaced_and_not_followed(tmp_path):
    a, b = (save(tmp_path / name, [5.0, 4.0]) for name in "ab")
    (tmp_path / "out").mkdir()
    for name in ("report.md", "report.json", "report.png", "report.html"):
        (tmp_path / f"mine-{name}").write_text("mine")
        (tmp_path / "out" / name).symlink_to(tmp_path / f"mine-{name}")
    run_main(tmp_path, f"--baseline={a}", f"--run={b}")
    for name in ("report.md", "report.json", "report.png", "report.html"):
        assert (tmp_path / f"mine-{name}").read_text() == "mine" and not (tmp_path / "out" / name).is_symlink()


def test_what_helpers_said_before_is_shared_by_the_runs_that_read_it(tmp_path):
    baseline, helper = save(tmp_path / "plain", [3.0, 2.0]), save(tmp_path / "helper", [3.0])
    runs = [save(tmp_path / name, [2.5, 1.9], fingerprint="d") for name in ("one", "two", "alone", "online")]
    for name, mark in (("one", "a"), ("two", "a"), ("alone", "b")):
        path = tmp_path / name / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"targets": {"fingerprint": mark, "flops": 600.0, "directory": "x"}}))
    flags = [f"--baseline={baseline}", *(f"--run={run}" for run in runs)]
    for more, trained in (([], 0.0), ([f"--helper={helper}"], 10.0 * 10 * 100)):
        found = run_main(tmp_path, *flags, *more)["runs"]
        for row, shared in zip(found[:3], (300.0, 300.0, 600.0), strict=True):
            assert row["flops_with_helper"] == pytest.approx(row["flops_to_target"] + trained + shared)
            assert row["seconds_with_helper"] is None
        assert (found[3]["flops_with_helper"] is None) == (not more)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "one: what helpers said before the run took 600 FLOPs, which 2 of these runs share." in text
    assert "alone: what helpers said before the run took 600 FLOPs." in text
