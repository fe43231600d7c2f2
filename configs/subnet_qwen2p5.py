"""Where to Begin (arXiv 2510.07227) with Qwen2.5: a model of Qwen2.5-0.5B's size, cut out of Qwen2.5-3B.

Commands, once the data is prepared with Qwen2.5's tokenizer and Qwen2.5-3B is in a Hub directory:
  python -m lmboost.train --config=configs/subnet_qwen2p5.py:scratch --config.data.train=DATA --workdir=RUNS/scratch
  python -m lmboost.search --config=configs/subnet_qwen2p5.py --config.init.path=hf:qwen2.5-3b \\
    --config.data.train=DATA --workdir=RUNS/search
  python -m lmboost.train --config=RUNS/search/winner.py --config.teacher.path=hf:qwen2.5-3b --workdir=RUNS/searched

Variants: the arms of configs/subnet_pythia_410m.py, (none), nokd, cut, distil, scratch, parent, and tiny; beside an
arm, 1.5b makes a model of Qwen2.5-1.5B's size, and 7b takes Qwen2.5-7B as the parent (as in :cut,1.5b,7b).

The paper's code cuts Qwen models, too, but not which: all here is chosen, and there is no published figure to expect.
The bin is the plain model's size, 5% to each side. 3B is the parent because it has one matrix for embedding and head,
as the plain models do; 7B has two, of 136M parameters each at the width of the 0.5B model, so its cuts have smaller
layers. Learning rates, which Qwen did not publish, are Pythia's for these sizes; rows of 2,048 and 2M tokens in a step
as for Pythia, too.

Cost (benchmarks/results/subnet_costs.md): 3.2e19 FLOP for the student, 6.5e19 for its teacher, 1.1e17 for the search,
about 5 hours on a v5e-64 at 45% MFU [derived]: 3.0 times the plain run at the same tokens.
"""

from subnet_pythia_410m import recipe, shape, split

VARIANTS = ("scratch", "distil", "cut", "nokd", "parent", "1.5b", "7b", "tiny")
SIZES = ("1.5b", "7b")


def parent(variant=""):
    """The model that a variant's --config.init.path and --config.teacher.path are."""
    arms, sizes = split(variant, VARIANTS, SIZES)
    return shape("qwen2.5-7b" if "7b" in sizes else "qwen2.5-3b", arms)


def get_config(variant=""):
    arms, sizes = split(variant, VARIANTS, SIZES)
    large = parent(variant)
    space = {
        "layers": f"12-{large.num_layers}:4", "num_kv_heads": f"1-{large.num_kv_heads}:1",
        "group_heads": f"3-{large.num_heads // large.num_kv_heads}:1", "head_dim": "64,128",
    }  # fmt: skip
    if "1.5b" in sizes:
        plain, learning_rate = "qwen2.5-1.5b", 2e-4
        cut = {"num_layers": 28, "d_model": 1536, "num_heads": 12, "num_kv_heads": 2, "head_dim": 128, "mlp_dim": 8960}
        smaller = {"num_layers": 24, "mlp_dim": 8448}
        space |= {"params": "1543.7M+-5%", "d_model": "1024-2048:128", "mlp_dim": "4096-11008:256"}
    else:
        plain, learning_rate = "qwen2.5-0.5b", 3e-4
        cut = {"num_layers": 24, "d_model": 896, "num_heads": 14, "num_kv_heads": 2, "head_dim": 64, "mlp_dim": 4864}
        smaller = {"d_model": 768, "num_heads": 12, "mlp_dim": 4096}
        space |= {"params": "494.0M+-5%", "d_model": "512-1280:128", "mlp_dim": "2048-8192:256"}
    return recipe(arms, large, plain, cut | smaller if "7b" in sizes else cut, space, learning_rate)
