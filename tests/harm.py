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


def paced(part, seconds: float):
    @functools.wraps(part)
    def run(*args, **kwargs):
        time.sleep(seconds)
        return part(*args, **kwargs)

    return run


def slowed(part, calls: int):
    """`part`, which marks its call number `calls` and takes three seconds more."""
    count = 0

    @functools.wraps(part)
    def run(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            pathlib.Path(os.environ["MARK"] + f"-{jax.process_index()}").touch()
            time.sleep(3)
        return part(*args, **kwargs)

    return run


def failing(part, error: Exception, when):
    @functools.wraps(part)
    def run(*args, **kwargs):
        if when():
            raise error
        return part(*args, **kwargs)

    return run


def dying(part, most: int):
    """`part`, of which one call in `most` is followed by death some milliseconds later."""
    draw = random.Random(os.urandom(8))

    @functools.wraps(part)
    def run(*args, **kwargs):
        if draw.random() < 1 / most and not os.path.exists(os.environ.get("MARK", "")):
            end = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            threading.Timer(draw.uniform(0, 0.2), os.kill, (os.getpid(), end)).start()
        return part(*args, **kwargs)

    return run


def harm(kind: str, what: str) -> None:
    if kind == "fail":
        error = UserError("data.train='/mnt/data': the disk is not there.")
        loader.Loader.__init__ = failing(loader.Loader.__init__, error, lambda: jax.process_index() == int(what))
    elif kind == "pace":
        processes.Wish.exchange = paced(processes.Wish.exchange, float(what))
    elif kind == "die":
        processes.Wish.exchange = dying(processes.Wish.exchange, int(what))
    elif kind == "save":
        left = iter(range(int(what)))
        error = OSError(28, "No space left on device")
        manager = checkpointer.ocp.CheckpointManager
        manager.save = failing(manager.save, error, lambda: next(left, None) is not None)
    elif what == "save":
        manager = checkpointer.ocp.CheckpointManager
        manager.save = slowed(manager.save, 2)
    elif what == "evaluate":
        evaluate.Validation.__call__ = slowed(evaluate.Validation.__call__, 2)
    elif what == "step":
        processes.Wish.exchange = slowed(processes.Wish.exchange, 4)


if __name__ == "__main__":
    harm(*os.environ["HARM"].split(":"))
    exit_on_user_error(lambda: train.main(sys.argv[1:]))
