"""Which layers attend with rank one: rank and column mass of every head as a table, numbers and a plot.

    python -m lmboost.rank --checkpoint=RUN_OR_CHECKPOINT_OR_hf:DIR --out=DIR [--data=DIR]

How they are measured, and what they say about how many layers to inherit: surgery/attention_rank.py.
"""

import argparse
import json
import os
import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure

from lmboost import places, sharding
from lmboost.checkpoint import Saved
from lmboost.data import loader
from lmboost.errors import UserError, count, run_flags
from lmboost.surgery import attention_rank

COLOURS = ("#0072B2", "#D55E00")


def write(checkpoint: str, out: str, data: str = "", step: int = -1, rows: int = 100, tokens: int = 100) -> None:
    """Measures `rows` sequences of `tokens` tokens; writes OUT/rank.md, OUT/rank.json and OUT/rank.png.

    data: empty is what the model was validated on; the sequences are the first of its validation split.

    Raises a UserError where layers have unequal numbers of heads: there is no table of them.
    """
    count("--rows", rows)
    count("--tokens", tokens, 2)
    saved = Saved.find(checkpoint, step)
    model = saved.model_for(dtype="float32")
    if len(heads := {sizes.num_heads for sizes in model.sizes}) > 1:
        raise UserError(
            f"--checkpoint={checkpoint!r} has layers of {', '.join(map(str, sorted(heads)))} heads "
            f"(layer_sizes={model.layer_sizes!r}), and ranks are compared between layers of equally many: measure the "
            "model that it was cut from."
        )
    spec = saved.data_or_own(data)
    saved.check_tokenizer(loader.info(spec, "validation"))
    # One device: decompositions on several CPU devices at once can wait for each other for ever (jaxlib 0.10.2).
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        ranks = attention_rank.measure(model, saved.load(mesh), sequences(spec, rows, tokens))
    directory = pathlib.Path(os.path.expanduser(out))
    directory.mkdir(parents=True, exist_ok=True)
    numbers = {"rank": ranks.rank.tolist(), "columns": ranks.columns.tolist(), "lazy": ranks.lazy}
    places.write(directory / "rank.json", json.dumps(numbers, indent=1))
    text = table(ranks, rows, tokens)
    places.write(directory / "rank.md", text)
    plot(ranks, directory / "rank.png")
    print(text)


def sequences(spec: str, rows: int, tokens: int) -> np.ndarray:
    """The first `rows` stretches of `tokens` tokens [rows, tokens] of a validation split that lie in one document."""
    found, length = [], 1 << (tokens - 1).bit_length()  # rows whose length divides that of the records
    for batch in loader.Loader(spec, "validation", length).eval_batches(16):
        segments = batch["segment_ids"][:, :tokens]
        whole = (segments == segments[:, :1]).all(1) & (segments[:, 0] > 0)
        found += list(batch["tokens"][whole, :tokens])
        if len(found) >= rows:
            return np.stack(found[:rows])
    raise UserError(
        f"--rows={rows}, --tokens={tokens}: the validation split of {spec!r} has {len(found)} stretches of that length "
        "in one document. Ask for fewer or shorter ones."
    )


def table(ranks: attention_rank.Ranks, rows: int, tokens: int) -> str:
    """Markdown: a line for each layer, and how many layers to inherit."""
    share = f"{attention_rank.SHARE:.2f} of the squared norm"
    lines = [f"Over {rows} sequences of {tokens} tokens; k* and m* hold {share}.", ""]
    lines += ["| layer | MaxRank (largest k*) | mean k* | mean m* | |", "|--:|--:|--:|--:|:--|"]
    for layer, (k, m) in enumerate(zip(ranks.rank, ranks.columns, strict=True)):
        lazy = "lazy" if layer in ranks.lazy else ""
        lines.append(f"| {layer} | {k.max():.2f} | {k.mean():.2f} | {m.mean():.2f} | {lazy} |")
    count = ranks.proposed_layers()
    lines += ["", f"To inherit: layers 0 to {count - 1} ({count} of {len(ranks.rank)}).", ""]
    return "\n".join(lines)


def plot(ranks: attention_rank.Ranks, path: pathlib.Path) -> None:
    """The largest and the mean k* of each layer."""
    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    layers = np.arange(len(ranks.rank))
    for values, name, colour in ((ranks.max_rank, "MaxRank", COLOURS[0]), (ranks.rank.mean(1), "mean k*", COLOURS[1])):
        axes.plot(layers, values, "o-", color=colour, ms=4, lw=1.6)
        axes.annotate(name, (layers[-1], values[-1]), (8, 0), textcoords="offset points", color=colour, va="center")
    for head in ranks.rank.T:
        axes.plot(layers, head, ".", color="#999999", ms=3, zorder=1)
    axes.axhline(1, color="#4d4d4d", lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes.set_xlabel("Layer")
    axes.set_ylabel("Rank that holds 0.90 of the squared norm")
    axes.set_title("Rank of attention: heads (grey), their mean and largest", loc="left", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    with places.whole_file(path) as partial, partial.open("wb") as file:
        figure.savefig(file, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or hf:DIR")
    parser.add_argument("--out", required=True, help="a directory for the table, the numbers and the plot")
    parser.add_argument("--data", default="", help="prepared data; empty is what the model was trained on")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--rows", type=int, default=100, help="sequences that are averaged")
    parser.add_argument("--tokens", type=int, default=100, help="of a sequence")
    run_flags(write, parser)


if __name__ == "__main__":
    main()
