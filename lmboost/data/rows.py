"""Which rows of the data a step reads: a pure function of the step, also where rows are left out after a loss spike."""

import bisect
import dataclasses
from collections.abc import Sequence

from lmboost import ranges
from lmboost.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of the data a step's global batch takes. Picklable, for the loader's worker processes.

    Steps count from 0 here; the step with index 0 is the one that metrics.jsonl calls 1.

    Attributes:
      batch_size: rows that a step trains on.
      candidates: rows that are scored for each of them, in the steps that select.
      selecting: (first step, step after the last) of spans that select.
      jumps: (step, rows left out before it in all) of each range that is left out, in order; see `without`.
      begin: (step, row) that the first step of a stage is, and reads first; no step before it is asked for.
    """

    batch_size: int
    candidates: int
    selecting: tuple[tuple[int, int], ...]
    jumps: tuple[tuple[int, int], ...] = ()
    begin: tuple[int, int] = (0, 0)

    def __call__(self, step: int) -> tuple[int, int]:
        """(first row, number of rows); more rows while candidates are scored."""
        first = self._plain(step)
        return first + self._left_out(step + 1), self._plain(step + 1) - first

    def stand(self, step: int) -> int:
        """The row after the last one that the steps before `step` took. A jump at `step` is still ahead."""
        return self._plain(step) + self._left_out(step)

    def without(self, skipped: Sequence[tuple[int, int]], steps: int) -> "Rows":
        """Leaves out the rows that the steps of the ranges would take where none are; what comes after moves up.

        A step whose rows would touch one that is left out begins behind the range. As steps that select take more
        rows than others, it may so leave out a few rows before the range, too.

        Args:
          skipped: (first, last) steps as metrics.jsonl counts them, from 1; ascending, apart from one another.
          steps: of the whole run.
        """
        jumps = []
        left_out = step = 0
        for first, last in skipped:
            begin, end = self._plain(first - 1), self._plain(last)
            # The first step from here on that would take a row after `begin`.
            reaches = lambda s, left_out=left_out: self._plain(s + 1) + left_out  # noqa: E731
            step = bisect.bisect_right(range(steps), begin, lo=step, key=reaches)
            left_out = end - self._plain(step)
            jumps.append((step, left_out))
        return dataclasses.replace(self, jumps=tuple(jumps))

    def missed_jump(self, step: int, stand: int) -> int | None:
        """The index of the jump that a run which stands at the row `stand` before `step` should have made earlier.

        None where that is not what its rows differ in.
        """
        left_out = [0, *(rows for _, rows in self.jumps)]
        made = bisect.bisect_left(left_out, stand - self._plain(step))
        differs = made == len(self.jumps) or self._plain(step) + left_out[made] != stand
        return None if differs or self.jumps[made][0] >= step else made

    def _left_out(self, step: int) -> int:
        """Rows that the jumps before `step` leave out."""
        made = bisect.bisect_left(self.jumps, (step,))
        return self.jumps[made - 1][1] if made else 0

    def _plain(self, step: int) -> int:
        """Rows that the steps before `step` take where none are left out, so also the first row of `step` there."""
        begin, row = self.begin
        scored = sum(max(min(step, end) - max(first, begin), 0) for first, end in self.selecting)
        return row + (max(step - begin, 0) + scored * (self.candidates - 1)) * self.batch_size


def parse_ranges(text: str, steps: int) -> tuple[tuple[int, int], ...]:
    """(first, last) of each range in "1200-1399,2000"; none in an empty text.

    Raises a UserError where they are not ascending ranges of the steps 1 to `steps`.
    """
    wrong = "is neither a step nor a range of them. Give steps as in '1200-1399,2000'."
    found: list[tuple[int, int]] = []
    for word, first, last in ranges.parse(text, f"data.skip={text!r}", wrong) if text.strip() else ():
        if not 1 <= first <= last <= steps:
            raise UserError(
                f"data.skip={text!r}: {word!r} is not a range of steps, which are 1 to {steps}. Give them as "
                "metrics.jsonl numbers them, the first one before the last one."
            )
        if found and first <= found[-1][1]:
            raise UserError(
                f"data.skip={text!r}: {word!r} does not come after {'-'.join(map(str, found[-1]))}. Give every step "
                "once, in ascending order."
            )
        found.append((first, last))
    return tuple(found)
