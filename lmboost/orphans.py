"""Worker processes that live as long as the one that started them: no longer, and no shorter."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker


def end_with_parent() -> None:
    """Ends this process, a child by `multiprocessing`, when its parent is gone.

    A parent that is killed, by the system when memory runs out say, takes no leave: its workers would wait for it for
    ever, with their memory.
    """
    threading.Thread(target=_wait, name="end with parent", daemon=True).start()


def start_tracker() -> None:
    """Starts the process that keeps account of the workers' shared memory, so that it, too, outlives SIGHUP.

    It ignores SIGINT and SIGTERM by itself, and what its parent ignores. To be called before the first worker.
    """
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        resource_tracker.ensure_running()
        signal.signal(signal.SIGHUP, before)


def _wait() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
