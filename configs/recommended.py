"""What the track found best, at 124M parameters: a recipe to begin one's own with, and the track's tier for a GPU.

Commands, once text like FineWeb is prepared with GPT-2's tokenizer (TOKENIZER/tokenizer.json, --record_tokens=16384):
  python -m lmboost.train --config=configs/recommended.py:shallow --config.data.train=TEXT --workdir=RUNS/6-layers
  python -m lmboost.train --config=configs/recommended.py --config.data.train=TEXT \\
    --config.init.path=RUNS/6-layers --workdir=RUNS/124m

Variants: (none) begins with the layers of a model of half the depth that is at hand, each twice; guided: from scratch,
a smaller model of any shape that is at hand is its guide until its lead is used up (--config.teacher.path=RUNS/small);
inherit: begins with 12 of the 18 layers of a deeper one, from all of its depth (--config.init.path=RUNS/deep), and then
two fifths of the steps may be enough (--config.steps=2480); plain: none of these; shallow, teacher, reference: the
models of half the depth, the smaller and the deeper one themselves. With ",tiny" (as in
:guided,tiny) the same switches at a size that runs in seconds on a CPU.

Measured at 0.1M and 0.4M parameters, not at this size (benchmarks/track/results): docs/methods/index.md has the table,
what it rests on, and what other help there is. Any decoder takes the place of this one: the fields of `model`, and as
many steps as it is to have; a run that begins with another's layers needs fewer.

The optimizer is the one that plain runs of the track were best with: Muon, a rate that falls linearly to 0, b2 = 0.98,
no weight decay (3B tokens are not many). Chosen here, and not tuned at this size: a peak of 4e-3, half of the track's;
the teacher's shape, two fifths of the student's parameters, since a tenth was no help and a fifth hardly.

Target: a validation loss of 3.28 on FineWeb, which public 124M runs of Muon reach after some 3.2B tokens [second
hand]; the question is who reaches it in fewer FLOPs. Cost of plain (model FLOPs, lmboost/flops.py): 2.6e18, 2 hours on
an H100 at 40% of its bfloat16 peak; shallow 1.7e18 and the teacher 1.1e18 once; a guide adds 3% [derived]. A batch in
16 parts is for one GPU of 80 GB; with eight of them --config.accumulation=2.
"""

from lmboost import config
from lmboost.models.model_config import ModelConfig
from lmboost.models.presets import tiny

VARIANTS = ("guided", "inherit", "plain", "shallow", "teacher", "reference", "tiny")

STUDENT = ModelConfig(
    vocab_size=50257, vocab_multiple=128, num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, mlp_dim=2048,
    max_seq_len=1024, qk_norm="head", tie_embeddings=True, dtype="bfloat16", remat="dots",
)  # fmt: skip
OTHERS = {
    "shallow": {"num_layers": 6},
    "teacher": {"num_layers": 8, "d_model": 512, "num_heads": 8, "num_kv_heads": 8, "mlp_dim": 1376},
    "reference": {"num_layers": 18},
}


def get_config(variant=""):
    v = config.variants(variant, VARIANTS)
    (arm,) = v - {"tiny"} or {""}

    c = config.base()
    c.steps, c.batch_size, c.seq_len, c.accumulation = 6200, 512, 1024, 16
    c.model = config.model(STUDENT, **OTHERS.get(arm, {}))
    c.init.kind = {"": "stack", "inherit": "inherit"}.get(arm, "copy")
    c.init.layers = "0-2,4,6,8,10,12,14-17" if arm == "inherit" else ""
    if arm == "guided":
        align = c.objective.align
        align.weight, align.scale, align.pairs, align.stop = 2.0, "ratio", "half:last", "auto"
    c.optimizer.update({"name": "muon", "learning_rate": 4e-3, "schedule": "linear", "final_fraction": 0.0})
    c.optimizer.update({"b2": 0.98, "weight_decay": 0.0, "warmup_steps": 310})
    c.checkpoint.every, c.eval.every = 620, 310
    if "tiny" in v:
        c.model = config.model(tiny(ModelConfig(**c.model), layers={"shallow": 1, "reference": 4}.get(arm, 2)))
        config.shrink(c)
        c.accumulation, c.init.layers = 1, "0,3" if arm == "inherit" else ""
    return c
