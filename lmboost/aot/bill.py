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
UNIT = 512 * 512  # scores, for which these are the cycles of each kernel, by chip and block; heads of up to 128
SCORES = {  # benchmarks/results/splash_blocks.md
    "v4": {
        512: {"fwd": 3_251, "dkv": 3_810, "dq": 2_712},
        1024: {"fwd": 2_373, "dkv": 2_992, "dq": 2_109},
    },
    "v5e": {
        512: {"fwd": 2_229, "dkv": 2_459, "dq": 1_834},
        1024: {"fwd": 1_553, "dkv": 2_056, "dq": 1_556},
    },
    "v5p": {
        512: {"fwd": 2_424, "dkv": 2_661, "dq": 1_917},
        1024: {"fwd": 1_641, "dkv": 2_161, "dq": 1_574},
    },
    "v6e": {
        512: {"fwd": 1_663, "dkv": 1_769, "dq": 1_388},
        1024: {"fwd": 1_127, "dkv": 1_366, "dq": 1_126},
    },
    "tpu7x": {
        512: {"fwd": 1_546, "dkv": 1_811, "dq": 1_376},
        1024: {"fwd": 1_116, "dkv": 1_263, "dq": 1_174},
    },
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
    """Cycles of all calls of attention's kernels on one chip; a block of another size is taken for the next in size."""

    def cycles(one: Attention) -> float:
        known = SCORES[chip][max(SCORES[chip]) if one.block > min(SCORES[chip]) else min(SCORES[chip])]
        return one.times * one.heads * one.blocks * one.block**2 / UNIT * known[one.kernel]

    return round(sum(map(cycles, attentions)))


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
