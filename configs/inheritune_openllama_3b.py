"""Inheritune with little data (arXiv 2404.08634, version 1): the first 13 of OpenLLaMA-3B's 26 layers.

Commands, once 1B tokens of RedPajama (its sample of 1T has that many) are prepared with OpenLLaMA's tokenizer, and
openlm-research/open_llama_3b lies in MODELS as safetensors:
  python -m lmboost.train --config=configs/inheritune_openllama_3b.py:scratch --config.data.train=REDPAJAMA \\
    --workdir=RUNS/scratch-13
  python -m lmboost.train --config=configs/inheritune_openllama_3b.py --config.data.train=REDPAJAMA \\
    --config.init.path=hf:MODELS/open_llama_3b --workdir=RUNS/openllama-13

Variants: (none) Inheritune, everything but the later layers inherited; released: as in the authors' released script,
which leaves the embedding and the final norm at random; scratch: the same model from random parameters. With ",tiny"
(as in :released,tiny) the same switches in seconds on a CPU.

Expected, from the paper: on 9 tasks and MMLU on a par with public models of 1B to 2B that were trained on 50 to 1,000
times more tokens. It gives no validation loss.

From the paper: the sizes (it calls them 1.5B; with embedding and head these are 1,815,638,400 parameters), 1B tokens 8
times over, batches of 131K tokens, learning rate 3e-4. From its released script: weight decay 0.01, 1,000 steps of
warm-up and a constant rate after it, AdamW's b2 of 0.999. Chosen here: clipping at 1. What is prepared decides how
often it is seen: 61,000 steps are 8.0B tokens, each epoch of the data in another order.

Cost (6 N D): 8.7e19 FLOP, about 4 hours on a v5e-64 at 45% MFU [derived].
"""

from lmboost import config
from lmboost.models.presets import preset, tiny

VARIANTS = ("scratch", "released", "tiny")


def get_config(variant=""):
    v = config.variants(variant, VARIANTS)
    model = preset("openllama-3b", num_layers=13, remat="dots", dtype="bfloat16")

    c = config.base()
    c.steps, c.batch_size, c.seq_len = 61_000, 64, 2048
    c.model = config.model(tiny(model, 2) if "tiny" in v else model)
    if "scratch" not in v:
        c.init.kind, c.init.fresh = "inherit", "embedding,final_norm" if "released" in v else ""
    c.optimizer.learning_rate, c.optimizer.schedule, c.optimizer.warmup_steps = 3e-4, "constant", 1000
    c.optimizer.weight_decay, c.optimizer.b2 = 0.01, 0.999
    c.mesh.data, c.mesh.fsdp = -1, 8
    c.checkpoint.every, c.eval.every = 2000, 1000
    if "tiny" in v:
        config.shrink(c)
        c.mesh.fsdp = 1
    return c
