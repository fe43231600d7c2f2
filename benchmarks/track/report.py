"""The track's table and plots, made of its lines alone.

    python -m benchmarks.track.report [benchmarks/track/results/nano.jsonl ...] [--out=benchmarks/track/results]

For each tier OUT/TIER.md, with a row an arm, and OUT/TIER.png.
"""

import argparse
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.track.arms import ARMS
from lmboost.errors import UserError, run_flags

BASELINE = "plain"
CHANCE = 0.05  # two-sided; above it no difference is called one
SHOWN = ("adamw", "plain", "salt", "let", "both", "auto")  # in the plot
COLOURS = ("#999999", "#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
Line = dict[str, Any]


class Compared(NamedTuple):
    """An arm against the plain runs of the same length, or of the whole one.

    Attributes:
      losses: final ones, one a run.
      difference: of the means, in nats a token; below 0 the arm is better.
      p: two-sided, of Welch's t-test; None with fewer than two runs on a side. With one run on this side alone, it is
        the probability of a plain run that far off.
      steps, flops: share of the plain runs' at which the mean validation loss is that of the plain runs' end; None
        where it is not reached, or where the end is no better than chance.
      teacher: FLOPs of the training of the helpers that it needs, as a share of the plain run's.
    """

    arm: str
    losses: np.ndarray
    difference: float
    p: float | None
    steps: float | None
    flops: float | None
    spent: float
    teacher: float
    line: Line

    @property
    def students(self) -> float | None:
        """For how many students the helpers must serve until their training is paid."""
        return self.teacher / (1 - self.flops) if self.flops and self.flops < 1 else None


def read(path: pathlib.Path) -> dict[str, list[Line]]:
    """The lines of a tier by their arms. Raises a UserError where they are of several data sets."""
    found = [line for line in map(json.loads, path.read_text().splitlines()) if "curve" in line]
    if len(kinds := {json.dumps(line["data"], sort_keys=True) for line in found}) > 1:
        raise UserError(f"{path} has lines of {len(kinds)} data sets: their losses cannot be compared.")
    arms = defaultdict(list)
    for line in found:
        arms[line["arm"]].append(line)
    if BASELINE not in arms:
        raise UserError(f"{path} has no line of the arm {BASELINE!r}, which all others are compared with.")
    return arms


def difference(losses: np.ndarray, plain: np.ndarray) -> tuple[float, float | None]:
    """(difference of the means, p); see `Compared`."""
    if len(plain) < 2:
        return losses.mean() - plain.mean(), None
    if len(losses) > 1:
        return losses.mean() - plain.mean(), float(stats.ttest_ind(losses, plain, equal_var=False).pvalue)
    spread = plain.std(ddof=1) * np.sqrt(1 + 1 / len(plain))
    return losses.mean() - plain.mean(), float(
        2 * stats.t.sf(abs(losses.mean() - plain.mean()) / spread, len(plain) - 1)
    )


def curve(lines: Iterable[Line], column: int) -> np.ndarray:
    """The mean over seeds of a column of the curves (0 step, 1 loss, 2 FLOPs), one number an evaluation."""
    return np.mean([[point[column] for point in line["curve"]] for line in lines], 0)


def crossing(x: np.ndarray, loss: np.ndarray, target: float) -> float | None:
    """The first x at which the loss, between evaluations a straight line, is the target."""
    below = np.flatnonzero(loss <= target)
    if not len(below) or not below[0]:
        return None
    i = below[0]
    return float(np.interp(target, [loss[i], loss[i - 1]], [x[i], x[i - 1]]))


def compare(arms: dict[str, list[Line]]) -> list[Compared]:
    """Every arm of the student against the plain runs, in the order of arms.py."""
    plain, rows = arms[BASELINE], []
    final = np.array([line["final"] for line in plain])
    target, length, cost = curve(plain, 1)[-1], plain[0]["steps"], plain[0]["flops"]
    for arm in sorted(arms, key=list(ARMS).index):
        lines = arms[arm]
        losses = np.array([line["final"] for line in lines])
        delta, p = difference(losses, final) if arm != BASELINE else (0.0, None)
        better = delta < 0 and (p is None or p < CHANCE) or arm == BASELINE
        loss = curve(lines, 1)
        reached = [crossing(curve(lines, column), loss, target) if better else None for column in (0, 2)]
        rows.append(
            Compared(
                arm, losses, delta, p, *(r and r / whole for r, whole in zip(reached, (length, cost), strict=True)),
                lines[0]["flops"] / cost, sum(_training(arms, needed) for needed in ARMS[arm].needs) / cost, lines[0],
            )
        )  # fmt: skip
    return rows


def _training(arms: dict[str, list[Line]], arm: str) -> float:
    """FLOPs of an arm's training and of what it needs."""
    own = arms[arm][0]["flops"] if arm in arms else float("nan")
    return own + sum(_training(arms, needed) for needed in ARMS[arm].needs)


def _number(x: float | None, form: str) -> str:
    return "-" if x is None or np.isnan(x) else format(x, form)


def table(rows: list[Compared], arms: dict[str, list[Line]]) -> str:
    """The rows as Markdown."""
    head = (
        "arm", "n", "loss", "sd", "against plain", "p", "FLOPs spent", "steps to plain's end", "FLOPs to plain's end",
        "and the helper's training", "pays from", "Bible", "JavaScript", "copying",
    )  # fmt: skip
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        sd = row.losses.std(ddof=1) if len(row.losses) > 1 else None
        others = [[line.get(name, np.nan) for line in arms[row.arm]] for name in ("bible", "javascript", "copying")]
        cells = [
            row.arm, str(len(row.losses)), f"{row.losses.mean():.4f}", _number(sd, ".4f"), f"{row.difference:+.4f}",
            _number(row.p, ".2g"), f"{row.spent:.2f}", _number(row.steps, ".2f"), _number(row.flops, ".2f"),
            _number(row.flops and row.flops + row.teacher, ".2f"), _number(row.students, ".1f"),
            *(_number(np.mean(x), ".3f") for x in others),
        ]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def plot(arms: dict[str, list[Line]], path: pathlib.Path) -> None:
    """The mean validation loss of the main arms, less that of the plain runs at the same step."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    plain = curve(arms[BASELINE], 1)
    steps = curve(arms[BASELINE], 0) / arms[BASELINE][0]["steps"]
    for arm, colour in zip(SHOWN, COLOURS, strict=True):
        if arm in arms:
            apart = [np.array([point[1] for point in line["curve"]]) - plain for line in arms[arm]]
            axes.plot(steps, np.mean(apart, 0), color=colour, label=f"{arm} ({len(apart)})", lw=1.8)
            for one in apart:
                axes.plot(steps, one, color=colour, lw=0.5, alpha=0.5)
    axes.set(xlabel="share of the run", ylabel="validation loss less that of plain (nats a token)")
    axes.set_ylim(-0.25, 0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(lines: list[str], out: str) -> None:
    for name in lines:
        path = pathlib.Path(name)
        arms = read(path)
        text = table(compare(arms), arms)
        where = pathlib.Path(out)
        (where / f"{path.stem}.md").write_text(text)
        plot(arms, where / f"{path.stem}.png")
        print(text)


RESULTS = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", default=sorted(map(str, RESULTS.glob("*.jsonl"))))
    parser.add_argument("--out", default=str(RESULTS))
    run_flags(main, parser)
