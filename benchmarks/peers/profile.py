"""Where lmboost's plain step spends its time on a CPU, by kind of operation, as jax's profiler has it.

python -m benchmarks.peers.profile [--shape=1.7M] [--steps=10] [--result=benchmarks/results/peers_profile.md]
"""

import argparse
import collections
import glob
import os
import pathlib
import re
import tempfile

import jax

from benchmarks.peers import lmboost_peer
from benchmarks.peers.shapes import SHAPES
from benchmarks.reports import HOME
from lmboost.errors import count, one_of, run_flags

KINDS = {  # by the name that XLA gives the operation; the first that fits
    "matrix products, with what is fused to them": r"ynn|dot|convolution",
    "slices and updates of what is stacked over layers": r"slice",
    "arrays filled with a number": r"broadcast|iota",
    "copies and transposes": r"copy|transpose",
    "other operations": r"",
}
OUTER = r"\$|.*::|np\.|while|call|conditional"  # around others, or of Python
TEXT = """\
# Where a step's time goes on a CPU

`python -m benchmarks.peers.profile` wrote this: jax {jax}, shape {shape} of benchmarks/peers/shapes.py, {steps} steps.

| operations | share of the time | a step has |
|---|---|---|
"""


def measure(shape: str, steps: int) -> dict[str, tuple[float, float]]:
    """{kind of `KINDS`: (its share of all operations' time, how many a step has)}."""
    run = lmboost_peer.build(SHAPES[shape], False, 0)
    run(3)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run(steps)
        (path,) = glob.glob(os.path.join(directory, "**", "*.xplane.pb"), recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
        spent, times = collections.Counter(), collections.Counter()
        for event in (event for plane in data.planes for line in plane.lines for event in line.events):
            if not re.match(OUTER, event.name) and re.search(r"[a-z]\.\d+$|fusion$", event.name):
                kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.name))
                spent[kind] += event.duration_ns
                times[kind] += 1
    return {kind: (spent[kind] / spent.total(), times[kind] / steps) for kind in KINDS}


def main(shape: str, steps: int, result: str) -> None:
    found = measure(one_of("--shape", shape, SHAPES), count("--steps", steps))
    rows = [f"| {kind} | {share:.0%} | {times:.0f} |" for kind, (share, times) in found.items()]
    text = TEXT.format(jax=jax.__version__, shape=shape, steps=steps) + "\n".join(rows) + "\n"
    pathlib.Path(result).write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.7M")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--result", default=str(HOME / "benchmarks/results/peers_profile.md"))
    run_flags(main, parser)
