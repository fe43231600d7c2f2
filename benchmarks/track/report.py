"""The track's table and plots, made of its lines alone.

    python -m benchmarks.track.report [benchmarks/track/results/nano.jsonl ...] [--out=benchmarks/track/results]
    python -m benchmarks.track.report runs/track/nano.jsonl --out=runs/track \\
      --against=benchmarks/track/results/nano.jsonl

For each tier OUT/TIER.md, with a row an arm, and OUT/TIER.png. With --against, which runs came out as others did with
the same arm and seed: the same numbers on the same machine, on another as far apart as pairs of runs are by chance.
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
SHOWN = ("adamw", "plain", "salt", "let", "both", "auto", "stack-long", "smollm2-let", "smollm2-alm")  # in the plot
COLOURS = ("#999999", "#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#009E73")
Line = dict[str, Any]


class Compared(NamedTuple):
    """An arm against the plain runs of its seeds.

    Attributes:
      losses: final ones, one a run.
      differences: of those from plain's, seed by seed, in nats a token; below 0 the arm is better.
      p: two-sided, of a paired t-test; None where nothing says how far pairs lie apart.
      steps, flops: share of the plain runs' at which the mean validation loss is that of the plain runs' end; None
        where it is not reached, or where the end is no better than chance.
      spent: FLOPs of the whole run, as a share of the plain run's.
      training: FLOPs of the training of the models that it needs, likewise.
    """

    arm: str
    losses: np.ndarray
    differences: np.ndarray
    p: float | None
    steps: float | None
    flops: float | None
    spent: float
    training: float

    @property
    def students(self) -> float | None:
        """For how many students the other models must serve until their training is paid."""
        return self.training / (1 - self.flops) if self.flops and self.flops < 1 else None


def read(path: pathlib.Path) -> dict[str, list[Line]]:
    """The lines of a tier by their arms. Raises a UserError where they are of several data sets."""
    found = [json.loads(text) for text in path.read_text().splitlines()]
    if len(kinds := {json.dumps(line["data"], sort_keys=True) for line in found if "data" in line}) > 1:
        raise UserError(f"{path} has lines of {len(kinds)} data sets: their losses cannot be compared.")
    arms = defaultdict(list)
    for line in found:
        arms[line["arm"]].append(line)
    if BASELINE not in arms:
        raise UserError(f"{path} has no line of the arm {BASELINE!r}, which all others are compared with.")
    return arms


def spread(differences: Iterable[np.ndarray]) -> float | None:
    """The standard deviation of paired differences, pooled over the helped arms that have at least three."""
    several = [x for x in differences if len(x) > 2]
    if not several:
        return None
    return float(np.sqrt(np.average([np.var(x, ddof=1) for x in several], weights=[len(x) - 1 for x in several])))


def chance(differences: np.ndarray, pooled: float | None) -> float | None:
    """The two-sided p of a mean difference; see `Compared`. `pooled` is the spread, for a single one."""
    if len(differences) > 1:
        return float(stats.ttest_1samp(differences, 0.0).pvalue)
    return float(2 * stats.norm.sf(abs(differences[0]) / pooled)) if pooled else None


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
    """Every arm that has seeds with the plain runs, in the order of arms.py. A search is a cost of others, no arm."""
    plain = {line["seed"]: line for line in arms[BASELINE]}
    pairs = {
        arm: [x for x in arms[arm] if x["seed"] in plain and "curve" in x] for arm in sorted(arms, key=list(ARMS).index)
    }
    pairs = {arm: lines for arm, lines in pairs.items() if lines}
    apart = {arm: np.array([x["final"] - plain[x["seed"]]["final"] for x in lines]) for arm, lines in pairs.items()}
    pooled = spread(x for arm, x in apart.items() if ARMS[arm].teacher)
    return [
        _row(arm, lines, [plain[x["seed"]] for x in lines], apart[arm], pooled, arms) for arm, lines in pairs.items()
    ]


def _row(arm: str, lines: list[Line], plain: list[Line], apart: np.ndarray, pooled: float | None, arms) -> Compared:
    p = chance(apart, pooled) if arm != BASELINE else None
    better = arm == BASELINE or apart.mean() < 0 and (p is None or p < CHANCE)
    target, whole = curve(plain, 1)[-1], (plain[0]["steps"], plain[0]["flops"])
    reached = [crossing(curve(lines, column), curve(lines, 1), target) if better else None for column in (0, 2)]
    shares = [x and x / all_of_it for x, all_of_it in zip(reached, whole, strict=True)]
    training = sum(_training(arms, needed) for needed in ARMS[arm].needs) + lines[0].get("answers", {}).get("flops", 0)
    losses = np.array([line["final"] for line in lines])
    return Compared(
        arm, losses, apart, p, *shares, np.mean([line["flops"] for line in lines]) / whole[1], training / whole[1]
    )


def _training(arms: dict[str, list[Line]], arm: str) -> float:
    """FLOPs of an arm's training and of what it needs."""
    own = arms[arm][0]["flops"] if arm in arms else float("nan")
    return own + sum(_training(arms, needed) for needed in ARMS[arm].needs)


def _number(x: float | None, form: str) -> str:
    return "-" if x is None or np.isnan(x) else format(x, form)


def table(rows: list[Compared], arms: dict[str, list[Line]]) -> str:
    """The rows as Markdown."""
    head = (
        "arm", "n", "loss", "against plain", "sd", "p", "FLOPs spent", "steps to plain's end", "FLOPs to plain's end",
        "and the helper's training", "pays from", "Bible", "JavaScript", "copying",
    )  # fmt: skip
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        sd = row.differences.std(ddof=1) if len(row.losses) > 1 else None
        others = [[line.get(name, np.nan) for line in arms[row.arm]] for name in ("bible", "javascript", "copying")]
        cells = [
            row.arm, str(len(row.losses)), f"{row.losses.mean():.4f}", f"{row.differences.mean():+.4f}",
            _number(sd, ".4f"), _number(row.p, ".2g"), f"{row.spent:.2f}", _number(row.steps, ".2f"),
            _number(row.flops, ".2f"), _number(row.flops and row.flops + row.training, ".2f"),
            _number(row.students, ".1f"),
            *(_number(np.mean(x), ".3f") for x in others),
        ]  # fmt: skip
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def plot(arms: dict[str, list[Line]], path: pathlib.Path) -> None:
    """The mean validation loss of the main arms, less that of the plain runs at the same step."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    plain = {line["seed"]: np.array(line["curve"])[:, 1] for line in arms[BASELINE]}
    steps = curve(arms[BASELINE], 0) / arms[BASELINE][0]["steps"]
    for arm, colour in zip(SHOWN, COLOURS, strict=True):
        if arm in arms:
            pairs = [(line, plain[line["seed"]]) for line in arms[arm] if line["seed"] in plain]
            apart = [np.array(line["curve"])[:, 1] - base for line, base in pairs]
            axes.plot(steps, np.mean(apart, 0), color=colour, label=f"{arm} ({len(apart)})", lw=1.8)
            for one in apart:
                axes.plot(steps, one, color=colour, lw=0.5, alpha=0.5)
    axes.set(xlabel="share of the run", ylabel="validation loss less that of plain (nats a token)")
    axes.set_ylim(-0.25, 0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def agreement(arms: dict[str, list[Line]], others: dict[str, list[Line]]) -> str:
    """The runs that both have, and how far apart they ended, as Markdown.

    Raises a UserError where there is none, or where they are of different data.
    """
    there = {(line["arm"], line["seed"]): line for lines in others.values() for line in lines}
    both = [(x, there[x["arm"], x["seed"]]) for lines in arms.values() for x in lines if (x["arm"], x["seed"]) in there]
    if not both:
        raise UserError("--against: the two files have no arm and seed in common.")
    if any(x["data"] != y["data"] for x, y in both if "data" in x and "data" in y):
        raise UserError("--against: the two files are of different data; their losses cannot be compared.")
    apart = np.array([x["final"] - y["final"] for x, y in both])
    noise = 2 * (spread(row.differences for row in compare(others) if ARMS[row.arm].teacher) or np.nan)
    out = ["| arm | seed | here | there | difference |", "|" + "---|" * 5]
    out += [
        f"| {x['arm']} | {x['seed']} | {x['final']:.4f} | {y['final']:.4f} | {difference:+.4f} |"
        for (x, y), difference in zip(both, apart, strict=True)
    ]
    within = int((np.abs(apart) <= noise).sum())
    return "\n".join(out) + f"\n\n{within} of {len(both)} within {noise:.3f}, twice the spread of pairs there.\n"


def main(lines: list[str], out: str, against: str) -> None:
    if against and len(lines) != 1:
        raise UserError(f"--against compares the lines of one file, and {len(lines)} are given.")
    for name in lines:
        path = pathlib.Path(name)
        arms = read(path)
        text = table(compare(arms), arms)
        where = pathlib.Path(out)
        (where / f"{path.stem}.md").write_text(text)
        plot(arms, where / f"{path.stem}.png")
        print(text)
        if against:
            print(agreement(arms, read(pathlib.Path(against))))


RESULTS = pathlib.Path(__file__).parent / "results"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", default=sorted(map(str, RESULTS.glob("*.jsonl"))))
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--against", default="", help="lines of the same tier, as the committed ones")
    run_flags(main, parser)
