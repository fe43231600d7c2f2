"""TPU chips and pods: what vendors' pages say of them, and the names that people have for them.

Source: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and the pages of each chip.
"""

import math
from typing import NamedTuple

from lmboost.errors import UserError, nearest
from lmboost.flops import PEAK_FLOPS


class Chip(NamedTuple):
    """One jax device of a kind of TPU: a chip, or of tpu7x one of its two halves.

    Attributes:
      hbm: GiB of memory.
      flops: dense bfloat16 FLOP/s.
      clock: cycles a second, in which the compiler counts; it is what `flops` needs of the matrix units.
      bandwidth: bytes a second from memory.
      network: bytes a second from other chips of the pod, over all links.
      per_chip: devices on a chip.
      counts_cores: whether names count cores, of which a chip has two.
    """

    hbm: int
    flops: float
    clock: float
    bandwidth: float
    network: float
    per_chip: int = 1
    counts_cores: bool = False


CHIPS = {
    "v4": Chip(32, PEAK_FLOPS["TPU v4"], 1.05e9, 1.228e12, 300e9, counts_cores=True),
    "v5e": Chip(16, PEAK_FLOPS["TPU v5e"], 1.5e9, 0.819e12, 200e9),
    "v5p": Chip(95, PEAK_FLOPS["TPU v5"], 1.75e9, 2.765e12, 600e9, counts_cores=True),
    "v6e": Chip(32, PEAK_FLOPS["TPU v6e"], 1.75e9, 1.64e12, 448e9),
    "tpu7x": Chip(96, PEAK_FLOPS["TPU7x"], 2.2e9, 3.69e12, 600e9, per_chip=2),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
TOPOLOGIES = tuple(f"{chip}:{shape}" for chip in CHIPS for shape in (FLAT if chip.endswith("e") else CUBE))


def topology(name: str) -> str:
    """The topology CHIP:SHAPE that a name says: itself, or by its size, as "v5e-256" or "v5p-128" (of 64 chips).

    Raises a UserError, naming the nearest or the sizes that there are, where there is none.
    """
    if name in TOPOLOGIES:
        return name
    kind, dash, size = name.partition("-")
    kind = {"v5litepod": "v5e", "v5lite": "v5e"}.get(kind, kind)
    if not dash or kind not in CHIPS:
        raise UserError(
            f"--topology={name!r} is not known{nearest(name, TOPOLOGIES)}: give CHIP:SHAPE, as in v5e:16x16, or "
            f"CHIP-SIZE, as in v5e-256, of {', '.join(CHIPS)}."
        )
    unit = 2 if CHIPS[kind].counts_cores else 1
    sizes = {str(unit * _chips(pod)): pod for pod in TOPOLOGIES if pod.startswith(f"{kind}:")}
    if size not in sizes:
        raise UserError(f"--topology={name!r}: of {kind} there are pods of {', '.join(sizes)}, or give CHIP:SHAPE.")
    return sizes[size]


def _chips(pod: str) -> int:
    return math.prod(int(n) for n in pod.partition(":")[2].split("x"))
