"""The whole idea in minutes on a laptop: a small student alone, its smaller teacher, and the student with help.

Commands, once some text is prepared with a vocabulary of 2,048:
  python -m lmboost.train --config=configs/quickstart.py:plain --config.data.train=DATA --workdir=RUNS/plain
  python -m lmboost.train --config=configs/quickstart.py:teacher --config.data.train=DATA --workdir=RUNS/teacher
  python -m lmboost.train --config=configs/quickstart.py:helped --config.data.train=DATA \\
    --config.teacher.from=RUNS/teacher --workdir=RUNS/helped

Variants: helped (and none): soft labels and alignment through the first 30% of the steps; plain: no teacher; teacher:
the small model. With ",tiny" (as in :helped,tiny) the same switches in seconds.

Expected (our toy pilots: 1,500 steps of source code and plays, throw-away code, seed noise 0.01), with a teacher worse
than the plain student's end: plain 3.59 to 3.60 nats per token; soft labels alone 3.49 to 3.50 in 0.77 of the steps;
alignment alone 3.39 to 3.41 in 0.65 of the steps. With a strong teacher, both together 3.23 in 0.51 of the steps.

Hardware: two CPU cores, some minutes for each run.
"""

from lmboost import config
from lmboost.models.presets import tiny
from lmboost.models.transformer import ModelConfig

VARIANTS = ("helped", "plain", "teacher", "tiny")

# 1.18M parameters besides the embedding; the teacher has half as many.
STUDENT = ModelConfig(
    vocab_size=2048, num_layers=6, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, mlp_dim=344, max_seq_len=128,
    tie_embeddings=True, dtype="float32", remat="dots",
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
        kd.weight, kd.temperature, kd.handover, kd.stop = 0.5, 1.0, "hard", 0.15
        align.weight, align.scale, align.pairs, align.stop = 2.0, "ratio", "half:last", 0.6
        c.teacher.dtype = "float32"
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 4e-3, 50
    c.checkpoint.every, c.eval.every, c.eval.batches = 350, 50, 16
    if "tiny" in v:
        c.model = config.model(tiny(STUDENT, layers=2 if "teacher" in v else 4))
        c.steps, c.batch_size, c.seq_len, c.optimizer.warmup_steps = 8, 8, 64, 2
        c.checkpoint.every, c.eval.every, c.eval.batches, c.log.every = 4, 4, 2, 1
    return c
