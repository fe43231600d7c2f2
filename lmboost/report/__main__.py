"""Compares runs: how many tokens, FLOPs and seconds each needs to reach the baseline's final validation loss.

    python -m lmboost.report --baseline=DIR --run=DIR [--run=DIR ...] [--helper=DIR] --out=DIR

Prints tables and writes OUT/report.html (a page that needs nothing else), OUT/report.md, OUT/report.json (exact
numbers) and OUT/report.png. Every directory may be remote (gs://bucket/path).
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.console
import rich.markup
import rich.table
from etils import epath

from lmboost import places
from lmboost.errors import UserError, run_flags
from lmboost.report.compare import compare
from lmboost.report.curves import SPENT, Run, load_run, training_cost
from lmboost.report.tables import Table, notes, tables


def write(report: dict[str, Any], out: str, last: int) -> None:
    """Prints the tables and writes the files; `report` is what `compare` gives."""
    from lmboost.report import page, plot  # matplotlib is slow to load, and the table needs none

    directory, console = epath.Path(out), rich.console.Console()
    directory.mkdir(parents=True, exist_ok=True)
    shown, remarks = tables(report), notes(report, last)
    for title, (header, *rows) in shown:
        table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(rich.markup.escape, row))
        console.print(table)
    for remark in remarks:
        console.print(remark, highlight=False, markup=False)
    places.write(directory / "report.json", json.dumps(report | {"last": last}, indent=2, allow_nan=False))
    places.write(directory / "report.md", _markdown(shown, remarks))
    places.write(directory / "report.html", page.of(report, shown, remarks))
    with places.whole_file(directory / "report.png") as partial, partial.open("wb") as file:
        plot.save(report, file)
    console.print(f"Written to {os.path.join(out, 'report.{html,md,json,png}')}", highlight=False, markup=False)


def _markdown(shown: Sequence[Table], remarks: Sequence[str]) -> str:
    text = []
    for title, (header, *rows) in shown:
        text += [f"**{title}**", ""]
        for cells in (header, [":--"] + ["--:"] * (len(header) - 1), *rows):
            text.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        text.append("")
    text += [*(f"- {remark}" for remark in remarks), "", "![Validation loss against tokens](report.png)", ""]
    return "\n".join(text)


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
    write(compare(runs[0], runs[1:], cost if costs else None), out, last)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lmboost.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--baseline", required=True, metavar="DIR", help="the run to compare with")
    runs = {"action": "append", "metavar": "DIR"}
    parser.add_argument("--run", **runs, required=True, help="a run to compare; may be repeated")
    helper = "run that trained the helper; what it cost is added to every --run in a table of its own; may be repeated"
    parser.add_argument("--helper", **runs, default=[], help=helper)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the report's files go")
    parser.add_argument("--last", type=int, default=1, metavar="N", help="average the last N evaluations (default 1)")
    return parser


if __name__ == "__main__":
    run_flags(main, flags())
