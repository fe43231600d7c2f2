"""Inheritune (arXiv 2404.08634): GPT-2 medium's loss with 16 of its 24 layers, which start as its first 16.

Commands, once OpenWebText is prepared with the GPT-2 tokenizer:
  python -m lmboost.train --config=configs/inheritune_gpt2_medium.py:reference --config.data.train=OWT \\
    --workdir=RUNS/medium
  python -m lmboost.train --config=configs/inheritune_gpt2_medium.py --config.data.train=OWT \\
    --config.init.path=RUNS/medium --workdir=RUNS/medium-16
Where the depth is not known beforehand, the rounds of the paper (12 layers, 14, ... until the reference is met):
  python -m lmboost.rounds --config=configs/inheritune_gpt2_medium.py --config.data.train=OWT \\
    --reference=RUNS/medium --workdir=RUNS/grown --last=10

Variants: (none) Inheritune; reference: all layers, from scratch; scratch: 16 layers, from scratch; double: the same for
twice the steps; shallow: half of the 16, and stack: these twice, from --config.init.path=RUN of shallow; hybrid: the
reference's first layers twice, from the reference; half_width: all layers with half of the heads and MLP; kd: scratch
with the reference as teacher to the end. With ",tiny" (as in :hybrid,tiny) the same switches in seconds on a CPU.

Expected, validation loss from the paper (mean of the last 10 evaluations, noise 0.01 to 0.03): reference 2.81, scratch
2.86, double 2.83, Inheritune 2.81, stack 2.84, hybrid 2.83, half_width 3.04.

From the paper: OpenWebText, 100,000 steps of rows of 1,024, AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, 2,000
steps of warm-up, cosine from 3e-4 to 1e-5; attention logits scaled by 1 / (layer + 1); kd with alpha 0.6. Not
published, and chosen here: the batch of 512 rows. Everything is inherited here; the authors' released script leaves
the position embedding and the final norm at random (--config.init.fresh=positions,final_norm).

Cost (6 N D): 8.0e19 FLOP for 16 layers, about 4 hours on a v5e-64 at 45% MFU [derived].
"""

from lmboost import config
from lmboost.models.presets import preset, tiny

VARIANTS = ("reference", "scratch", "double", "shallow", "stack", "hybrid", "half_width", "kd", "tiny")


def recipe(variant: str, name: str, layers: int, learning_rate: float):
    """The paper's arms for a GPT-2 that is cut to `layers` layers."""
    v = config.variants(variant, VARIANTS)
    model = preset(name, vocab_multiple=128, remat="dots", dtype="bfloat16", scale_attn_by_layer=True)
    layers, depth = (2, 4) if "tiny" in v else (layers, model.num_layers)
    model = tiny(model, depth) if "tiny" in v else model
    sizes = {"num_layers": layers // 2 if "shallow" in v else depth if v & {"reference", "half_width"} else layers}
    if "half_width" in v:
        sizes |= {k: getattr(model, k) // 2 for k in ("num_heads", "num_kv_heads", "mlp_dim")}

    c = config.base()
    c.steps, c.batch_size, c.seq_len = 200_000 if "double" in v else 100_000, 512, 1024
    c.model = config.model(model, **sizes)
    if v <= {"tiny"}:
        c.init.kind = "inherit"
    elif v & {"stack", "hybrid"}:
        c.init.kind, c.init.layers = "stack", f"0-{layers // 2 - 1}"
    elif "kd" in v:
        c.objective.kd.weight, c.objective.kd.handover, c.objective.kd.stop = 0.6, "constant", 1.0
    c.optimizer.learning_rate, c.optimizer.warmup_steps = learning_rate, 2000
    c.optimizer.final_fraction = 1e-5 / learning_rate
    c.mesh.data, c.mesh.fsdp = -1, 8
    c.checkpoint.every, c.eval.every = 2000, 1000
    if "tiny" in v:
        config.shrink(c)
        c.mesh.fsdp = 1
    return c


def get_config(variant=""):
    return recipe(variant, "gpt2-medium", layers=16, learning_rate=3e-4)
