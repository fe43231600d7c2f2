"""The whole idea in minutes on a laptop: a small student alone, its smaller teacher, and the student with help.

Commands, once some text is prepared with a vocabulary of 2,048:
  python -m lmboost.train --config=configs/quickstart.py:plain --config.data.train=DATA --workdir=RUNS/plain
  python -m lmboost.train --config=configs/quickstart.py:teacher --config.data.train=DATA --workdir=RUNS/teacher
  python -m lmboost.train --config=configs/quickstart.py:helped --config.data.train=DATA \\
    --config.teacher.path=RUNS/teacher --workdir=RUNS/helped

Variants: helped (and none): soft labels and alignment until the teacher's lead is used up; plain: no teacher; teacher:
the small model, which sees as many tokens. With ",tiny" (as in :helped,tiny) the same switches in seconds.

The teacher ends worse than the plain student does, as in the papers: what is asked is whether a model that will be
passed is a help on the way. benchmarks/results/quickstart.md has three seeds, and an untrained teacher as control.

The optimizer is the plain run's (seed 0, final loss): Muon with a peak of 8e-3 that falls linearly to 0, without weight
decay, after a warm-up of 50 steps 3.726, of 200 steps 3.738, with twice the rate 3.713; AdamW at 4e-3 likewise 4.335.

Hardware: two CPU cores, some minutes for each run.
"""

from lmboost import config
from lmboost.models.model_config import ModelConfig
from lmboost.models.presets import tiny

VARIANTS = ("helped", "plain", "teacher", "tiny")

# 1.18M parameters besides the embedding; the teacher has half as many.
STUDENT = ModelConfig(
    vocab_size=2048, num_layers=6, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=344, max_seq_len=128,
    qk_norm="head", tie_embeddings=True, dtype="float32", remat="dots",
)  # fmt: skip
TEACHER = {"num_layers": 4, "d_model": 96, "num_heads": 3, "num_kv_heads": 3, "mlp_dim": 256}


def get_config(variant=""):
    v = config.variants(variant, VARIANTS)

    c = config.base()
    c.steps, c.batch_size, c.seq_len = 700, 8, 128
    c.objective.block_tokens = 512
    c.model = config.model(STUDENT, **(TEACHER if "teacher" in v else {}))
    if not v & {"plain", "teacher"}:
        kd, align = c.objective.kd, c.objective.align
        kd.weight, kd.temperature, kd.handover, kd.stop = 0.5, 1.0, "linear", "auto"
        align.weight, align.scale, align.pairs, align.stop = 2.0, "ratio", "half:last", "auto"
        c.teacher.dtype = "float32"
    c.optimizer.update({"name": "muon", "learning_rate": 8e-3, "schedule": "linear", "final_fraction": 0.0})
    c.optimizer.update({"warmup_steps": 50, "b2": 0.98, "weight_decay": 0.0})
    c.checkpoint.every, c.eval.every, c.eval.batches = 350, 50, 16
    if "tiny" in v:
        c.model = config.model(tiny(STUDENT, layers=2 if "teacher" in v else 4))
        config.shrink(c)
    return c
