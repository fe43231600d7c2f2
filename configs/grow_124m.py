"""A GPT-2-sized model that grows in depth within its run: the claims of three papers, a variant each.

Commands (text like FineWeb, prepared with GPT-2's tokenizer, TOKENIZER/tokenizer.json, --record_tokens=16384):
  python -m lmboost.train --config=configs/grow_124m.py:one --config.data.train=TEXT --workdir=RUNS/one
  python -m lmboost.train --config=configs/grow_124m.py --config.data.train=TEXT --config.init.path=RUNS/one \\
    --workdir=RUNS/grown

Variants, each of which goes on from its shallow run as a stage, with its tokens and FLOPs counted on:
  (none)  one layer becomes twelve at 80% of the steps, the new ones random, WSD, the same learning rate
          (arXiv 2511.04981: plain's loss within 0.5% at 124M for a fifth of the FLOPs); after `one`
  stack   three layers, trained for a tenth of the steps to their own end, are put four times on each other, and the
          learning rate rises and falls anew (arXiv 2405.15319: a 7B reaches plain's loss in 65% of the tokens; growth
          by four, early); after `three`
  twice   six layers become twelve at a fifth of the steps, each new one a copy behind the layer that it copies (arXiv
          2605.13405: of the factors of growth only two is reliable); after `six`
  plain   twelve layers from the first step on, with the schedule of (none); linear: with that of the others
With ",tiny" (as in :stack,tiny) the same switches at a size that runs in seconds on a CPU.

Not trained at this size. At 0.1M parameters (benchmarks/track/LOG.md) growth within a run did not pay, neither with the
schedule going on nor with a new rise, by a tuned Muon: these are here to be tried where models are large.

Model FLOPs (lmboost/flops.py), of plain's 2.6e18 [derived]: (none) 0.48, as a vocabulary of 50,257 is 0.29 of plain's
step and there from the first step on; stack 0.95, twice 0.93. The share of steps, the peak of 4e-3 and the
rest of the optimizer are configs/recommended.py's; when to grow by `stack` and `twice` was chosen here.
"""

import os

from lmboost import config

VARIANTS = ("stack", "twice", "one", "three", "six", "plain", "linear", "tiny")

recommended = config.load_module(os.path.join(os.path.dirname(__file__), "recommended.py"))
LAYERS = {"one": 1, "three": 3, "six": 6}
SHARE = {"one": 0.8, "three": 0.1, "six": 0.2}  # of the steps of the whole chain
GROWN = {"": ("one", "random"), "stack": ("three", "stack"), "twice": ("six", "interpose")}


def get_config(variant=""):
    v = config.variants(variant, VARIANTS)
    (arm,) = v - {"tiny"} or {""}

    c = recommended.get_config("plain,tiny" if "tiny" in v else "plain")
    young, c.init.grow = GROWN.get(arm, (arm, ""))
    stands = round(SHARE.get(young, 0) * c.steps)
    if arm in GROWN:
        c.init.kind = "continue"
    if arm in LAYERS:
        c.model.num_layers = 1 if "tiny" in v else LAYERS[arm]
        c.steps = stands
    if young in ("one", "plain"):  # the rate stays until it falls over the last fifth
        c.optimizer.update({"schedule": "constant" if arm == "one" else "wsd", "decay_fraction": 0.2})
    elif arm in GROWN:
        c.optimizer.begin = stands
    c.optimizer.warmup_steps = min(c.optimizer.warmup_steps, c.steps // 2)
    return c
