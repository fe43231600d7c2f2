"""Inheritune's rounds (arXiv 2404.08634, algorithm 1): train, compare with the reference, inherit more, train again.

    python -m lmboost.rounds --config=configs/inheritune_gpt2_medium.py --reference=RUN --workdir=DIR

  --config=FILE[:VARIANT]   the recipe of every round
  --config.a.b=VALUE        overrides one field of it (lmboost/config.py lists all of them)
  --reference=RUN           the run or checkpoint that is inherited from
  --workdir=DIR             where the rounds write
  --first=N                 layers of the first round; 0, the default, is half of the reference's
  --by=2                    how many more each round inherits
  --target=LOSS             the loss to meet; left out, it is the reference's own on the same rows
  --last=1                  evaluations at a round's end that are averaged
  --traceback               shows the traceback of a user error

Round 0 inherits the first layers of the reference, half of them unless told otherwise. While a round's validation loss
is above the reference's on the same data, the next one inherits more of the **reference's** layers (2, as in the
paper) and trains from step 0. Every round is a normal run in DIR/layers-N; the same command goes on where it stopped.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from lmboost import checkpoint, evaluate, places, train
from lmboost import config as configs
from lmboost.errors import UserError, run_verb
from lmboost.run import metrics


def grow(
    config: ConfigDict,
    workdir: str,
    reference: str,
    first: int = 0,
    by: int = 2,
    target: float | None = None,
    last: int = 1,
    say: Callable[[str], None] = print,
) -> int:
    """Runs the rounds; returns how many layers the last one has.

    The config is the recipe of every round; its number of layers and its `init` are set here. What the others are, the
    flags say; noise of an evaluation, over `last` of which is averaged, is 0.01 to 0.03 on OpenWebText.
    """
    depth = checkpoint.Saved.find(reference, field="--reference").model.num_layers
    first = first or -(-depth // 2)
    if not 1 <= first <= depth:
        raise UserError(f"--first={first}: the reference has {depth} layers; give 1 to {depth}, or 0 for half of them.")
    if by < 1:
        raise UserError(f"--by={by} must be at least 1: a round inherits more layers than the one before.")
    if target is None:
        target = reference_loss(config, reference)
    rounds = []
    for layers in (*range(first, depth, by), depth):
        loss = train_round(config, layers, f"{workdir}/layers-{layers}", reference, last)
        say(f"{layers} layers: validation loss {loss:.4f}, to be met: {target:.4f}")
        rounds.append({"layers": layers, "val_loss": loss, "target": target})
        places.write(places.find(workdir) / "rounds.json", json.dumps(rounds, indent=1))
        if loss <= target:
            break
    return layers


def reference_loss(config: ConfigDict, reference: str) -> float:
    """The validation loss of the reference over the rows that every round is validated on."""
    values = evaluate.evaluate(
        reference, config.data.validation or config.data.train, batches=config.eval.batches,
        batch_size=config.batch_size, seq_len=config.seq_len, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
    )  # fmt: skip
    return values["val_loss"]


def train_round(config: ConfigDict, layers: int, workdir: str, reference: str, last: int) -> float:
    """Trains one round, or what is left of it; returns its validation loss."""
    c = ConfigDict(config)
    c.model.num_layers = layers
    c.init.update(path=reference, kind="inherit", layers=f"0-{layers - 1}")
    train.train(c, workdir)
    losses = [line["val_loss"] for line in metrics.read(workdir) if line.get("val_loss") is not None]
    if len(losses) < last:
        raise UserError(f"--last={last}: the round in {workdir} has {len(losses)} evaluations. Lower eval.every.")
    return float(np.mean(losses[-last:]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(configs.Flags):
    """The flags of this verb; the arguments of `grow`."""

    reference: str = configs.required("the run or checkpoint that is inherited from")
    first: int = 0
    by: int = 2
    target: float | None = None
    last: int = 1


def main(argv: Sequence[str]) -> None:
    config, flags = configs.read(argv, Flags)
    grow(config, flags.workdir, flags.reference, flags.first, flags.by, flags.target, flags.last)


if __name__ == "__main__":
    run_verb(main, __doc__)
