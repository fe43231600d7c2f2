"""What a compiled program says of itself: its collectives, how often they run, what they move; and its own cycles.

The text is the compiler's own (HLO), after all of its passes. A collective counts as often as the loops around it
turn; the pieces that an asynchronous one is cut in count once. Shapes in it are those on one chip.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
NO_ESTIMATE = 2**63 - 1  # of cycles
BYTES = {"pred": 1, "token": 0} | {f"{kind}{bits}": max(bits // 8, 1) for kind in "suf" for bits in (4, 8, 16, 32, 64)}

_ARRAY = re.compile(r"\b(pred|token|bf16|[suf]\d+(?:e\d\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array on one chip."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * BYTES.get(self.dtype, 2 if self.dtype == "bf16" else 1)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
      kind: one of KINDS; with " between slices" for what goes over the data centre's network.
      operands, results: what goes in and what comes out, on one chip.
      group: how many chips (or slices) take part.
      times: how often it runs in one execution of the program.
      bytes: that a chip receives each time, if it is done as a ring: of n chips, (n - 1) / n of the whole for a gather
        or a scatter, twice that for an all-reduce.
      name: where in the program it comes from.
      adds: whether a reduction adds up, and does not take the largest.
    """

    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    group: int
    times: int
    bytes: int
    name: str
    adds: bool = True

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self.operands + self.results

    @property
    def largest(self) -> Array:
        return max(self.arrays, key=lambda a: a.elements)

    @property
    def elements(self) -> int:
        """Of all that goes in, or of all that comes out if that is more."""
        return max(sum(a.elements for a in side) for side in (self.operands, self.results))


@dataclasses.dataclass(frozen=True)
class Attention:
    """One call of a kernel of splash attention, of whose cycles the compiler says nothing.

    Attributes:
      kernel: "fwd", "dkv" (gradients of keys and values) or "dq".
      heads: of queries, of all rows on one chip.
      tokens: of a row.
      block: queries, and keys, of a block of scores.
      blocks: that a row of one head is worked through in, those before its first key left out.
      times: how often it runs in one execution of the program.
    """

    kernel: str
    heads: int
    tokens: int
    block: int
    blocks: int
    times: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    line: str

    @property
    def operands(self) -> list[str]:
        """Names; newer compilers write the element k of the tuple x as x#k."""
        return re.findall(r"%([\w.\-]+(?:#\d+)?)", self.line.split(f" {self.opcode}(", 1)[1].split(")", 1)[0])

    @property
    def called(self) -> list[str]:
        found = (match.strip("{}").split(",") for match in _CALLED.findall(self.line))
        return [name.strip().lstrip("%") for name in itertools.chain(*found)]


class Program:
    """The text of a compiled program, taken apart."""

    def __init__(self, text: str, num_devices: int):
        self._num_devices = num_devices
        self._computations: dict[str, list[_Instruction]] = {}
        self._entry, current = "", None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self._computations.setdefault(header[2], [])
                self._entry = header[2] if header[1] else self._entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                current.append(_Instruction(*found.groups(), line))
        if not self._entry:
            raise ValueError("this is no text of a compiled program: it has no ENTRY.")

    def _visit(self, name: str, around: str, times: int) -> Iterator[tuple[_Instruction, str, str, int]]:
        """(instruction, its computation, the loop's body or the like that this is fused into, how often it runs).

        Of what the computation `name` executes, which runs so many times; what a reduction adds up with is not.
        """
        for one in self._computations[name]:
            yield one, name, around, times
            if one.opcode in ("async-update", "async-done"):
                continue  # names what its start has called
            inner = times * self._turns(one, name) if one.opcode == "while" else times
            for called in one.called:
                reduction = f"to_apply=%{called}" in one.line and one.opcode != "call"
                if called in self._computations and not reduction:
                    yield from self._visit(called, around if one.opcode == "fusion" else called, inner)

    def _turns(self, loop: _Instruction, computation: str) -> int:
        """How often a loop turns: its counter goes from one constant to another, as that of jax's scans does."""
        condition = re.search(r"condition=%?([\w.\-]+)", loop.line)[1]
        inside = [one for one, _, _, _ in self._visit(condition, condition, 1)]
        limits = [one for one in inside if one.opcode == "constant" and re.match(r"[su]\d+\[\]", one.shape)]
        counters = {at for one in inside for at in self._counters(one)}
        if len(limits) != 1 or len(counters) != 1:
            raise ValueError(f"can't tell how often {loop.name} turns: its condition is more than a limit.")
        carried = self._named(loop.operands[0], computation)
        start = self._named(carried.operands[counters.pop()], computation)
        while start.opcode in ("copy", "bitcast"):
            start = self._named(start.operands[0], computation)
        if carried.opcode != "tuple" or start.opcode != "constant":
            raise ValueError(f"can't tell how often {loop.name} turns: it begins at {start.line.strip()}.")
        return _constant(limits[0]) - _constant(start)

    @staticmethod
    def _counters(one: _Instruction) -> list[int]:
        """Which elements of what a loop carries the instruction of its condition reads as its counter."""
        if one.opcode == "get-tuple-element" and re.match(r"[su]\d+\[\]", one.shape):
            return [int(re.search(r"index=(\d+)", one.line)[1])]
        return [int(name.partition("#")[2]) for name in one.operands if "#" in name]

    def _named(self, name: str, computation: str) -> _Instruction:
        name = name.partition("#")[0]
        return next(one for one in self._computations[computation] if one.name == name)

    def _operand(self, name: str, computation: str) -> tuple[Array, ...]:
        """The arrays of an operand, all of a tuple's."""
        arrays = arrays_of(self._named(name, computation).shape)
        return (arrays[int(name.partition("#")[2])],) if "#" in name else arrays

    def cycles(self) -> int:
        """The compiler's own estimate of what the program's instructions take on a chip, waiting for others left out.

        It is what each fused operation says of itself, times the turns of the loops around it: good for ratios. What is
        given to the sparse cores, which work beside, has no estimate.
        """
        total = 0
        for one, computation, around, times in self._visit(self._entry, self._entry, 1):
            said = re.search(r'"estimated_cycles":"?(\d+)', one.line)
            if said and computation == around and int(said[1]) != NO_ESTIMATE:
                total += times * int(said[1])
        return total

    def attentions(self) -> list[Attention]:
        """Every call of a kernel of splash attention."""
        found = []
        for one, _, _, times in self._visit(self._entry, self._entry, 1):
            kernel = re.match(r"splash_m[hq]a_(fwd|dkv|dq)_", one.name)
            if one.opcode != "custom-call" or not kernel:
                continue
            given = arrays_of(one.line.split("operand_layout_constraints=", 1)[1])
            queries = next(a for a in given if a.dtype.endswith(("f16", "f32")))
            _, rows, columns = next(a.dims for a in given if a.dtype[0] == "s" and len(a.dims) == 3)  # of blocks
            tokens, heads = queries.dims[-2], math.prod(queries.dims[:-2])
            # As many columns as rows is all of the past; fewer are what a window spans.
            blocks = rows * (rows + 1) // 2 if rows == columns else rows * columns
            found.append(Attention(kernel[1], heads, tokens, tokens // rows, blocks, times))
        return found

    def collectives(self) -> list[Collective]:
        """Every collective of the program; one that is fused in pieces into what it runs beside is one."""
        found, pieces = [], set()
        for one, computation, around, times in self._visit(self._entry, self._entry, 1):
            if transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', one.line):
                if one.opcode == "send":  # the receiving half says the same
                    found.append(self._between_slices(one, transfer[1], times))
                continue
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if computation != around and not computation.startswith("all-reduce-scatter"):
                piece = (around, kind, *re.findall(r'channel_id=(\d+)|chain_id="(\d+)"', one.line))
                if piece in pieces:
                    continue
                pieces.add(piece)
            found.append(self._collective(one, kind, computation, times))
        return found

    def _collective(self, one: _Instruction, kind: str, computation: str, times: int) -> Collective:
        operands = tuple(a for name in one.operands for a in self._operand(name, computation))
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPUs' fused form: the slice that a chip keeps is taken outside
        n = group_size(one.line, self._num_devices)
        received = _received(kind, sum(a.bytes for a in operands), n)
        by = re.search(r"to_apply=%?([\w.\-]+)", one.line)
        adds = not any(inside.opcode == "maximum" for inside in self._computations.get(by[1], ())) if by else True
        return Collective(kind, operands, arrays_of(one.shape), n, times, received, _name(one.line), adds)

    def _between_slices(self, one: _Instruction, transfer: str, times: int) -> Collective:
        sent = next(a for a in arrays_of(one.shape) if a.dims or a.dtype != "u32")
        target = re.search(r'_xla_megascale_target="\{([\d,]+)\}', one.line)
        n = len(target[1].split(",")) if target else 2
        kind = transfer.lower().replace("_", "-")
        return Collective(
            f"{kind} between slices", (sent,), (sent,), n, times, _received(kind, sent.bytes, n), _name(one.line)
        )


def _constant(one: _Instruction) -> int:
    return int(re.search(r"constant\((-?\d+)\)", one.line)[1])


def arrays_of(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as it is written, which may be a tuple."""
    return tuple(Array(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(shape))


def group_size(line: str, num_devices: int) -> int:
    """How many devices of `num_devices` take part in a collective, in any of the notations of its groups.

    A ValueError on one that is not known: it would pass for all devices.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if "replica_groups=" in line and "replica_groups={}" not in line:
        raise ValueError(f"can't tell which devices take part in {line.strip()[:300]}.")
    return num_devices


def _received(kind: str, given: int, n: int) -> int:
    """Bytes that one of `n` chips receives in a collective into which each puts `given` bytes, done as a ring."""
    if kind.startswith("collective-"):  # one chip's to another, or to all
        return given
    if kind == "all-gather":
        return given * (n - 1)
    return round(given * (n - 1) / n * (2 if kind == "all-reduce" else 1))


def _name(line: str) -> str:
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', line)
    return match[1] if match else ""
