"""Files of a Hugging Face Hub directory: JSON, and tensors in the safetensors format.

A safetensors file is 8 bytes with the length of a header, the header {name: {"dtype", "shape", "data_offsets"}} as
JSON, and the tensors' little-endian bytes one after another. Rows are read and written as they are asked for, and no
file is mapped into memory: what is held is what the caller holds. That is why this is not the safetensors library,
which maps files (their pages count where memory is limited) and writes a shard only from all of its tensors at once.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmboost import strict_json
from lmboost.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
_OTHER_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8}
_MAX_HEADER_BYTES = 100_000_000  # as the format's own library


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: pathlib.Path
    dtype: str  # as the format writes it: "F32", "BF16"
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def part(self, start: int, count: int) -> "Stored":
        """The tensor of so many rows from one on."""
        row_bytes = math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize
        return Stored(self.file, self.dtype, (count, *self.shape[1:]), self.offset + start * row_bytes)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) along the first axis, read into memory of their own."""
        dtype, row = DTYPES[self.dtype], math.prod(self.shape[1:])
        count = (stop - start) * row
        flat = np.fromfile(self.file, dtype, count, offset=self.offset + start * row * dtype.itemsize)
        if flat.size != count:
            raise UserError(
                f"{self.file} has become shorter while it was read: give a directory that nobody writes to."
            )
        return flat.reshape(stop - start, *self.shape[1:])


def read_json(path: pathlib.Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object in a file, with the fields that `strict_json.read` is to expect; else a UserError."""
    try:
        return strict_json.read(path, expected, "Download it again.")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a Hub directory has one. Download the model again.") from None


def open_tensors(directory: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a Hub directory by name; reads the headers alone.

    Raises a UserError where there are no safetensors, a shard is missing, or a file is damaged.
    """
    if (directory / WEIGHTS).is_file():
        return read_header(directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        raise _no_weights(directory)
    index = read_json(directory / INDEX, {"weight_map": dict})["weight_map"]
    if not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{directory / INDEX}: weight_map is no map of tensors to files. Download it again.")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(index.values())):
        if pathlib.PurePath(name).name != name or "\0" in name or not (directory / name).is_file():
            raise UserError(f"{directory / INDEX} names the shard {name!r}, which is not there: download it, too.")
        tensors |= read_header(directory / name)
    for tensor, name in index.items():
        if tensor not in tensors:
            raise UserError(f"{directory / name} has no tensor {tensor!r}, which {INDEX} says it has: download both.")
    return tensors


def _no_weights(directory: pathlib.Path) -> UserError:
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt*"))
    if not pickles:
        return UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}: download the model's weights.")
    return UserError(
        f"{directory} has its weights as PyTorch pickles alone ({', '.join(pickles[:3])}), which can run any code and "
        'are not read. Convert them where torch and transformers are installed: python -c "from transformers import '
        f"AutoModelForCausalLM as M, AutoTokenizer as T; [x.from_pretrained('{directory}').save_pretrained('OUT') "
        'for x in (M, T)]"'
    )


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. A UserError where the header and the file's length do not agree."""

    def damaged(what: str) -> UserError:
        return UserError(f"{path} is damaged: {what}. Download it again.")

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise damaged(f"{size} bytes cannot hold its header")
        header = strict_json.parse(file.read(length), f"the header of {path}", {}, "Download it again.")
    header.pop("__metadata__", None)
    entry = {"dtype": str, "shape": [int], "data_offsets": [int]}
    expected = {f"{name}?": entry for name in header}  # all of them are there; one may itself end in "?"
    strict_json.check(header, expected, f"the header of {path}", "Download it again.")
    tensors, end = {}, 0
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, offsets = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if len(offsets) != 2 or min(shape, default=0) < 0:
            raise damaged(f"its header gives {name!r} the offsets {offsets} and the shape {list(shape)}")
        start, stop = offsets
        width = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_SIZES.get(dtype)
        if start != end or stop < start or (width and stop - start != math.prod(shape) * width):
            raise damaged(f"its header gives {name!r} the bytes {start} to {stop} for shape {list(shape)} of {dtype}")
        tensors[name], end = Stored(path, dtype, shape, 8 + length + start), stop
    if 8 + length + end != size:
        raise damaged(f"it has {size} bytes, and its header tells of {8 + length + end}")
    return tensors


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written: its rows come, in order, from `blocks`."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]


def write_tensors(directory: pathlib.Path, entries: Sequence[Entry], dtype: str, max_shard_bytes: int) -> None:
    """Writes one file, or shards of at most `max_shard_bytes` with an index; a larger tensor has a shard of its own.

    dtype: "F32" or "BF16"; the blocks have it. One block at a time is in memory.
    """
    width = DTYPES[dtype].itemsize
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = math.prod(entry.shape) * width
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, dtype)
    if len(shards) > 1:
        total = sum(math.prod(entry.shape) * width for entry in entries)
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _write_file(path: pathlib.Path, entries: Sequence[Entry], dtype: str) -> None:
    sizes = [math.prod(entry.shape) * DTYPES[dtype].itemsize for entry in entries]
    ends = list(itertools.accumulate(sizes))
    header = {"__metadata__": {"format": "pt"}} | {
        entry.name: {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [end - size, end]}
        for entry, size, end in zip(entries, sizes, ends, strict=True)
    }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for entry in entries:
            for block in entry.blocks():
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def write_json(path: pathlib.Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
