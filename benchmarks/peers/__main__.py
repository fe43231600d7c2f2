"""A training step beside those of others, on this machine's CPU: PyTorch, eager and compiled, and JAX by hand.

    python -m benchmarks.peers [--shapes=1.7M,58M] [--rounds=7] [--envs=DIR] [--result=benchmarks/results/peers.md]

PyTorch and transformers are installed into an environment of their own (about 300 MB, below --envs, once). Every peer
is a process that has built the same shapes and waits; each round lets one after the other do some steps, so that what
disturbs the machine disturbs all of them. All in float32, AdamW, gradients clipped.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import venv
from importlib import metadata

import numpy as np

from benchmarks.peers.shapes import SHAPES
from lmboost.errors import UserError, count, one_of, run_flags

HERE = pathlib.Path(__file__).parent
TORCH = ("torch==2.13.0", "transformers>=5")
PEERS = {  # script, environment, variables
    "lmboost": ("lmboost_peer.py", "", {}),
    "JAX by hand": ("floor_peer.py", "", {}),
    "PyTorch, eager": ("torch_peer.py", "torch", {}),
    "PyTorch, compiled": ("torch_peer.py", "torch", {"COMPILED": "1"}),
}
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # a peer finds its own packages
SECONDS = 2.0  # of the slowest peer's steps in a round, about
TEXT = """\
# A step beside those of others

`python -m benchmarks.peers` wrote this on {cores} cores ({machine}): jax {jax}, {torch}. Float32, AdamW, clipped
gradients; {rounds} rounds, peers in turn. Time is over lmboost's of the same round, the median and the middle half:
above 1 is slower than lmboost. KD: a smaller teacher's forward pass and the divergence from it are in the step.

| shape | peer | plain | KD |
|---|---|---|---|
"""


class Peer:
    """A process that does steps when it is told to."""

    def __init__(self, name: str, envs: pathlib.Path, shape: str, kd: bool, threads: int):
        script, environment, variables = PEERS[name]
        self.name, python = name, python_of(envs, environment) if environment else sys.executable
        self._process = subprocess.Popen(
            [python, str(HERE / script), shape, str(int(kd)), str(threads)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=ALONE | {"JAX_PLATFORMS": "cpu"} | variables,
        )  # fmt: skip

    def __call__(self, steps: int) -> float:
        """Seconds of so many steps. A UserError where the process has ended, which has said why."""
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:  # it has ended already
            line = ""
        if not line:
            raise UserError(f"{self.name} ended with status {self._process.wait()}; what it said is above.")
        return json.loads(line)["seconds"]

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def python_of(envs: pathlib.Path, name: str) -> str:
    """The interpreter of an environment, which is made if it is not there. A UserError where it can't be."""
    where, ready = envs / name, envs / name / "ready"
    if not ready.exists():
        print(f"installing {' and '.join(TORCH)} into {where}", flush=True)
        venv.create(where, with_pip=True, clear=True)
        done = subprocess.run([where / "bin/python", "-m", "pip", "install", "-q", *TORCH], env=ALONE, check=False)
        if done.returncode:
            raise UserError(f"{name} could not be installed into {where}; pip's own message is above.")
        ready.touch()
    return str(where / "bin/python")


def measure(envs: pathlib.Path, shape: str, kd: bool, rounds: int, threads: int) -> dict[str, np.ndarray]:
    """Each peer's time over lmboost's, by round."""
    peers = [Peer(name, envs, shape, kd, threads) for name in PEERS]
    try:
        for peer in peers:
            peer(2)  # compiles
        steps = max(1, round(SECONDS / max(peer(1) for peer in peers)))
        spent = np.array([[peer(steps) for peer in peers] for _ in range(rounds)])
    finally:
        for peer in peers:
            peer.end()
    return {peer.name: spent[:, i] / spent[:, 0] for i, peer in enumerate(peers)}


def main(shapes: str, rounds: int, envs: str, result: str) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    where = pathlib.Path(envs).absolute()
    where.mkdir(parents=True, exist_ok=True)
    text = TEXT.format(
        cores=cores, machine=platform.processor() or platform.machine(), jax=metadata.version("jax"),
        torch=" and ".join(TORCH), rounds=count("--rounds", rounds),
    )  # fmt: skip
    for shape in shapes.split(","):
        one_of("--shapes", shape, SHAPES)
        plain, kd = (measure(where, shape, kd, rounds, cores) for kd in (False, True))
        for name in PEERS:
            cells = []
            for times in (plain[name], kd[name]):
                low, middle, high = np.percentile(times, (25, 50, 75))
                cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})" if name != "lmboost" else "1")
            text += f"| {shape} | {name} | {' | '.join(cells)} |\n"
            print(text.splitlines()[-1], flush=True)
    pathlib.Path(result).write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1.7M,58M", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--envs", default="runs/peers")
    parser.add_argument("--result", default=str(HERE.parent / "results/peers.md"))
    run_flags(main, parser)
