"""The whole idea in minutes on a laptop: a small student alone, its smaller teacher, and the student with help.

Commands, once some text is prepared with a vocabulary of 2,048:
  python -m lmboost.train --config=configs/quickstart.py:plain --config.data.train=DATA --workdir=RUNS/plain
  python -m lmboost.train --config=configs/quickstart.py:teacher --config.data.train=DATA --workdir=RUNS/teacher
  python -m lmboost.train --config=configs/quickstart.py:helped --config.data.train=DATA \\
    --config.teacher.path=RUNS/teacher --workdir=RUNS/helped

Variants: helped (and none): soft labels and alignment through the first half of the steps; plain: no teacher; teacher:
the small model, trained twice as long, since it is there to be used again. With ",tiny" (as in :helped,tiny) the same
switches in seconds.

Measured over three seeds (benchmarks/results/quickstart.md): helped reaches the plain run's final loss at 0.65 to 0.69
of its tokens, with an untrained teacher at 0.93 or later. The teacher ends at 3.78 to 3.83, better than the plain
student and worse than the helped one. What else was tried (seed 0, the standard library of Python 3.11, two CPU
cores): help from the same teacher after as many steps as the student's (4.08, worse than the plain run's 4.03) reaches
plain's final loss at 0.75 of its tokens, and only if it ends early: kd at 10%, alignment at 45%; to 90% it is 0.83.

Query and key norms, b2 = 0.98 and a long warm-up are there for the plain run's sake: with b2 = 0.95, a warm-up of 50
steps and no such norms it ends at 4.21, and then anything that holds back the first steps helps, an untrained
teacher almost as much as a trained one.

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
    c.steps, c.batch_size, c.seq_len = 1400 if "teacher" in v else 700, 8, 128
    c.objective.block_tokens = 512
    c.model = config.model(STUDENT, **(TEACHER if "teacher" in v else {}))
    if not v & {"plain", "teacher"}:
        kd, align = c.objective.kd, c.objective.align
        kd.weight, kd.temperature, kd.handover, kd.stop = 0.5, 1.0, "hard", 0.5
        align.weight, align.scale, align.pairs, align.stop = 2.0, "ratio", "half:last", 0.5
        c.teacher.dtype = "float32"
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.b2 = 4e-3, 200, 0.98
    c.checkpoint.every, c.eval.every, c.eval.batches = 350, 50, 16
    if "tiny" in v:
        c.model = config.model(tiny(STUDENT, layers=2 if "teacher" in v else 4))
        config.shrink(c)
    return c
