"""The two passes of `prepare` in processes of this machine. Each task leaves one JSON file when it is done."""

import multiprocessing
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

from lmboost import orphans
from lmboost.data import buckets as buckets_lib
from lmboost.data import records, sources, unfinished
from lmboost.errors import UserError

_RUN_BYTES = 64_000_000  # text that one task holds before it writes to disk
_SPREAD = {"runs": [{"file": str, "offsets": [int]}], **buckets_lib.TALLY}


class Local:
    """`prepare.Passes` in so many processes."""

    name = "local"

    def __init__(self, workers: int, report: Callable[[str], None]):
        self._workers, self._report = workers, report

    def spread(self, partial: pathlib.Path, units: Sequence[sources.Unit], plan: Mapping, most: int) -> dict:
        tasks = [(partial, i, unit, plan, most) for i, unit in enumerate(units)]
        _run(_spread, tasks, self._workers, "read", self._report)
        return buckets_lib.merged(unfinished.read(_spread_done(partial, i), _SPREAD) for i in range(len(units)))

    def bucket(self, partial: pathlib.Path, bucket: int) -> list[bytes]:
        return _bucket(partial, bucket)

    def make(self, partial: pathlib.Path, plan: Mapping) -> None:
        tasks = [(partial, bucket, plan) for bucket in range(sum(plan["buckets"]))]
        _run(_make, tasks, self._workers, "tokenised", self._report)


def _spread_done(partial: pathlib.Path, index: int) -> pathlib.Path:
    return partial / "spread" / f"{index:06d}.json"


def _spread(partial: pathlib.Path, index: int, unit: sources.Unit, plan: Mapping, most: int) -> None:
    """Divides a unit's documents into buckets, in runs: one file each, the buckets one after the other in it."""
    if _spread_done(partial, index).is_file():
        return
    buckets: list[list[bytes]] = [[] for _ in range(sum(plan["buckets"]))]
    held, runs, counted = 0, [], buckets_lib.tally()

    def flush() -> None:
        path = partial / "spread" / f"{index:06d}-{len(runs):04d}.bin"
        runs.append({"file": path.name, "offsets": records.write_run(path, buckets)})
        for bucket in buckets:
            bucket.clear()

    for bucket, raw in buckets_lib.placed(index, unit, plan, most, counted):
        buckets[bucket].append(raw)
        held += len(raw)
        if held >= _RUN_BYTES:
            flush()
            held = 0
    if held:
        flush()
    records.write_json(_spread_done(partial, index), {"runs": runs} | counted)


def _bucket(partial: pathlib.Path, bucket: int) -> list[bytes]:
    spread = [unfinished.read(path, _SPREAD) for path in sorted((partial / "spread").glob("*.json"))]
    documents = []
    for run in (run for each in spread for run in each["runs"]):
        start, stop = run["offsets"][bucket : bucket + 2]
        documents += records.read_run(partial / "spread" / run["file"], start, stop)
    return documents


def _make(partial: pathlib.Path, bucket: int, plan: Mapping) -> None:
    buckets_lib.make_once(partial, bucket, lambda: _bucket(partial, bucket), plan)


def _run(task: Callable, arguments: list[tuple], workers: int, done: str, report: Callable) -> None:
    """Runs `task` on each of `arguments`; the first error ends it."""
    start, told = time.monotonic(), time.monotonic()

    def tell(count: int) -> None:
        nonlocal told
        if time.monotonic() - told > 10:
            told = time.monotonic()
            report(f"{done} {count} of {len(arguments)} parts in {told - start:.0f} s")

    if workers == 1 or len(arguments) == 1:
        for count, each in enumerate(arguments, 1):
            task(*each)
            tell(count)
        return
    context = multiprocessing.get_context("spawn")
    pool = futures.ProcessPoolExecutor(min(workers, len(arguments)), context, _begin_worker)
    try:
        pending = [pool.submit(task, *each) for each in arguments]
        for count, future in enumerate(futures.as_completed(pending), 1):
            future.result()
            tell(count)
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    except futures.process.BrokenProcessPool as error:
        raise UserError(
            "a worker process died, most likely for want of memory: run the same command with fewer --workers; "
            "it continues where it stopped."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library would start a thread per core in each process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    orphans.end_with_parent()
