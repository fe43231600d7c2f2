"""Where to Begin (arXiv 2510.07227): a model of Pythia-410M's size, cut out of Pythia-6.9B and helped by it.

Commands, once the Pile is prepared with the GPT-NeoX tokenizer and Pythia-6.9B is in a Hub directory:
  python -m lmboost.train --config=configs/subnet_pythia_410m.py:scratch --config.data.train=PILE --workdir=RUNS/scratch
  python -m lmboost.search --config=configs/subnet_pythia_410m.py --config.init.path=hf:pythia-6.9b \\
    --config.data.train=PILE --workdir=RUNS/search
  python -m lmboost.train --config=RUNS/search/winner.py --config.teacher.path=hf:pythia-6.9b --workdir=RUNS/searched

Variants: (none) the searched cut, helped by its parent; nokd: the same without a teacher; cut: not searched but the
first entries of everything, from --config.init.path=hf:pythia-6.9b, with the teacher; distil: the plain Pythia-410M
from random parameters, with the teacher; scratch: without it. (none) and nokd are what the search reads; its winner.py
holds them with the winner's model and start. 12b beside an arm (as in :cut,12b) takes Pythia-12B as the parent. With
",tiny" the same switches in seconds on a CPU; parent: a model of the parent's shape from random parameters, which
stands in for the published one there (:parent,tiny).

Expected (paper): the validation perplexity of a comparable Pythia for 5.16 times fewer FLOPs at 10B tokens, 1.26 times
fewer at 100B (--config.steps=47684); in the paper's first version, for 9.2 times fewer tokens. These are its best
model's figures; of which size that is, and whether the FLOPs count the teacher and the search, is not known here.

From the paper: the bin of 385.1M to 425.6M parameters, its plain model, the parents, evolutionary search by the
perplexity of the cut before any training, 10B tokens. From its released code: 0.3 CE + 0.7 tau^2 KL, tau 0.9 on both
sides, to the end. From Pythia: rows of 2,048, 2M tokens in a step, Adam (0.9, 0.95), weight decay 0.1, 1% of warm-up,
cosine from 3e-4 to a tenth. Chosen: that Pythia's optimizer serves cuts, too; the search's choices, its numbers of
candidates and rows, and layers of unequal sizes (--config.search.scope=uniform makes the winner a plain GPT-NeoX).

Cost (benchmarks/results/subnet_costs.md): 2.4e19 FLOP for the student, 1.4e20 for its teacher, 1.7e17 for the search,
about 8 hours on a v5e-64 at 45% MFU [derived], 1.2 without the teacher. With it a run costs 6.7 times the plain one at
the same tokens: it pays if it meets the plain run's loss within 15% of them.
"""

import dataclasses

from lmboost import config
from lmboost.models.model_config import ModelConfig
from lmboost.models.presets import preset, tiny

VARIANTS = ("scratch", "distil", "cut", "nokd", "parent", "12b", "tiny")
COMPUTE = {"remat": "dots", "dtype": "bfloat16"}
TOKENS = 10_000_000_000
TINY_SPACE = {
    "params": "0.02M-0.06M", "layers": "1-3:1", "d_model": "16-48:16", "num_kv_heads": "1-2:1", "group_heads": "1-2:1",
    "head_dim": "8,16", "mlp_dim": "32-128:32", "candidates": 16, "population": 8, "elites": 4, "batch": 4, "rows": 8,
}  # fmt: skip


def split(variant: str, known: tuple[str, ...], sizes: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """A variant's arm and tiny, and which of `sizes` it names beside them."""
    words = [word.strip() for word in variant.split(",")]
    return config.variants(",".join(w for w in words if w not in sizes), known), {*words} & {*sizes}


def shape(name: str, arms: set[str]) -> ModelConfig:
    """A parent, or as in a tiny run."""
    model = preset(name, **COMPUTE)
    return tiny(model) if "tiny" in arms else model


def recipe(
    arms: set[str], parent: ModelConfig, plain: str, cut: dict[str, int], space: dict[str, str], learning_rate: float
):
    """One arm of the paper's comparison.

    Args:
      parent: the model that is cut.
      plain: the published model of the bin, by the name of its preset.
      cut: the sizes of the student that has the first entries of everything.
      space: the search's bin and choices.
    """
    plain = preset(plain, **COMPUTE)
    if "tiny" in arms:
        groups = parent.num_heads // parent.num_kv_heads
        cut = {"num_layers": 2, "d_model": 32, "num_heads": 2, "num_kv_heads": 2 // groups, "mlp_dim": 64}
        space = TINY_SPACE if groups > 1 else TINY_SPACE | {"group_heads": ""}
        plain = dataclasses.replace(tiny(plain), **cut | {"num_kv_heads": tiny(plain).num_kv_heads // 2})

    c = config.base()
    c.batch_size, c.seq_len = 1024, 2048
    c.steps = TOKENS // (c.batch_size * c.seq_len)
    c.model = config.model(plain)
    if "cut" in arms:
        c.model, c.init.kind = config.model(parent, **cut), "subnet"
    elif "parent" in arms:
        c.model = config.model(parent)
    if not arms & {"scratch", "nokd", "parent"}:
        kd = c.objective.kd
        kd.weight, kd.ce_weight, kd.temperature, kd.temperature_on = 0.7, 0.3, 0.9, "both"
        kd.handover, kd.stop = "constant", 1.0
    c.search.update(space)
    c.optimizer.learning_rate, c.optimizer.warmup_steps = learning_rate, c.steps // 100
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.checkpoint.every, c.eval.every = 500, 250
    if "tiny" in arms:
        config.shrink(c)
    return c


def parent(variant=""):
    """The model that a variant's --config.init.path and --config.teacher.path are."""
    arms, sizes = split(variant, VARIANTS, ("12b",))
    return shape("pythia-12b" if "12b" in sizes else "pythia-6.9b", arms)


def get_config(variant=""):
    arms, _ = split(variant, VARIANTS, ("12b",))
    large = parent(variant)
    return recipe(
        arms, large, "pythia-410m", learning_rate=3e-4,
        cut={"num_layers": 24, "d_model": 1024, "num_heads": 16, "num_kv_heads": 16, "head_dim": 64, "mlp_dim": 4096},
        space={
            "params": "385.1M-425.6M", "layers": f"12-{large.num_layers}:4", "d_model": "512-2048:256",
            "num_kv_heads": f"4-{large.num_heads}:4", "head_dim": "32,64,128", "mlp_dim": "1024-8192:1024",
        },
    )  # fmt: skip
