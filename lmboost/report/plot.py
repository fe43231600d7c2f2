"""The report's figure: validation loss against tokens, and where each run reaches the baseline's final loss."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from matplotlib.figure import Figure

BASELINE, INK = "#4d4d4d", "#333333"
# Okabe and Ito's colours, told apart by the colour-blind, without the ones too light for a thin line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
UNITS = ((1e12, " (trillions)"), (1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"))
LINES = ("-", "--", "-.", ":")  # once the colours are used up
ARROW = {"arrowstyle": "-", "lw": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)}  # to a line's end


def save(report: dict[str, Any], file: BinaryIO) -> None:
    """Writes the PNG; `report` is what `compare` gives."""
    target = report["target_loss"]
    rows = [report["baseline"], *report["runs"]]
    figure = Figure(figsize=(8.5, 5), dpi=150, layout="constrained")  # without pyplot: no display, no global state
    axes = figure.subplots()
    curves = [tuple(np.array(row["curve"][name], float) for name in ("tokens", "val_loss")) for row in rows]
    end = max(float(tokens[-1]) for tokens, _ in curves)
    scale, unit = next(((s, name) for s, name in UNITS if end >= s), (1.0, ""))
    axes.axhline(target, color=BASELINE, lw=0.9, ls=(0, (4, 3)), zorder=1)

    labels = []
    for i, ((tokens, loss), row) in enumerate(zip(curves, rows, strict=True)):
        colour = COLOURS[(i - 1) % len(COLOURS)] if i else BASELINE
        style = LINES[(i - 1) // len(COLOURS) % len(LINES)] if i else "-"
        axes.plot(tokens / scale, loss, color=colour, ls=style, lw=1.8, zorder=3 if i else 2)
        at = np.array(row["stages"])  # where it went on from another run
        axes.plot(at / scale, np.interp(at, tokens, loss), "|", ms=12, mew=1.5, color=colour, zorder=4)
        text = row["name"] if len(row["name"]) <= 28 else "…" + row["name"][-27:]
        if i and row["reached"]:
            x = row["tokens_to_target"] / scale
            axes.plot([x], [target], "o", ms=7, mfc="white", mec=colour, mew=1.8, zorder=5)
            text += f"\n{row['tokens_fraction'] or 0:.2f}x the tokens"
        elif i:
            text += "\nnot reached"
        else:
            text += f"\n(baseline, {target:.3f})"
        labels.append((float(tokens[-1]) / scale, float(loss[-1]), text, colour))

    axes.set_xlim(0, end / scale or 1)
    axes.set_ylim(*limits(curves, target))
    axes.set_xlabel(f"Training tokens{unit}")
    axes.set_ylabel("Validation loss (nats per token)")
    title = f"Tokens to reach the baseline's final validation loss ({target:.3f})"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.7)
    axes.tick_params(color="#999999", labelcolor=INK)
    _label_ends(axes, labels)
    figure.savefig(file, format="png")


def limits(curves: Sequence[tuple[np.ndarray, np.ndarray]], target: float) -> tuple[float, float]:
    """The part where runs differ: from the lowest loss to the highest one after a sixth of the way.

    curves: (what was spent, loss) of each run.
    """
    start = 1 / 6 * max(float(x[-1]) for x, _ in curves)
    late = [loss[(x >= start) & np.isfinite(loss)] for x, loss in curves]
    late = np.concatenate([*late, [target]])
    margin = 0.06 * (late.max() - late.min() or 1.0)
    return late.min() - margin, late.max() + margin


def _label_ends(axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names the lines right of the axes, at the height of their ends, moved apart where they would touch."""
    low, high = axes.get_ylim()
    gap = 0.105 * (high - low)  # two lines of text
    rising = sorted(labels, key=lambda label: label[1])
    ends = np.clip([height for _, height, _, _ in rising], low, high)
    x = 1.035 * axes.get_xlim()[1]
    for y, end_y, (end_x, _, text, colour) in zip(spread(ends, gap), ends, rising, strict=True):
        axes.annotate(
            text,
            xy=(end_x, end_y),
            xytext=(x, y),
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            parse_math=False,  # a $ in a name is a $
            arrowprops=ARROW | {"color": colour},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as need be to lie at least `gap` apart.

    Neighbours that touch become a group around the mean of their places; groups that touch are merged.
    """
    groups: list[list[float]] = []
    bottom = lambda g: np.mean(g) - gap * (len(g) - 1) / 2  # noqa: E731
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [float(bottom(g) + gap * i) for g in groups for i in range(len(g))]
