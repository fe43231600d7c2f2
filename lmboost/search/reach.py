"""Which numbers of parameters models of given widths, depths and layers can have: exactly.

A layer's parameters are those of its attention and those of its MLP, each one of a few numbers. A model's are the sum
over layers, so that two sets of sums, one for the attention and one for the MLP, stand for all of its sizes.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from lmboost.errors import UserError

WORK = 1 << 36  # bit operations on the sums of one width: some seconds, on at most 256 MB


class Width(NamedTuple):
    """The models of one width.

    Attributes:
      d_model: the width.
      base: parameters that are in no layer.
      depths: possible numbers of layers, ascending.
      attention, mlp: parameters that these can have in a layer, ascending; what is in neither is counted as attention.
    """

    d_model: int
    base: int
    depths: Sequence[int]
    attention: Sequence[int]
    mlp: Sequence[int]

    def ends(self, depth: int) -> tuple[int, int]:
        """The fewest and the most parameters of a model of this depth."""
        fewest, most = (self.base + depth * (self.attention[i] + self.mlp[i]) for i in (0, -1))
        return fewest, most


def find(
    rng: np.random.Generator, widths: Iterable[Width], alike: bool, low: int, high: int
) -> tuple[int, int, list[int], list[int]]:
    """A model drawn from those with `low` to `high` parameters.

    Args:
      alike: whether the layers of a model are all alike.

    Returns (d_model, depth, attention, mlp), the last two the parameters of each layer, or one number if all are alike.

    Raises a UserError that names the nearest numbers that can be reached, where none is in the bin.
    """
    below, above = [], []
    for width in widths:
        ends = {depth: width.ends(depth) for depth in width.depths}
        below += [most for _, most in ends.values() if most < low]
        above += [fewest for fewest, _ in ends.values() if fewest > high]
        depths = [depth for depth, (fewest, most) in ends.items() if fewest <= high and most >= low]
        if not depths:
            continue
        # From the fewest to the most, layers can be changed one at a time, to their next choice. So one number is not
        # more than the largest of these steps above the bin.
        step = max(np.diff(width.attention).max(initial=0), np.diff(width.mlp).max(initial=0))
        rise = high + int(step) - min(ends[depth][0] for depth in depths)
        kinds = [
            Multiples(values) if alike else Sums(values, depths[-1], rise) for values in (width.attention, width.mlp)
        ]
        for depth in rng.permutation(depths).tolist():
            a, b = (kind.totals(depth) for kind in kinds)
            start, stop = (np.searchsorted(b, edge - width.base - a) for edge in (low, high + 1))
            if (hits := np.flatnonzero(start < stop)).size:
                i = rng.choice(hits)
                totals = int(a[i]), int(b[rng.integers(start[i], stop[i])])
                attention, mlp = (kind.split(rng, n, depth) for kind, n in zip(kinds, totals, strict=True))
                return width.d_model, depth, attention, mlp
            fewer, more = start > 0, start < len(b)
            below += [width.base + int((a[fewer] + b[start[fewer] - 1]).max())] if fewer.any() else []
            above += [width.base + int((a[more] + b[start[more]]).min())] if more.any() else []
    nearest = f"the largest below has {max(below)}" if below else "none is below"
    nearest += f", the smallest above has {min(above)}" if above else ", none is above"
    raise UserError(
        f"search.params={low}-{high}: no model of this search has so many parameters; {nearest}. Widen the bin, or the "
        "choices of sizes."
    )


class Multiples(NamedTuple):
    """Sums of equal values, each one of `values` (ascending)."""

    values: Sequence[int]

    def totals(self, count: int) -> np.ndarray:
        """All sums of `count` values: int64, ascending."""
        return np.array(self.values, np.int64) * count

    def split(self, rng: np.random.Generator, total: int, count: int) -> list[int]:
        """The value of which `count` make a total."""
        return [total // count]


class Sums:
    """Sums of values that may differ, each one of `values` (ascending).

    A sum is a bit of an int, at its distance from the smallest sum in units of the values' common divisor; the bits
    for one value more are those so far, shifted by each value (dynamic programming).
    """

    def __init__(self, values: Sequence[int], most: int, rise: int):
        """Sums of up to `most` values, as far as they are not more than `rise` above the smallest sum of as many.

        Raises a UserError where these are too many.
        """
        self.first, self.unit = values[0], math.gcd(*(v - values[0] for v in values)) or 1
        self.steps = [s for s in ((v - self.first) // self.unit for v in values) if s <= rise // self.unit]
        size = min(rise // self.unit, most * self.steps[-1]) + 1
        if size * most * max(len(self.steps), 32) > WORK:
            raise UserError(
                "search.params: cuts drawn at random do not come into the bin, and there are too many sizes to look "
                "through. Widen the bin, or give choices with larger steps."
            )
        self.levels, mask = [1], (1 << size) - 1
        for _ in range(most):
            bits = 0
            for step in self.steps:
                bits |= self.levels[-1] << step
            self.levels.append(bits & mask)

    def totals(self, count: int) -> np.ndarray:
        """All sums of `count` values: int64, ascending."""
        bits = self.levels[count]
        octets = np.frombuffer(bits.to_bytes(bits.bit_length() // 8 + 1, "little"), np.uint8)
        return np.flatnonzero(np.unpackbits(octets, bitorder="little")) * self.unit + count * self.first

    def split(self, rng: np.random.Generator, total: int, count: int) -> list[int]:
        """`count` values that make a total, drawn at random from those that do."""
        at, values = (total - count * self.first) // self.unit, []
        for level in reversed(self.levels[:count]):
            step = int(rng.choice([s for s in self.steps if s <= at and level >> (at - s) & 1]))
            values.append(self.first + step * self.unit)
            at -= step
        return values
