"""Where to Begin (arXiv 2510.07227): a model of Pythia-1B's size, cut out of Pythia-6.9B and helped by it.

Commands, once the Pile is prepared with the GPT-NeoX tokenizer and Pythia-6.9B is in a Hub directory:
  python -m lmboost.train --config=configs/subnet_pythia_1b.py:scratch --config.data.train=PILE --workdir=RUNS/scratch
  python -m lmboost.search --config=configs/subnet_pythia_1b.py --config.init.path=hf:pythia-6.9b \\
    --config.data.train=PILE --workdir=RUNS/search
  python -m lmboost.train --config=RUNS/search/winner.py --config.teacher.path=hf:pythia-6.9b --workdir=RUNS/searched

Variants, expectation, and what is published and what chosen, as in configs/subnet_pythia_410m.py: (none), scratch,
distil, cut, nokd, parent, 12b, tiny. The bin is 961.2M to 1062.4M. Pythia-1B has 8 heads of 256, which a parent with
heads of 128 does not have: the variant cut has 16 of these, and as many parameters. The learning rate is that of
Pythia-1B's model card, 3e-4 (its training config says 2.5e-4).

Cost (benchmarks/results/subnet_costs.md): 5.9e19 FLOP for the student, 1.4e20 for its teacher, 3.0e17 for the search,
about 10 hours on a v5e-64 at 45% MFU [derived]: 3.4 times the plain run at the same tokens.
"""

from subnet_pythia_410m import VARIANTS, parent, recipe, split

__all__ = ["VARIANTS", "get_config", "parent"]


def get_config(variant=""):
    arms, _ = split(variant, VARIANTS, ("12b",))
    large = parent(variant)
    return recipe(
        arms, large, "pythia-1b", learning_rate=3e-4,
        cut={"num_layers": 16, "d_model": 2048, "num_heads": 16, "num_kv_heads": 16, "head_dim": 128, "mlp_dim": 8192},
        space={
            "params": "961.2M-1062.4M", "layers": f"12-{large.num_layers}:4", "d_model": "1024-3072:256",
            "num_kv_heads": f"8-{large.num_heads}:4", "head_dim": "64,128", "mlp_dim": "2048-12288:1024",
        },
    )  # fmt: skip
