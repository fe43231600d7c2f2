"""LET (arXiv 2602.05393): a 7B model, whose middle layer is guided by the last layer of Llama-3.2-1B.

Command, once the Pile is prepared with the teacher's tokenizer and the teacher is converted:
  python -m lmboost.train --config=configs/let_7b.py --config.data.train=PILE \\
    --config.teacher.path=MODELS/llama-3.2-1b --workdir=RUNS/let-7b

Variants: (none) LET; paper: with the paper's own weight and layer; plain: no teacher; salt, rkd: soft labels early,
or to the end; teacher: a model of the teacher's shape on this data. With ",tiny" (as in :salt,tiny) the same switches
at a size that runs in seconds on a CPU.

Expected (second hand: reviews), average of 9 one-shot tasks: plain 43.3, rkd 42.2, salt 44.7, LET 45.5, LET at 67% of
the steps 43.9; plain's loss in 1.56 times fewer steps.

From the paper: LLaMA style, the Pile, about 20B tokens, AdamW and cosine, bfloat16, the teacher's last layer, a weight
that falls linearly to 0. On the weight and its end (ratio 2 at half the depth until the teacher's lead is used up;
plain 0.1 at the 3rd layer until 30% in :paper) and on what is chosen (batch, learning rate, w) see configs/let_1p4b.py;
chosen besides: Llama 7B's layers, and tied embeddings, since the teacher's 128,256 tokens would otherwise make it 7.5B.

Cost (6 N D, and the teacher's 2 N D): 8.5e20 FLOP, about 10 hours on a v5e-256 at 45% MFU [derived].
"""

from lmboost import config
from lmboost.models.presets import preset, tiny

VARIANTS = ("paper", "plain", "salt", "rkd", "teacher", "tiny")


def get_config(variant=""):
    v = config.variants(variant, VARIANTS)
    model = preset("llama-3.2-1b" if "teacher" in v else "let-7b", vocab_multiple=128, remat="full", dtype="bfloat16")

    c = config.base()
    c.steps, c.batch_size, c.seq_len = 19_000, 512, 2048
    c.model = config.model(tiny(model, 2 if "teacher" in v else 4) if "tiny" in v else model)
    if v & {"salt", "rkd"}:
        kd = c.objective.kd
        kd.weight, kd.temperature = 0.5, 1.0
        kd.handover, kd.stop = ("constant", 1.0) if "rkd" in v else ("hard", 0.3)
    elif not v & {"plain", "teacher"}:
        align = c.objective.align
        align.weight, align.scale, align.pairs, align.stop = (
            (0.1, "plain", "3:last", 0.3) if "paper" in v else (2.0, "ratio", "half:last", "auto")
        )
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 3e-4, 500
    c.mesh.data, c.mesh.fsdp = (1, -1) if "tiny" in v else (-1, 16)
    if "tiny" in v:
        config.shrink(c)
    return c
