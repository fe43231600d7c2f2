"""Inheritune (arXiv 2404.08634): GPT-2 large's loss with 18 of its 36 layers, which start as its first 18.

Commands, once OpenWebText is prepared with the GPT-2 tokenizer:
  python -m lmboost.train --config=configs/inheritune_gpt2_large.py:reference --config.data.train=OWT \\
    --workdir=RUNS/large
  python -m lmboost.train --config=configs/inheritune_gpt2_large.py --config.data.train=OWT \\
    --config.init.path=RUNS/large --workdir=RUNS/large-18

Variants, and what is published and what chosen, as in configs/inheritune_gpt2_medium.py: (none), reference, scratch,
double, shallow, stack, hybrid, half_width, kd, tiny.

Expected, validation loss from the paper (mean of the last 10 evaluations): reference 2.85, scratch 2.97, double 2.84,
Inheritune 2.80, stack 2.87, hybrid 2.89, half_width 3.06.

Cost (6 N D): 1.3e20 FLOP for 18 layers, about 6 hours on a v5e-64 at 45% MFU [derived].
"""

from inheritune_gpt2_medium import VARIANTS, recipe

__all__ = ["VARIANTS", "get_config"]


def get_config(variant=""):
    return recipe(variant, "gpt2-large", layers=18, learning_rate=2e-4)
