"""Worker processes that end when the one that started them is gone."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Ends this process, a child by `multiprocessing`, when its parent is gone.

    A parent that is killed, by the system when memory runs out say, takes no leave: its workers would wait for it for
    ever, with their memory.
    """
    threading.Thread(target=_wait, name="end with parent", daemon=True).start()


def _wait() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
