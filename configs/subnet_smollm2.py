"""Where to Begin (arXiv 2510.07227) with SmolLM2: a model of SmolLM2-360M's size, cut out of SmolLM2-1.7B.

Commands, once the data is prepared with SmolLM2's tokenizer and SmolLM2-1.7B is in a Hub directory:
  python -m lmboost.train --config=configs/subnet_smollm2.py:scratch --config.data.train=DATA --workdir=RUNS/scratch
  python -m lmboost.search --config=configs/subnet_smollm2.py --config.init.path=hf:smollm2-1.7b \\
    --config.data.train=DATA --workdir=RUNS/search
  python -m lmboost.train --config=RUNS/search/winner.py --config.teacher.path=hf:smollm2-1.7b --workdir=RUNS/searched

Variants: the arms of configs/subnet_pythia_410m.py, (none), nokd, cut, distil, scratch, parent, and tiny; 135m beside
an arm (as in :cut,135m) makes a model of SmolLM2-135M's size.

The paper has no SmolLM2: all here is chosen, and there is no published figure to expect. The bin is the plain model's
size, 5% to each side. The plain models have more layers than the parent (32 and 30, it has 24) and share
key/value heads (it does not), so the variant cut is wider instead. Peak learning rate 3e-3, as SmolLM-135M was
trained with; rows of 2,048 and 2M tokens in a step as for Pythia.

Cost (benchmarks/results/subnet_costs.md): 2.4e19 FLOP for the student, 3.6e19 for its teacher, 1.2e17 for the search,
about 3 hours on a v5e-64 at 45% MFU [derived]: 2.4 times the plain run at the same tokens.
"""

from subnet_pythia_410m import recipe, shape, split

VARIANTS = ("scratch", "distil", "cut", "nokd", "parent", "135m", "tiny")


def parent(variant=""):
    """The model that a variant's --config.init.path and --config.teacher.path are."""
    return shape("smollm2-1.7b", split(variant, VARIANTS, ("135m",))[0])


def get_config(variant=""):
    arms, sizes = split(variant, VARIANTS, ("135m",))
    if sizes:
        plain = "smollm2-135m"
        cut = {"num_layers": 24, "d_model": 576, "num_heads": 9, "num_kv_heads": 9, "head_dim": 64, "mlp_dim": 1792}
        space = {
            "params": "134.5M+-5%", "layers": "12-24:2", "d_model": "256-1024:64", "num_kv_heads": "3-24:3",
            "head_dim": "32,64", "mlp_dim": "512-4096:256",
        }  # fmt: skip
    else:
        plain = "smollm2-360m"
        cut = {"num_layers": 24, "d_model": 1024, "num_heads": 16, "num_kv_heads": 16, "head_dim": 64, "mlp_dim": 2816}
        space = {
            "params": "361.8M+-5%", "layers": "12-24:2", "d_model": "512-2048:128", "num_kv_heads": "8-32:4",
            "head_dim": "32,64", "mlp_dim": "1024-8192:256",
        }  # fmt: skip
    return recipe(arms, parent(variant), plain, cut, space, learning_rate=3e-3)
