"""Searches the part of a trained model that is the best start of a small one ("Where to Begin", arXiv 2510.07227).

    python -m lmboost.search --config=configs/subnet_pythia_410m.py --config.init.path=hf:DIR --workdir=DIR

  --config=FILE[:VARIANT]   the recipe: `init.path` is the model to cut, `search` the cuts to choose from
  --config.a.b=VALUE        overrides one field of it (lmboost/config.py lists all of them)
  --workdir=DIR             where it writes; the same command in the same workdir goes on where it stopped
  --traceback               shows the traceback of a user error

Cuts are compared by their loss on held-out text before any training. WORKDIR/winner.py is the config that trains the
best one; WORKDIR/candidates.jsonl has all of them.
"""

from lmboost import config
from lmboost.errors import run_verb
from lmboost.search import job

if __name__ == "__main__":
    run_verb(lambda argv: job.search(*config.load(argv)), __doc__)
