"""Runs arms of the track, and writes one JSON line a run.

    python -m benchmarks.track --tier=nano --arms=plain,salt,let --seeds=1 [--out=runs/track] [--jobs=2]

The runs that an arm needs (its teacher) are made first. What has its line in OUT/TIER.jsonl is not run again; a run
that was killed goes on from its last checkpoint.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading

from benchmarks.track import texts
from benchmarks.track.arms import ARMS
from benchmarks.track.setting import TIERS
from lmboost.errors import UserError, one_of, run_flags

# XLA asks for the memory of its temporaries at each step: glibc is to keep it instead of handing it back.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4000000000"
ROOT = pathlib.Path(__file__).parents[2]


def ordered(arms: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """(arm, seed) of the arms and of what they need, each after what it needs."""
    found: dict[tuple[str, int], None] = {}

    def add(arm: str, seed: int) -> None:
        if ARMS[arm].teacher:
            add(ARMS[arm].teacher, seed)
        found.setdefault((arm, seed))

    for seed in seeds:
        for arm in arms:
            add(arm, seed)
    return list(found)


class Runner:
    """Runs in processes of their own, each bound to a core, as many at once as there are `cores`."""

    def __init__(self, tier: str, out: pathlib.Path, cores: list[int]):
        self._tier, self._out, self._path = tier, out.absolute(), out / f"{tier}.jsonl"
        self._writing, self._cores = threading.Lock(), queue.SimpleQueue()
        self._jobs = len(cores)
        for core in cores:
            self._cores.put(core)

    def __call__(self, runs: list[tuple[str, int]]) -> None:
        done = {(line["arm"], line["seed"]): None for line in self._lines()}
        futures: dict[tuple[str, int], concurrent.futures.Future] = {}
        with concurrent.futures.ThreadPoolExecutor(self._jobs) as pool:
            for arm, seed in runs:
                if (arm, seed) not in done:
                    before = futures.get((ARMS[arm].teacher, seed))
                    futures[arm, seed] = pool.submit(self._one, arm, seed, before)
            for future in concurrent.futures.as_completed(futures.values()):
                future.result()

    def _lines(self) -> list[dict]:
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def _one(self, arm: str, seed: int, before: concurrent.futures.Future | None) -> None:
        if before:
            before.result()
        workdir = self._out / self._tier / arm / str(seed)
        workdir.mkdir(parents=True, exist_ok=True)
        core, part = self._cores.get(), workdir / "line.json"
        try:
            if not part.exists():
                self._run(arm, seed, core, workdir)
        finally:
            self._cores.put(core)
        line = json.loads(part.read_text())
        with self._writing, self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{self._tier} {arm} seed {seed}: {line['final']:.4f}, {line['seconds']:.0f} s", flush=True)

    def _run(self, arm: str, seed: int, core: int, workdir: pathlib.Path) -> None:
        env = os.environ | {
            "GLIBC_TUNABLES": MALLOC, "JAX_COMPILATION_CACHE_DIR": str(self._out / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.track.one", self._tier, arm, str(seed), str(self._out), str(core)]
        with (workdir / "log.txt").open("a") as log:
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            tail = (workdir / "log.txt").read_text().splitlines()[-3:]
            raise UserError(f"{arm}, seed {seed} ended with status {code}; {workdir}/log.txt ends: " + "\n".join(tail))


def main(tier: str, arms: str, seeds: str, out: str, jobs: int) -> None:
    names = [one_of("--arms", name, tuple(ARMS)) for name in arms.split(",")]
    sizes = TIERS[one_of("--tier", tier, tuple(TIERS))]
    where = pathlib.Path(out)
    where.mkdir(parents=True, exist_ok=True)
    texts.make(where / "data", sizes.student.vocab_size, jobs)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    Runner(tier, where, cores[:jobs])(ordered(names, [int(seed) for seed in seeds.split(",")]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="nano")
    parser.add_argument("--arms", required=True, help="comma between them; see arms.py")
    parser.add_argument("--seeds", default="0", help="comma between them")
    parser.add_argument("--out", default="runs/track")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on a core of its own")
    run_flags(main, parser)
