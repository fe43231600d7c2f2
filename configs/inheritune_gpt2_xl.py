"""Inheritune (arXiv 2404.08634): GPT-2 XL's loss with 24 of its 48 layers, which start as its first 24.

Commands, once OpenWebText is prepared with the GPT-2 tokenizer:
  python -m lmboost.train --config=configs/inheritune_gpt2_xl.py:reference --config.data.train=OWT \\
    --workdir=RUNS/xl
  python -m lmboost.train --config=configs/inheritune_gpt2_xl.py --config.data.train=OWT \\
    --config.init.path=RUNS/xl --workdir=RUNS/xl-24

Variants, and what is published and what chosen, as in configs/inheritune_gpt2_medium.py: (none), reference, scratch,
double, shallow, stack, hybrid, half_width, kd, tiny.

Expected, validation loss from the paper (mean of the last 10 evaluations): reference 2.65, scratch 2.69, double 2.62,
Inheritune 2.64, stack 2.65, hybrid 2.64, half_width 2.77.

Cost (6 N D): 2.6e20 FLOP for 24 layers, about 13 hours on a v5e-64 at 45% MFU [derived].
"""

from inheritune_gpt2_medium import VARIANTS, recipe

__all__ = ["VARIANTS", "get_config"]


def get_config(variant=""):
    return recipe(variant, "gpt2-xl", layers=24, learning_rate=1.5e-4)
