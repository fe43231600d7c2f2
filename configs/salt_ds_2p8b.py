"""SALT_DS (arXiv 2410.18779): SALT on 2.8B, whose first stage trains on sequences that a 1.5B model picks.

The picked sequences are challenging yet learnable for an *early* checkpoint of the small model; its last
checkpoint is the teacher. Command, once the Pile is prepared with the GPT-NeoX tokenizer (and --record_tokens=10240, a
multiple of 1280):
  python -m lmboost.train --config=configs/salt_ds_2p8b.py:teacher --config.data.train=PILE --workdir=RUNS/salt-1.5b
  python -m lmboost.train --config=configs/salt_ds_2p8b.py --config.data.train=PILE \\
    --config.teacher.path=RUNS/salt-1.5b --config.objective.select.scorer=RUNS/salt-1.5b --workdir=RUNS/salt-ds-2.8b

Variants: (none) SALT_DS; salt: without the selection; plain: no teacher; teacher: the 1.5B model itself, keeping
the early checkpoint. With ",tiny" (as in :plain,tiny) the same switches at a size that runs in seconds on a CPU.

Expected (second hand: reviews): at 70% of the steps at least plain's few-shot average at all steps, 47.32
[derived]; at 8.6B and all steps 52.81, against 52.96 of SALT without selection.

From the paper: 1.5B -> 2.8B on the Pile, batch 2048 x 1280, 208,000 steps, first stage of 36,000, k = 10. Not
published, and chosen here: half of the candidates are kept, tokens outside the scorer's top k are dropped from the
median (others="zero" is the other reading), the early checkpoint is the 26,000th step (an eighth of the run), and
all that configs/salt_2p8b.py lists. The paper selects once beforehand; here every step scores its candidates.

Cost (6 N D, the teacher's and the scorer's 2 N D while they help): 1.0e22 FLOP, about 5 days on a v5e-256 at 45% MFU
[derived].
"""

from lmboost import config
from lmboost.models.presets import preset, tiny

VARIANTS = ("plain", "salt", "teacher", "tiny")
STEPS, STEPS_KD, EARLY = 208_000, 36_000, 26_000


def get_config(variant=""):
    v = config.variants(variant, VARIANTS)
    model = preset("salt-1.5b" if "teacher" in v else "salt-2.8b", vocab_multiple=128, remat="dots", dtype="bfloat16")

    c = config.base()
    c.steps, c.batch_size, c.seq_len = STEPS, 2048, 1280
    c.model = config.model(tiny(model, 2 if "teacher" in v else 4) if "tiny" in v else model)
    if not v & {"plain", "teacher"}:
        kd, select = c.objective.kd, c.objective.select
        kd.weight, kd.temperature, kd.temperature_on = 0.667, 0.25, "teacher"
        kd.handover, kd.stop = "hard", STEPS_KD / STEPS
        select.candidates = 1 if "salt" in v else 2
        select.k, select.stop = 10, STEPS_KD / STEPS
        select.scorer_step = EARLY
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-4, 2000
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.checkpoint.every, c.eval.every = 2000, 2000
    if "teacher" in v:
        c.checkpoint.keep_every = EARLY
    if "tiny" in v:
        config.shrink(c)
        c.checkpoint.every = c.checkpoint.keep_every = 2
        c.objective.select.scorer_step = 2
    return c
