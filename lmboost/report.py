"""Compares runs: how many tokens, FLOPs and seconds each needs to reach the baseline's final validation loss.

    python -m lmboost.report --baseline=DIR --run=DIR [--run=DIR ...] [--helper=DIR] --out=DIR

Prints tables and writes OUT/report.md, OUT/report.json (exact numbers) and OUT/report.png. Every directory may be
remote (gs://bucket/path).
"""

import argparse
import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.markup
import rich.table
from etils import epath

from lmboost import checkpoint, places
from lmboost.errors import UserError, run_flags
from lmboost.run import goodput, metrics, progress

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the baseline's tokens
SPENT = ("flops", "seconds")  # what a run costs besides tokens; columns of Run
FINAL_FIELDS = ("val_loss", "val_perplexity", "val_bits_per_byte")
TIMES = {  # kinds of goodput.Goodput, as the lines of the table
    "step": "steps", "start": "starting", "restore": "restoring", "compile": "compiling", "data": "waiting for data",
    "evaluate": "evaluating", "save": "saving", "lost": "steps that were lost", "restarting": "between attempts",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's evaluations in the order of its tokens. `flops` and `seconds` are cumulative, NaN where not known."""

    name: str
    tokens: np.ndarray
    val_loss: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray  # of steps alone, by the machine's clock
    steps: np.ndarray
    final: dict[str, float | None]  # FINAL_FIELDS over the last evaluations
    trained_tokens: float  # up to its last line
    fingerprint: Any = None
    time: goodput.Goodput | None = None
    answers: tuple[str, float] | None = None  # of helpers before the run: their fingerprint, and FLOPs that they took
    stages: tuple[float, ...] = ()  # tokens at which it went on from another run


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where a run first reaches a loss; `first` if its first evaluation is already there (an upper bound)."""

    tokens: float
    flops: float | None
    seconds: float | None
    first: bool = False


def load_run(directory: str, last: int = 1, flag: str = "--run") -> Run:
    """Reads DIR/metrics.jsonl and, where there are such files, DIR/manifest.json and DIR/goodput.jsonl.

    Raises a UserError where there is no such run, or it has fewer than `last` evaluations.
    """
    every = _lines(directory, flag)
    lines = [line for line in every if "val_loss" in line and "tokens" in line]
    if len(lines) < last:
        raise UserError(
            f"{flag}={directory}: {len(lines)} evaluations with val_loss and tokens in {metrics.FILE}, "
            f"expected at least {last}. Train with --config.eval.every above 0 and a validation split."
        )
    column = lambda name: np.array([line.get(name, np.nan) for line in lines], np.float64)  # noqa: E731
    tail = {k: [line[k] for line in lines[-last:] if k in line] for k in FINAL_FIELDS}
    manifest = checkpoint.Run(directory).manifest() or {}
    answers = manifest.get("targets")
    return Run(
        name=name_of(directory),
        tokens=column("tokens"),
        val_loss=column("val_loss"),
        flops=column("flops"),
        seconds=column("seconds"),
        steps=column("step"),
        final={k: float(np.mean(v)) if v else None for k, v in tail.items()},
        trained_tokens=max(line.get("tokens", 0.0) for line in every),
        fingerprint=manifest.get("data", {}).get("fingerprint"),
        time=goodput.read(directory),
        answers=answers and (answers["fingerprint"], answers["flops"]),
        stages=tuple(stage["tokens"] for stage in manifest.get("stages", ())),
    )


def _lines(directory: str, flag: str) -> list[dict[str, Any]]:
    """A line a step, of metrics.jsonl, with "seconds" besides; a UserError where there is no run."""
    by_step: dict[int, dict[str, Any]] = {}
    try:
        for line in metrics.read(directory):  # numbers of one step may be on several lines
            by_step.setdefault(line["step"], {}).update({k: v for k, v in line.items() if v is not None})
    except OSError as error:
        raise UserError(
            f"{flag}={directory}: there is no run, as {metrics.FILE} cannot be read ({error.strerror or error}). "
            "Give the --workdir of a run."
        ) from error
    lines = [by_step[step] for step in sorted(by_step)]
    _add_seconds(lines)
    return lines


def _add_seconds(lines: Sequence[dict[str, Any]]) -> None:
    """Adds to lines in their order how long steps have taken up to them, by the tokens a second of each stretch.

    Stretches without that number (the first one, in which the step is compiled) are taken to be as fast as the next.
    """
    told = [line for line in lines if line.get("tokens_per_second") and "tokens" in line]
    at = np.array([line["tokens"] for line in told])  # not a list, which each search would read anew
    seconds, before = 0.0, 0.0
    for line in lines:
        if told and "tokens" in line:
            rate = told[min(np.searchsorted(at, line["tokens"]), len(told) - 1)]["tokens_per_second"]
            seconds, before = seconds + (line["tokens"] - before) / rate, line["tokens"]
            line["seconds"] = seconds


def name_of(directory: str) -> str:
    """The last part of a path, local or remote, also of "." and ".."."""
    return epath.Path(directory if "://" in directory else os.path.abspath(directory)).name


def training_cost(directory: str) -> dict[str, float | None]:
    """{"flops", "seconds"} of all steps of a finished run, for what its training cost."""
    cost = {name: [line[name] for line in _lines(directory, "--helper") if name in line] for name in SPENT}
    if not cost["flops"]:
        raise UserError(
            f"--helper={directory}: {metrics.FILE} has no flops, so its cost is not known. Leave --helper out."
        )
    return {name: float(max(values)) if values else None for name, values in cost.items()}


def crossing(run: Run, target: float) -> Crossing | None:
    """Where the run's validation loss first is at most `target`, linearly between evaluations; None if never."""
    below = np.flatnonzero(run.val_loss <= target)
    if not below.size:
        return None
    i = below[0]
    if i == 0:
        return Crossing(float(run.tokens[0]), _number(run.flops[0]), _number(run.seconds[0]), first=True)
    x = (run.val_loss[i - 1] - target) / (run.val_loss[i - 1] - run.val_loss[i])
    at = lambda a: float(a[i - 1] + x * (a[i] - a[i - 1]))  # noqa: E731
    return Crossing(at(run.tokens), _number(at(run.flops)), _number(at(run.seconds)))


def loss_at(run: Run, tokens: float) -> float | None:
    """Validation loss after so many tokens, linearly between evaluations; None outside of them."""
    return _number(np.interp(tokens, run.tokens, run.val_loss, left=np.nan, right=np.nan))


def compare(baseline: Run, runs: Sequence[Run], helper: Mapping[str, float | None] | None = None) -> dict[str, Any]:
    """The report as plain numbers.

    The target is the baseline's final loss, and what it spent on it is its whole run. FLOPs and seconds of a run hold
    its helpers' forward passes; `helper` is what training the helper cost (`training_cost`), added to every run but
    the baseline. What helpers have answered before the runs is shared by those of the runs that read it.

    Raises a UserError where runs were evaluated on different data.
    """
    for run in runs:
        if None not in (run.fingerprint, baseline.fingerprint) and run.fingerprint != baseline.fingerprint:
            raise UserError(
                f"{run.name} and the baseline {baseline.name} were evaluated on different data (fingerprints "
                f"{run.fingerprint} and {baseline.fingerprint} in manifest.json): their losses cannot be compared. "
                "Train both on one data set."
            )
    target, total_tokens = baseline.final["val_loss"], float(baseline.tokens[-1])
    total = {name: _number(getattr(baseline, name)[-1]) for name in SPENT}
    served = collections.Counter(run.answers[0] for run in runs if run.answers)

    def before(name: str, run: Run) -> float | None:
        """What was spent before the run on its help."""
        trained = helper["flops"] if helper else 0.0 if run.answers else None
        if name == "flops" and run.answers and trained is not None:
            return trained + run.answers[1] / served[run.answers[0]]
        return None if run.answers else helper and helper[name]

    def spent(name: str, reached: Crossing | None, run: Run) -> dict[str, float | None]:
        cost = reached and getattr(reached, name)
        trained = before(name, run) if run is not baseline else None
        with_helper = cost + trained if run is not baseline and None not in (cost, trained) else None
        return {
            f"{name}_to_target": cost,
            f"{name}_fraction": _ratio(cost, total[name]),
            f"{name}_with_helper": with_helper,
            f"{name}_with_helper_fraction": _ratio(with_helper, total[name]),
        }

    def row(run: Run) -> dict[str, Any]:
        reached = crossing(run, target)
        return {
            "name": run.name,
            "trained_tokens": run.trained_tokens,
            "loss_at": {f"{f:g}": loss_at(run, f * total_tokens) for f in FRACTIONS},
            "final": run.final,
            "total": {"steps": float(run.steps[-1]), "tokens": float(run.tokens[-1]), "flops": _number(run.flops[-1])},
            "reached": reached is not None,
            "reached_by_first_evaluation": bool(reached and reached.first),
            "tokens_to_target": reached and reached.tokens,
            "tokens_fraction": _ratio(reached and reached.tokens, total_tokens),
            **spent("flops", reached, run),
            **spent("seconds", reached, run),
            "answers": run.answers and {"flops": run.answers[1], "runs": served[run.answers[0]]},
        } | ({"goodput": _time(run.time)} if run.time else {})

    about = {"target_loss": target} | {f"helper_{name}": helper and helper[name] for name in SPENT}
    return about | {"baseline": row(baseline), "runs": [row(run) for run in runs]}


def _time(spent: goodput.Goodput) -> dict[str, Any]:
    shares = {kind: spent.share(kind) for kind in spent.seconds}
    return {"attempts": spent.attempts, "wall_seconds": spent.wall, "seconds": dict(spent.seconds), "shares": shares}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _tables(report: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """[(title, header and rows as text)]."""
    rows = [report["baseline"], *report["runs"]]
    losses = [["run", *(f"{float(f):.0%}" for f in report["baseline"]["loss_at"]), "final"]]
    costs = [["run", "tokens", "x", "FLOPs", "x", "seconds", "x"]]
    whole = [["run", "FLOPs", "x", "seconds", "x"]]
    for row in rows:
        name = _title(report, row)
        losses.append([name, *(_cell(v, "{:.4f}") for v in [*row["loss_at"].values(), row["final"]["val_loss"]])])
        bound = "≤ " if row["reached_by_first_evaluation"] else ""
        tokens = row["tokens_to_target"]
        tokens = "-" if tokens is None else bound + progress.short(tokens)
        costs.append([name, tokens, _cell(row["tokens_fraction"], bound + "{:.2f}"), *_spent(row, "to_target", bound)])
        if row is not report["baseline"]:
            whole.append([name, *_spent(row, "with_helper", bound)])
    target = report["target_loss"]
    tables = [
        ("Validation loss after a share of the baseline's tokens, nats per token", losses),
        (f"Cost of the baseline's final loss ({target:.4f}); x is a multiple of the baseline's whole run", costs),
    ]
    if report["helper_flops"] is not None or any(row["answers"] for row in report["runs"]):
        tables.append(("The same with what was spent on help before", whole))
    return tables + ([_time_table(report)] if any("goodput" in row for row in rows) else [])


def _spent(row: dict[str, Any], what: str, bound: str) -> list[str]:
    """FLOPs and seconds of a row, each with its multiple of the baseline's, as cells."""
    multiple = {"to_target": "fraction", "with_helper": "with_helper_fraction"}[what]
    cells = []
    for name, form in (("flops", "{:.3g}"), ("seconds", "{:.0f}")):
        cells += [_cell(row[f"{name}_{what}"], bound + form), _cell(row[f"{name}_{multiple}"], bound + "{:.2f}")]
    return cells


def _time_table(report: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """Where each run's time went. Runs of versions that did not write it down have -, idle kinds no line."""
    rows = [report["baseline"], *report["runs"]]
    times = [row.get("goodput") for row in rows]
    lines = [["of the wall clock", *(_title(report, row) for row in rows)]]
    for kind, name in TIMES.items():
        shares = [time and time["shares"][kind] for time in times]
        if kind == "step" or any(share and share >= 0.0005 for share in shares):
            lines.append([name, *(_cell(share, "{:.1%}") for share in shares)])
    lines.append(["attempts", *(_cell(time and time["attempts"], "{}") for time in times)])
    lines.append(["hours", *(_cell(time and time["wall_seconds"] / 3600, "{:.2f}") for time in times)])
    return "Where the time went", lines


def _title(report: dict[str, Any], row: dict[str, Any]) -> str:
    return row["name"] + (" (baseline)" if row is report["baseline"] else "")


def _notes(report: dict[str, Any], last: int) -> list[str]:
    final = "last evaluation" if last == 1 else f"mean of the last {last} evaluations"
    notes = [
        f"Target: the baseline's final validation loss, {report['target_loss']:.4f} nats per token ({final}). "
        "A run reaches it where its loss first is that low, linearly between evaluations; - is never or not known.",
        f"The baseline's whole run: {progress.short(report['baseline']['total']['tokens'])} tokens"
        + (f", {flops:.3g} FLOPs." if (flops := report["baseline"]["total"]["flops"]) else "."),
    ]
    if (cost := report["helper_flops"]) is not None:
        notes.append(f"Training the helper cost {cost:.3g} FLOPs, added to every run but the baseline.")
    for row in report["runs"]:
        if answers := row["answers"]:
            shared = f", which {answers['runs']} of these runs share" if answers["runs"] > 1 else ""
            notes.append(f"{row['name']}: what helpers said before the run took {answers['flops']:.3g} FLOPs{shared}.")
    if report["baseline"]["seconds_to_target"] is not None:
        notes.append(
            "Seconds are of training steps alone, as the clock had them: they can be compared where the machine was "
            "the same and had nothing else to do."
        )
    rows = [report["baseline"], *report["runs"]]
    if any(row["goodput"]["attempts"] > 1 for row in rows if "goodput" in row):
        notes.append(
            "Steps that were lost were trained again after a crash; between attempts is from the last line that one "
            "wrote to the start of the next."
        )
    for row in rows:
        if row["total"]["tokens"] < 0.9 * row["trained_tokens"]:
            share = row["total"]["tokens"] / row["trained_tokens"]
            notes.append(
                f"{row['name']}: its last evaluation with a finite loss is at {share:.0%} of the tokens that it "
                "trained on. It may have diverged since."
            )
    fraction = report["baseline"]["tokens_fraction"]
    if fraction and fraction < 0.95:
        notes.append(
            f"The baseline itself first touches its final loss at {fraction:.0%} of its tokens: its evaluations are "
            "noisy, or it got worse again. Compare with --last above 1 and more evaluation batches."
        )
    return notes


def write(report: dict[str, Any], runs: Sequence[Run], out: str, last: int) -> None:
    """Prints the tables and writes report.json, report.md and report.png; `runs` begins with the baseline."""
    from lmboost import report_plot  # matplotlib is slow to load, and the table needs none

    directory, console = epath.Path(out), rich.console.Console()
    directory.mkdir(parents=True, exist_ok=True)
    tables, notes = _tables(report), _notes(report, last)
    for title, (header, *rows) in tables:
        table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(rich.markup.escape, row))
        console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    places.write(directory / "report.json", json.dumps(report | {"last": last}, indent=2, allow_nan=False))
    text = []
    for title, (header, *rows) in tables:
        text += [f"**{title}**", ""]
        for cells in (header, [":--"] + ["--:"] * (len(header) - 1), *rows):
            text.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        text.append("")
    text += [*(f"- {note}" for note in notes), "", "![Validation loss against tokens](report.png)", ""]
    places.write(directory / "report.md", "\n".join(text))
    with places.whole_file(directory / "report.png") as partial, partial.open("wb") as file:
        report_plot.save(report, runs, file)
    console.print(f"Written to {os.path.join(out, 'report.{md,json,png}')}", highlight=False, markup=False)


def distinct(runs: Sequence[Run], directories: Sequence[str]) -> list[Run]:
    """Runs of one name are told apart by their paths."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=str(epath.Path(d))) if names.count(run.name) > 1 else run
        for run, d in zip(runs, directories, strict=True)
    ]


def main(baseline: str, run: Sequence[str], helper: Sequence[str], out: str, last: int) -> None:
    """The verb; its arguments are the flags of `flags`."""
    if last < 1:
        raise UserError(f"--last={last}: expected at least 1 evaluation to average.")
    baseline, out, *run = map(os.path.expanduser, (baseline, out, *run))
    helper = [os.path.expanduser(directory) for directory in helper]
    runs = [load_run(baseline, last, "--baseline"), *(load_run(directory, last) for directory in run)]
    runs = distinct(runs, [baseline, *run])
    costs = [training_cost(directory) for directory in helper]
    cost = {name: sum(values) if None not in (values := [c[name] for c in costs]) else None for name in SPENT}
    write(compare(runs[0], runs[1:], cost if costs else None), runs, out, last)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmboost.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--baseline", required=True, metavar="DIR", help="the run to compare with")
    runs = {"action": "append", "metavar": "DIR"}
    parser.add_argument("--run", **runs, required=True, help="a run to compare; may be repeated")
    helper = "run that trained the helper; what it cost is added to every --run in a table of its own; may be repeated"
    parser.add_argument("--helper", **runs, default=[], help=helper)
    parser.add_argument("--out", required=True, metavar="DIR", help="where report.md, report.json and report.png go")
    parser.add_argument("--last", type=int, default=1, metavar="N", help="average the last N evaluations (default 1)")
    return parser


if __name__ == "__main__":
    run_flags(main, flags())
