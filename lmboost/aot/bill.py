"""What a run on a pod takes, by the compiler's own estimate: time of a step, what bounds it, MFU, chip-hours.

Nothing of this was measured on a chip. Operations are counted in the cycles that the compiler gives them, which hold
the time of memory, and run one after the other, those of attention's kernels in the cycles of their schedules;
collectives are taken to run beside them, so a step takes whichever is longer.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lmboost.aot.chips import Chip
from lmboost.aot.hlo import Attention
from lmboost.plan import Plan

AUTO = 0.2  # of the run; in the track it was 14% to 17%
KERNELS = ("fwd", "dkv", "dq")
UNIT = 512 * 512  # scores, for which these are the cycles of each kernel, by chip and block; heads of up to 128
SCORES = {  # benchmarks/results/splash_blocks.md
    "v4": {512: (3251, 3810, 2712), 1024: (2373, 2992, 2109)},
    "v5e": {512: (2229, 2459, 1834), 1024: (1553, 2056, 1556)},
    "v5p": {512: (2424, 2661, 1917), 1024: (1641, 2161, 1574)},
    "v6e": {512: (1663, 1769, 1388), 1024: (1127, 1366, 1126)},
    "tpu7x": {512: (1546, 1811, 1376), 1024: (1116, 1263, 1174)},
}


class Bill(NamedTuple):
    """Of one step, or of several together, in seconds.

    Attributes:
      operations: of what a chip computes.
      matmuls: what the model's FLOPs would take at the chip's peak; what is rematerialised is beside them.
      network: of what a chip receives, at all of its links.
    """

    operations: float
    matmuls: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.operations, self.network)

    @property
    def bound(self) -> str:
        """By what: the network, else the matrix units where these are busy most of the time, else memory."""
        if self.network > self.operations:
            return "network"
        return "matrix units" if self.matmuls > 0.5 * self.operations else "memory and vector units"

    @property
    def mfu(self) -> float:
        return self.matmuls / self.seconds


def of_phase(phase: Mapping[str, Any], chip: Chip, num_devices: int) -> Bill:
    """The bill of a step of a phase, as `compiler.compile_phases` describes it."""
    received, cycles = sum(phase["collectives"].values()), phase["cycles"] + phase["attention"]
    return Bill(cycles / chip.clock, phase["flops"] / (chip.flops * num_devices), received / chip.network)


def attention_cycles(attentions: Iterable[Attention], chip: str) -> int:
    """Cycles of all calls of attention's kernels on one chip; scores in smaller blocks count as those in 512."""
    total = 0.0
    for one in attentions:
        cycles = SCORES[chip][max(one.block, 512)][KERNELS.index(one.kernel)]
        total += one.times * one.heads * one.blocks * one.block**2 / UNIT * cycles
    return round(total)


def of_run(
    phases: Sequence[Mapping[str, Any]], disk: Mapping[str, Any] | None, run: Plan, chip: Chip, num_devices: int
) -> dict[str, float]:
    """Chip-hours of the whole run: plain, helped, and with help from disk where `disk` is its phase.

    The last of the phases has no help. Help that ends by itself is taken to last for `AUTO` of the run.
    """
    seconds = [of_phase(phase, chip, num_devices).seconds for phase in phases]
    steps = [phase["end"] - phase["first"] for phase in phases]
    if run.objective.auto:
        steps = [round(AUTO * run.steps), *[0] * (len(phases) - 2), run.steps - round(AUTO * run.steps)]
    total = {"plain": run.steps * seconds[-1], "helped": sum(n * t for n, t in zip(steps, seconds, strict=True))}
    if disk:
        total["helped from disk"] = total["helped"] + steps[0] * (
            of_phase(disk, chip, num_devices).seconds - seconds[0]
        )
    return {name: spent * num_devices / chip.per_chip / 3600 for name, spent in total.items()}
