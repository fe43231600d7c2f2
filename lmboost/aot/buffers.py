"""What lies in a chip's memory when a program needs the most of it: the largest buffers, by what they are."""

import pathlib
import re
from typing import NamedTuple

from lmboost.aot.hlo import arrays_of

_ALLOCATION = re.compile(r"allocation (\d+):")
# @0 is the chip's main memory, others are on the chip itself; tuples hold no more than where others are.
_VALUE = re.compile(r" value: <\d+ ([\w.\-]+)\S* @0> \(size=(\d+),offset=(\d+)\): (\w+\[.*)")
_NAMED = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = .*op_name=\"((?:[^\"\\]|\\.)*)\"")


class Buffer(NamedTuple):
    """A place in memory, and the first of what takes it.

    Attributes:
      bytes: its size.
      array: dtype and shape on one chip, as "bf16[4096,1024]".
      name: where in the program it comes from; of an argument, its path.
    """

    bytes: int
    array: str
    name: str


def largest(dump: pathlib.Path, most: int = 5) -> list[Buffer]:
    """The largest buffers of the program that was dumped there, whether or not they fit; each place once.

    Empty where the compiler has written no assignment of buffers: it did not come that far.
    """
    found = sorted(dump.glob("*.after_optimizations-buffer-assignment.txt"))
    if not found:
        return []
    text = found[-1].with_name(found[-1].name.replace("-buffer-assignment", "")).read_text()
    names = dict(match.groups() for line in text.splitlines() if (match := _NAMED.match(line)))
    places: dict[tuple[str, str], Buffer] = {}
    allocation = ""
    for line in found[-1].read_text().splitlines():
        if match := _ALLOCATION.match(line):
            allocation = match[1]
        elif match := _VALUE.match(line):
            name, size, offset, shape = match.groups()
            one = Buffer(int(size), str(arrays_of(shape)[0]), names.get(name, name).replace("\\'", "'"))
            if one.bytes > places.get((allocation, offset), one._replace(bytes=0)).bytes:
                places[allocation, offset] = one
    return sorted(places.values(), key=lambda one: -one.bytes)[:most]
