"""The notice to stop, taken from a process's first moment: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal has gone).

It imports nothing that takes time, so that a verb can call `listen` before it imports what takes seconds.
"""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from lmboost.errors import EXIT_PREEMPTED

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def listen(handler: Callable[[int, Any], None] | None = None, numbers: Sequence[int] = NUMBERS) -> dict[int, Any]:
    """Has `handler` called upon a notice; returns what was called before. By default the process ends with status 75.

    What is ignored stays so: nohup ignores SIGHUP, and shells SIGINT of what they run behind.
    """
    free = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler or _end) for number in free}


def _end(number: int, _: Any) -> None:
    name = signal.Signals(number).name
    os.write(2, f"stopped by {name} before there was anything to save.\n".encode())  # print could be in the middle
    os._exit(EXIT_PREEMPTED)
