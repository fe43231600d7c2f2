"""Numbers as they are written in configs, commands and files: "0-5,8"."""

import re
from collections.abc import Iterator, Sequence

from lmboost.errors import UserError


def parse(text: str, where: str, wrong: str) -> Iterator[tuple[str, int, int]]:
    """(word, first, last) of each number or range in a text; whether they are in order is left to the caller.

    Raises a UserError "WHERE: WORD WRONG" at a word that is neither.
    """
    for word in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", word.strip())
        if not match:
            raise UserError(f"{where}: {word!r} {wrong}")
        yield word, int(match[1]), int(match[2] or match[1])


def write(numbers: Sequence[int]) -> str:
    """Numbers as `parse` reads them, those that follow one another as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
