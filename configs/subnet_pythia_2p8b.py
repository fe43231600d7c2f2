"""Where to Begin (arXiv 2510.07227): a model of Pythia-2.8B's size, cut out of Pythia-6.9B and helped by it.

Commands, once the Pile is prepared with the GPT-NeoX tokenizer and Pythia-6.9B is in a Hub directory:
  python -m lmboost.train --config=configs/subnet_pythia_2p8b.py:scratch --config.data.train=PILE --workdir=RUNS/scratch
  python -m lmboost.search --config=configs/subnet_pythia_2p8b.py --config.init.path=hf:pythia-6.9b \\
    --config.data.train=PILE --workdir=RUNS/search
  python -m lmboost.train --config=RUNS/search/winner.py --config.teacher.path=hf:pythia-6.9b --workdir=RUNS/searched

Variants, expectation, and what is published and what chosen, as in configs/subnet_pythia_410m.py: (none), scratch,
distil, cut, nokd, parent, 12b, tiny. The bin is 2636M to 2914M. Pythia-2.8B has 32 heads of 80, whose rotary
frequencies are not among those of the parent's heads of 128: the variant cut has 20 of these, and as many parameters.
The learning rate is Pythia-2.8B's, 1.6e-4.

Cost (benchmarks/results/subnet_costs.md): 1.7e20 FLOP for the student, 1.4e20 for its teacher, 4.6e17 for the search,
about 15 hours on a v5e-64 at 45% MFU [derived]: 1.8 times the plain run at the same tokens.
"""

from subnet_pythia_410m import VARIANTS, parent, recipe, split

__all__ = ["VARIANTS", "get_config", "parent"]


def get_config(variant=""):
    arms, _ = split(variant, VARIANTS, ("12b",))
    large = parent(variant)
    return recipe(
        arms, large, "pythia-2.8b", learning_rate=1.6e-4,
        cut={"num_layers": 32, "d_model": 2560, "num_heads": 20, "num_kv_heads": 20, "head_dim": 128, "mlp_dim": 10240},
        space={
            "params": "2636M-2914M", "layers": f"16-{large.num_layers}:4", "d_model": "2048-4096:256",
            "num_kv_heads": f"8-{large.num_heads}:4", "head_dim": "64,128", "mlp_dim": "4096-16384:1024",
        },
    )  # fmt: skip
