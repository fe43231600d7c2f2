"""lmboost.train with one of its parts harmed, as $HARM says: python -m tests.harm FLAGS...

pace:SECONDS  every step takes so many seconds more
slow:PART     PART (step, save, evaluate) takes three seconds more once, some steps on; $MARK-PROCESS appears then
fail:PROCESS  the process of this number cannot open its data
save:N        the first N saves fail
die:N         one step in N ends some milliseconds later with a SIGKILL, or with a SIGTERM, until $MARK is there
"""

import functools
import os
import pathlib
import random
import signal
import sys
import threading
import time

import jax

from lmboost import evaluate, train
from lmboost.data import loader
from lmboost.errors import UserError, exit_on_user_error
from lmboost.run import checkpointer, processes

CALLED = set()  # names of the harmed parts that the run has called


def paced(part, seconds: float):
    def run(*args, **kwargs):
        time.sleep(seconds)
        return part(*args, **kwargs)

    return run


def slowed(part, calls: int):
    """`part`, which marks its call number `calls` and takes three seconds more."""
    count = 0

    def run(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            pathlib.Path(os.environ["MARK"] + f"-{jax.process_index()}").touch()
            time.sleep(3)
        return part(*args, **kwargs)

    return run


def failing(part, error: Exception, when):
    def run(*args, **kwargs):
        if when():
            raise error
        return part(*args, **kwargs)

    return run


def dying(part, most: int):
    """`part`, of which one call in `most` is followed by death some milliseconds later."""
    draw = random.Random(os.urandom(8))

    def run(*args, **kwargs):
        if draw.random() < 1 / most and not os.path.exists(os.environ.get("MARK", "")):
            end = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            threading.Timer(draw.uniform(0, 0.2), os.kill, (os.getpid(), end)).start()
        return part(*args, **kwargs)

    return run


def replace(owner, name: str, harmful, *arguments) -> None:
    """Puts harmful(part, *arguments) in the place of the part owner.name, and notes that it is called."""
    part = getattr(owner, name)
    harmed = harmful(part, *arguments)

    @functools.wraps(part)
    def run(*args, **kwargs):
        CALLED.add(name)
        return harmed(*args, **kwargs)

    setattr(owner, name, run)


STEP = (processes.Wish, "exchange")  # what the loop calls once a step
SAVE = (checkpointer.ocp.CheckpointManager, "save")
EVALUATE = (evaluate.Validation, "__call__")
DATA = (loader.Loader, "__init__")


def harm(kind: str, what: str) -> str:
    """Harms a part and returns its name."""
    if kind == "fail":
        error = UserError("data.train='/mnt/data': the disk is not there.")
        part, *how = DATA, failing, error, lambda: jax.process_index() == int(what)
    elif kind == "pace":
        part, *how = STEP, paced, float(what)
    elif kind == "die":
        part, *how = STEP, dying, int(what)
    elif kind == "save":
        left = iter(range(int(what)))
        part, *how = SAVE, failing, OSError(28, "No space left on device"), lambda: next(left, None) is not None
    else:
        part, *how = {"save": (SAVE, slowed, 2), "evaluate": (EVALUATE, slowed, 2), "step": (STEP, slowed, 4)}[what]
    replace(*part, *how)
    return part[1]


def main() -> None:
    name = harm(*os.environ["HARM"].split(":"))
    train.main(sys.argv[1:])
    assert name in CALLED, f"the run has ended without {name}: tests/harm.py harms what is no longer used"


if __name__ == "__main__":
    exit_on_user_error(main)
