"""Several processes of one run: how they find one another, agree, and end together.

On a TPU pod every process finds the others by itself. Elsewhere flags of lmboost.train say where the first one listens.
"""

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmboost.errors import EXIT_USER_ERROR, Stop, UserError


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the command line says about the processes of a run. Raises a UserError on values that do not fit."""

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    multihost: bool = False
    start_timeout: int = 300
    heartbeat_timeout: int = 100

    def __post_init__(self):
        for name in ("start_timeout", "heartbeat_timeout"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name}={value}: expected at least 1 second.")
        where = self.coordinator
        count, me = self.num_processes, self.process_id
        host, _, port = where.rpartition(":")
        if where and not (host and port.isdigit()):
            raise UserError(f"--coordinator={where}: expected HOST:PORT of process 0, as in 10.0.0.2:8476.")
        if where and not self.multihost and not 0 <= me < count:
            raise UserError(
                f"--coordinator={where} with --num_processes={count} --process_id={me}: give the number of processes, "
                "and this one's, from 0 to one less."
            )
        if not where and (count or me >= 0):
            raise UserError("--num_processes and --process_id need --coordinator=HOST:PORT, where process 0 listens.")


def start(c: Cluster) -> None:
    """Makes this process one of its cluster, where it is in one. Before anything else asks jax for its devices.

    Where the others do not come within `start_timeout`, jax ends the process with SIGABRT; what it waited for has been
    said before. Raises a Stop (status 1) where jax finds no cluster.
    """
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    if not (c.coordinator or c.multihost or pod):
        return
    # Processes on CPUs reduce over TCP. The flag has this value by default in some releases of jax, not in others.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = c.coordinator or "an address that jax finds"
    waiting = threading.Timer(
        min(c.start_timeout / 2, 10.0), print,
        (f"waiting up to {c.start_timeout} s for all processes of the run; the first one is to listen at {where}",),
        {"file": sys.stderr, "flush": True},
    )  # fmt: skip
    waiting.start()
    try:
        jax.distributed.initialize(
            c.coordinator or None,
            c.num_processes or None,
            c.process_id if c.process_id >= 0 else None,
            initialization_timeout=c.start_timeout,
            heartbeat_timeout_seconds=c.heartbeat_timeout,
        )
    except (RuntimeError, ValueError) as error:
        cause = str(error).strip().splitlines()[0][:300]
        raise Stop(f"error: this process could not join the others at {where}: {cause}", 1) from error
    finally:
        waiting.cancel()


def say(message: str) -> None:
    """Prints a line, of the first process alone."""
    if jax.process_index() == 0:
        print(message, flush=True)


def warn(message: str) -> None:
    """Prints a line to stderr that must not be overlooked; of every process, with its number."""
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(f"WARNING: {who}{message}", file=sys.stderr, flush=True)


def all_true(value: bool) -> bool:
    """Whether `value` is true in every process. All of them must ask."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Runs a part of which each process does its own, without collectives; if one fails, all of them do.

    The one that failed raises its error, the others a Stop that says so.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        own = 0 if error is None else EXIT_USER_ERROR if isinstance(error, UserError) else 1
        statuses = np.ravel(multihost_utils.process_allgather(np.array(own)))
        if error is None and statuses.any():
            first = int(np.flatnonzero(statuses)[0])
            raise Stop(f"error: process {first} failed in {what}; its own stderr says why.", int(statuses[first]))
    if error is not None:
        raise error


class Wish:
    """What some process wishes for, known to all of them one step later, at no wait.

    A clock or a failed write is one process's own, but what follows from it must be done by all at the same step: the
    largest of the processes' wishes is computed on the devices between two steps.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._pending = None
        if not self._alone:
            flat = Mesh(mesh.devices.reshape(-1), ("all",))
            self._places = NamedSharding(flat, P("all"))
            self._max = jax.jit(lambda wishes: wishes.max(), out_shardings=NamedSharding(flat, P()))

    def exchange(self, wish: bool) -> bool:
        """Takes this process's wish; returns whether any process wished when this was called the time before."""
        if self._alone:
            return wish
        before = self._pending
        local = np.array([wish], np.int32)
        count = self._places.mesh.devices.size
        self._pending = self._max(jax.make_array_from_callback((count,), self._places, lambda _: local))
        return before is not None and bool(before)
