"""Runs arms of the track, and writes one JSON line a run.

    python -m benchmarks.track --tier=nano --arms=plain,salt,let --seeds=1 [--out=runs/track] [--jobs=2]

The runs that an arm needs (its teacher) are made first. A run that has its line.json is not made again, and one that
was killed goes on from its last checkpoint. OUT/TIER.jsonl is made of all of these lines.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys

from benchmarks.track import hub, texts
from benchmarks.track.arms import ARMS, LINE, asked, workdir_of
from benchmarks.track.setting import TIERS
from lmboost import ranges
from lmboost.errors import UserError, count, one_of, run_flags
from lmboost.run import lines

# XLA asks for the memory of its temporaries at each step: glibc is to keep it instead of handing it back.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"
MALLOC += ":glibc.malloc.trim_threshold=4000000000:glibc.malloc.top_pad=100000000"
ROOT = pathlib.Path(__file__).parents[2]


def ordered(arms: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """(arm, seed) of the arms and of what they need; first those that need nothing, for which no core has to wait."""
    found: dict[tuple[str, int], None] = {}

    def add(arm: str, seed: int) -> None:
        for needed in ARMS[arm].needs:
            add(needed, seed)
        found.setdefault((arm, seed))

    for seed in seeds:
        for arm in arms:
            add(arm, seed)

    def depth(arm: str) -> int:
        return max((1 + depth(needed) for needed in ARMS[arm].needs), default=0)

    return sorted(found, key=lambda run: depth(run[0]))


class Runner:
    """Runs in processes of their own, each bound to a core, as many at once as there are `cores`."""

    def __init__(self, tier: str, out: pathlib.Path, cores: list[int]):
        self._tier, self._out, self._jobs = tier, out.absolute(), len(cores)
        self._cores: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in cores:
            self._cores.put(core)

    def __call__(self, runs: list[tuple[str, int]]) -> None:
        """Makes those of the runs that have no line yet. The first one that fails ends what has not begun."""
        futures: dict[tuple[str, int], concurrent.futures.Future] = {}
        with concurrent.futures.ThreadPoolExecutor(self._jobs) as pool:
            for arm, seed in runs:
                # What it needs stands before it in `runs`, so that no thread waits for what has not begun.
                before = [futures[needed, seed] for needed in ARMS[arm].needs]
                futures[arm, seed] = pool.submit(self._one, arm, seed, before)
            try:
                for future in concurrent.futures.as_completed(futures.values()):
                    future.result()
                    self._collect()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _collect(self) -> None:
        """Writes OUT/TIER.jsonl anew, of the lines of all finished runs."""
        found = sorted((self._out / self._tier).glob(f"*/*/{LINE}"))
        lines.rewrite(self._out / f"{self._tier}.jsonl", (json.loads(path.read_text()) for path in found))

    def _one(self, arm: str, seed: int, before: list[concurrent.futures.Future]) -> None:
        for needed in before:
            needed.result()
        workdir = workdir_of(self._out, self._tier, arm, seed)
        if not (workdir / LINE).exists():
            workdir.mkdir(parents=True, exist_ok=True)
            core = self._cores.get()
            try:
                self._run(arm, seed, core, workdir)
            finally:
                self._cores.put(core)
        line = json.loads((workdir / LINE).read_text())
        if line.get("asked", asked(arm)) != asked(arm):
            raise UserError(f"{workdir} holds a run of {arm} as it was before arms.py was changed: remove it.")
        print(f"{self._tier} {arm} seed {seed}: {line['final']:.4f}, {line['seconds']:.0f} s", flush=True)

    def _run(self, arm: str, seed: int, core: int, workdir: pathlib.Path) -> None:
        env = os.environ | {
            "GLIBC_TUNABLES": MALLOC, "JAX_COMPILATION_CACHE_DIR": str(self._out / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.track.one", self._tier, arm, str(seed), str(self._out), str(core)]
        with (workdir / "log.txt").open("a") as log:
            # Its standard input ends with this process, however that ends, and the run with it.
            code = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            ).wait()
        if code:
            tail = (workdir / "log.txt").read_text().splitlines()[-3:]
            raise UserError(f"{arm}, seed {seed} ended with status {code}; {workdir}/log.txt ends: " + "\n".join(tail))


def main(tier: str, arms: str, seeds: str, out: str, jobs: int) -> None:
    names = [one_of("--arms", name, tuple(ARMS)) for name in arms.split(",")]
    sizes = TIERS[one_of("--tier", tier, tuple(TIERS))]
    ranged = ranges.parse(seeds, f"--seeds={seeds}", "is no number and no range; give 0,1,2 or 0-2.")
    numbers = [n for _, first, last in ranged for n in range(first, last + 1)]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if count("--jobs", jobs) > len(cores):
        raise UserError(f"--jobs={jobs}: each run has a core of its own, and there are {len(cores)}.")
    where = pathlib.Path(out)
    where.mkdir(parents=True, exist_ok=True)
    if unfit := [name for name in names if not ARMS[name].fits(sizes)]:
        raise UserError(f"--arms={unfit[0]}: --tier={tier} has no such models. Choose another tier.")
    texts.make(where / sizes.data, sizes.student.vocab_size, jobs)
    if any(ARMS[name].hub for name in names):
        hub.make(where / hub.HUB)
    Runner(tier, where, cores[:jobs])(ordered(names, numbers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="nano")
    parser.add_argument("--arms", required=True, help="comma between them; see arms.py")
    parser.add_argument("--seeds", default="0", help="as 0,1,2 or 0-2")
    parser.add_argument("--out", default="runs/track")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on a core of its own")
    run_flags(main, parser)
