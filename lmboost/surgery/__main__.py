"""A small model from a large one.

    python -m lmboost.surgery rank --checkpoint=RUN_OR_hf:DIR --out=DIR      which layers attend with rank one
    python -m lmboost.surgery grow --reference=RUN --config=FILE --workdir=DIR [--config.a.b=VALUE]
                                                                             Inheritune, round after round
    python -m lmboost.surgery inherit --parent=RUN_OR_hf:DIR --layers=0-5,8 --out=DIR
                                                                             a checkpoint with some of its layers

A run can inherit by itself, too: --config.init.path=RUN --config.init.kind=inherit. `VERB --help` says more.
"""

import argparse
import sys
from collections.abc import Sequence

from lmboost import config as configs
from lmboost import rank, rounds
from lmboost.errors import UserError, exit_on_user_error, nearest
from lmboost.surgery import files, inherit


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("--help", "-h"):
        sys.exit(print(__doc__))
    verb, *rest = argv
    if verb not in VERBS:
        raise UserError(f"lmboost.surgery {verb!r} is not known{nearest(verb, VERBS)}: expected {' or '.join(VERBS)}.")
    VERBS[verb](rest)


def _rank(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("lmboost.surgery rank", description="Rank and column mass of every head.")
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or hf:DIR")
    parser.add_argument("--out", required=True, help="a directory for the table, the numbers and the plot")
    parser.add_argument("--data", default="", help="prepared data; empty is what the model was trained on")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--rows", type=int, default=100, help="sequences that are averaged")
    parser.add_argument("--tokens", type=int, default=100, help="of a sequence")
    rank.write(**vars(parser.parse_args(argv)))


def _grow(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "lmboost.surgery grow", description=rounds.__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--reference", required=True, help="the run or checkpoint that is inherited from")
    parser.add_argument("--first", type=int, default=0, help="layers of the first round; 0 is half of them")
    parser.add_argument("--by", type=int, default=2, help="how many more each round inherits")
    parser.add_argument("--target", type=float, help="the loss to meet; empty is the reference's own on the same rows")
    parser.add_argument("--last", type=int, default=1, help="evaluations at a round's end that are averaged")
    flags, rest = parser.parse_known_args(argv)
    config, workdir = configs.load(rest)
    rounds.grow(config, workdir, **vars(flags))


def _inherit(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("lmboost.surgery inherit", description="A checkpoint with layers of a model.")
    parser.add_argument("--parent", required=True, help="a run, one of its checkpoints, or hf:DIR")
    parser.add_argument("--layers", required=True, help="that are taken, counted from 0, as 0-5,8")
    parser.add_argument("--out", required=True, help="a directory to make")
    parser.add_argument("--fresh", default="", help=f"parts that start at random, of {','.join(inherit.PARTS)}")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--seed", type=int, default=0, help="of the parts that start at random")
    parser.add_argument("--tokenizer", default="", help="empty: the parent's own, beside it or in its data")
    files.write_inherited(**vars(parser.parse_args(argv)))


VERBS = {"rank": _rank, "grow": _grow, "inherit": _inherit}


if __name__ == "__main__":
    argv = [a for a in sys.argv[1:] if a != "--traceback"]
    exit_on_user_error(lambda: main(argv), show_traceback="--traceback" in sys.argv)
