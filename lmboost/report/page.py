"""The report as a page: one file that fetches nothing and runs no script, so that it can be sent and kept.

Names of runs and all else that comes out of files is text to it: everything is escaped.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmboost.objective import terms
from lmboost.report.chart import COLOURS, Line, bars, chart, legend
from lmboost.report.plot import limits
from lmboost.report.style import CSS
from lmboost.report.tables import TIMES, Table, title
from lmboost.run.progress import short

AXES = {  # what a curve is drawn over: its name, its label, and how its numbers are written
    "tokens": ("Tokens", "training tokens", short),
    "flops": ("FLOPs", "FLOPs, helpers included", "{:.3g}".format),
    "seconds": ("Seconds", "seconds of training steps", short),
}
_MANY = 4  # runs; the parts of more are folded up at first
_LOSSES = ("loss", "ce", "teacher_ce", *(name for name in terms.MAIN_METRICS if name not in ("align", "kept_fraction")))
_WEIGHTS = tuple(name for help_ in terms.HELPS.values() for name in help_.metrics if name.endswith("_weight"))
# What is shown of each run's training, where it has any of these numbers: caption, names.
PANELS = (
    ("Loss and its terms, nats per token", _LOSSES),
    ("Weights of helps", _WEIGHTS),
    ("Share of candidates that select keeps", ("kept_fraction",)),
    ("Alignment: cosine of the states, and its share of the gradient there", ("align_cosine", "align_ratio")),
    ("The teacher's lead, nats per token", ("lead",)),
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def of(report: Mapping[str, Any], tables: Sequence[Table], notes: Sequence[str]) -> str:
    """The page. report: what `compare` gives; tables, notes: what `tables` makes of it."""
    rows = [report["baseline"], *report["runs"]]
    names = [title(report, row) for row in rows]
    timed = any("goodput" in row for row in rows)  # then the last table is of that
    baseline, others = html.escape(rows[0]["name"]), len(rows) - 1
    parts = [
        f"<h1>{baseline} and {others} {'run' if others == 1 else 'runs'} beside it</h1>",
        f"<p>{html.escape(notes[0])}</p>",
        "<h2>Validation loss</h2>",
        _losses(report["target_loss"], rows, names),
        "<h2>What it took</h2>",
        *map(_table, tables[: len(tables) - timed]),
        "<h2>Training</h2>",
        *(_run(row, name, len(rows) <= _MANY) for row, name in zip(rows, names, strict=True)),
        *([f"<h2>{html.escape(tables[-1][0])}</h2>", _time(rows, names), _table(("", tables[-1][1]))] if timed else []),
        "<h2>Remarks</h2>",
        f'<ul class="notes">{"".join(f"<li>{html.escape(note)}</li>" for note in notes[1:])}</ul>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>lmboost report: {baseline}</title><style>{CSS}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _losses(target: float, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The curves over what they cost, one cost at a time."""
    switch, panels, whole = [], [], []
    for axis, (word, label, told) in AXES.items():
        lines = [
            Line(name, colour, _column(row["curve"][axis]), _column(row["curve"]["val_loss"]), dashes, dots=True)
            for row, name, (colour, dashes) in zip(rows, names, _looks(rows), strict=True)
        ]
        whole = whole or lines
        if not (lines := [line for line in lines if np.isfinite(line.x).any()]):
            continue
        known = [(line.x[at], line.y[at]) for line in lines if (at := np.isfinite(line.x)).any()]
        caption = f"Validation loss, nats per token; dashed: the baseline's end, {target:.4f}"
        figure = chart(caption, lines, label, limits(known, target), target, told=told)
        checked = "" if switch else " checked"
        switch.append(f'<input type="radio" name="by" id="by-{axis}"{checked}><label for="by-{axis}">{word}</label>')
        panels.append(f'<div class="panel large by-{axis}">{figure}</div>')
    return f'{legend(whole)}<div class="switch">{"".join(switch)}{"".join(panels)}</div>'


def _looks(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(colour, dashes) of each run: those of one name share a colour, and so do those that come after the last one."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    looks, seen = [], []
    for row in rows:
        group = groups.index(row["group"])
        colour = (group - 1) % (COLOURS - 1) + 1 if group else 0  # the first one is the baseline's alone
        looks.append((colour, seen.count(colour)))
        seen.append(colour)
    return looks


def _run(row: Mapping[str, Any], name: str, unfolded: bool) -> str:
    """What is known of a run's training: its terms, and how much of each help there was, until when."""
    training, figures = row["training"], []
    ends = [(help_["tokens"], f"{which} ended") for which, help_ in row["helps"].items() if help_["ended"]]
    for caption, wanted in PANELS:
        found = [metric for metric in wanted if metric in training]
        if found == ["loss", "ce"] and np.allclose(*map(_column, (training["loss"], training["ce"])), equal_nan=True):
            found = ["loss"]  # it has no other term
        lines = [
            Line(metric, i % (COLOURS - 1) + 1, _column(training["tokens"]), _column(training[metric]))
            for i, metric in enumerate(found)
        ]
        if lines:
            names = legend(lines) if len(lines) > 1 else ""
            figures.append(f"<div>{chart(caption, lines, AXES['tokens'][1], ends=ends)}{names}</div>")
    helps = [
        f"{which} {'until' if help_['ended'] else 'to the end,'} step {help_['step']} ({short(help_['tokens'])} tokens)"
        for which, help_ in row["helps"].items()
    ]
    about = f"Help: {', '.join(helps)}." if helps else "No help." if training else "Its training lines have no numbers."
    about += " Dotted lines are where one ended." if ends else ""
    state = " open" if unfolded else ""
    body = f'<div class="grids">{"".join(figures)}</div>' if figures else ""
    return (
        f'<details class="run"{state}><summary>{html.escape(name)}</summary><p>{html.escape(about)}</p>{body}</details>'
    )


def _time(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Where the time of those runs went that have written it down."""
    shares = [
        (name, [row["goodput"]["shares"][kind] for kind in TIMES])
        for row, name in zip(rows, names, strict=True)
        if "goodput" in row
    ]
    return bars(shares, list(TIMES.values()))


def _table(table: Table) -> str:
    caption, (header, *rows) = table
    cells = lambda row, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    above = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f"<figure>{above}"
        f'<div class="scroll"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
        "</figure>"
    )


def _column(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, np.float64)
