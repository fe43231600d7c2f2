"""What all peers compute: the shapes, and how the conductor speaks with them. Needs nothing but Python."""

import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple


class Sizes(NamedTuple):
    """A decoder as Llama's: RMSNorm, rotary positions, gated MLP, no biases, untied embeddings."""

    layers: int
    width: int
    heads: int
    mlp: int


class Shape(NamedTuple):
    """A student and its batch; the teacher is for steps with KD. All in float32."""

    student: Sizes
    teacher: Sizes
    vocab: int
    rows: int
    tokens: int


SHAPES = {
    "1.7M": Shape(Sizes(6, 128, 4, 352), Sizes(3, 64, 2, 176), 2048, 4, 256),
    "58M": Shape(Sizes(8, 512, 8, 1408), Sizes(4, 320, 5, 864), 32000, 4, 256),
    "tiny": Shape(Sizes(2, 16, 2, 32), Sizes(1, 8, 2, 16), 64, 2, 16),
}
LEARNING_RATE, BETAS, EPSILON, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
KD_WEIGHT = 0.5


def serve(build: Callable[[Shape, bool, int], Callable[[int], float]]) -> None:
    """A peer's process: builds its step, then does as many as each line of its input says, and answers the seconds.

    Its arguments are SHAPE KD(0 or 1) THREADS. build(shape, kd, threads) gives `steps(n)`, which does n steps, waits
    for them and returns the last loss. It ends with its input.
    """
    shape, kd, threads = SHAPES[sys.argv[1]], sys.argv[2] == "1", int(sys.argv[3])
    steps = build(shape, kd, threads)
    for line in sys.stdin:
        began = time.perf_counter()
        loss = steps(int(line))
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), flush=True)
