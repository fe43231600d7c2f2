"""The losses of a search's candidates, and the best of them so far."""

import pathlib

import numpy as np
from matplotlib.figure import Figure

from lmboost import places
from lmboost.run import lines


def plot(log: pathlib.Path, path: pathlib.Path) -> None:
    """Draws candidates.jsonl."""
    losses = np.array([line["loss"] for line in lines.read(log, "a candidate", {"loss": float | None})], float)
    count, best = np.arange(1, len(losses) + 1), np.fmin.accumulate(losses)
    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(count, losses, ".", color="#999999", ms=4, zorder=1)
    axes.step(count, best, color="#0072B2", lw=1.8, where="post")
    axes.annotate(f"best: {best[-1]:.3f}", (count[-1], best[-1]), (8, 0), textcoords="offset points", color="#0072B2",
                  va="center")  # fmt: skip
    low, high = best[-1], float(np.nanquantile(losses, 0.95))
    axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axes.set_xlabel("Candidates")
    axes.set_ylabel("Validation loss of the untrained cut (nats per token)")
    axes.set_title("Search: every candidate (grey) and the best so far", loc="left", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    with places.whole_file(path) as partial, partial.open("wb") as file:
        figure.savefig(file, format="png")
