"""SALT (arXiv 2410.18779): an 8.6B model, helped by a 2.8B one until it has caught up.

Command, once the Pile is prepared with the GPT-NeoX tokenizer (and --record_tokens=10240, a multiple of 1280):
  python -m lmboost.train --config=configs/salt_8p6b.py:teacher --config.data.train=PILE --workdir=RUNS/salt-2.8b
  python -m lmboost.train --config=configs/salt_8p6b.py --config.data.train=PILE \\
    --config.teacher.path=RUNS/salt-2.8b --workdir=RUNS/salt-8.6b

Variants: (none) SALT that ends by itself; paper: as published, until 17% of the steps; plain: no teacher; rkd: the
teacher to the end; teacher: the 2.8B model itself. With ",tiny" (as in :rkd,tiny) the same switches at a size that
runs in seconds on a CPU.

Expected (second hand: reviews): few-shot average 52.96 at all steps, plain's figure reached at 70% of the steps,
28% less wall-clock time.

From the paper: 2.8B -> 8.6B on the Pile, batch 2048 x 1280, 208,000 steps (545B tokens), teacher for the first
36,000, hard hand-over. Not published, and chosen here: layer shapes, tokenizer, optimizer and learning rate,
w = 0.667 and temperature 0.25 of :paper and :rkd. The paper trains on the UL2 mixture; this is its causal part only.
On what is chosen without a variant see configs/salt_2p8b.py.

Cost (6 N D plus the teacher's 2 N D while it helps): 2.9e22 FLOP, about 3 days on a v6e-256 at 45% MFU [derived].
"""

from lmboost import config
from lmboost.models.presets import preset, tiny

VARIANTS = ("paper", "plain", "rkd", "teacher", "tiny")
STEPS, STEPS_KD = 208_000, 36_000


def get_config(variant=""):
    v = config.variants(variant, VARIANTS)
    model = preset("salt-2.8b" if "teacher" in v else "salt-8.6b", vocab_multiple=128, remat="full", dtype="bfloat16")

    c = config.base()
    c.steps, c.batch_size, c.seq_len = STEPS, 2048, 1280
    c.model = config.model(tiny(model, 2 if "teacher" in v else 4) if "tiny" in v else model)
    if not v & {"plain", "teacher"}:
        kd = c.objective.kd
        if v & {"paper", "rkd"}:
            kd.weight, kd.temperature, kd.temperature_on = 0.667, 0.25, "teacher"
            kd.handover, kd.stop = ("constant", 1.0) if "rkd" in v else ("hard", STEPS_KD / STEPS)
        else:
            kd.weight, kd.handover, kd.stop = 0.5, "linear", "auto"
            c.objective.auto.full, c.objective.auto.end = 0.4, 0.1
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-4 if "teacher" in v else 2e-4, 2000
    c.mesh.data, c.mesh.fsdp = (1, -1) if "tiny" in v else (-1, 16)
    c.checkpoint.every, c.eval.every = 2000, 2000
    if "tiny" in v:
        config.shrink(c)
    return c
