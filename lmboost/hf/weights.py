"""Tensors of a published model to and from parameters, a block at a time.

A parameter is a buffer on the mesh, and every block that is read is written into its place there, in the buffer
itself (it is donated). So the host holds a block and not a model, and no device holds more than its share of the
parameters and of a block.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmboost.hf import files
from lmboost.hf.family import Family

BLOCK_BYTES = 4 << 20  # larger ones are no faster to read


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a published tensor lies in a parameter.

    "hn,d->dhn": its first axis is heads times head size, its second the model width; the parameter is [D, H, N]. One
    letter is one axis; "p" counts parameters of one shape that lie in one tensor, as queries, keys and values do in
    GPT-2. Without it, the rows of several parameters follow each other (Phi-3).
    """

    published: tuple[str, ...]
    target: str

    @classmethod
    def parse(cls, text: str) -> "Layout":
        published, target = text.split("->")
        return cls(tuple(published.split(",")), target)

    @property
    def letters(self) -> str:
        """The published axes, one by one, without p."""
        return "".join(self.published).replace("p", "")

    @property
    def rows(self) -> str:
        """The letter along which blocks of published rows are read; none where p comes first."""
        return self.published[0][0].replace("p", "")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A published tensor and where it belongs."""

    name: str
    layout: Layout
    paths: tuple[str, ...]
    layer: int | None  # of stacked parameters
    all_sizes: tuple[Mapping[str, int], ...]  # for each path, of each letter; of "v" without padded rows

    @property
    def sizes(self) -> Mapping[str, int]:
        """Of each letter, in all parameters of a run."""
        return self.all_sizes[0]

    @property
    def runs(self) -> tuple["Tensor", ...]:
        """Tensors whose rows, one after the other, are those of this one."""
        if "p" in "".join(self.layout.published) or len(self.paths) == 1:
            return (self,)
        each = zip(self.paths, self.all_sizes, strict=True)
        return tuple(dataclasses.replace(self, paths=(path,), all_sizes=(sizes,)) for path, sizes in each)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is published."""
        if len(runs := self.runs) > 1:
            return (sum(run.shape[0] for run in runs), *runs[0].shape[1:])
        return tuple(math.prod(self.sizes[letter] for letter in axis) for axis in self.layout.published)


def tensors(family: Family, shapes: Mapping[str, Sequence[int]], vocab_size: int) -> list[Tensor]:
    """The tensors that a model with parameters of these shapes is published as, in the family's order."""
    out = []
    for name, text, paths in family.tensors:
        if paths[0] not in shapes:
            continue
        layout, stacked, all_sizes = Layout.parse(text), paths[0].startswith("layers/"), []
        for path in paths:
            sizes = dict(zip(layout.target, shapes[path][stacked:], strict=True)) | {"p": len(paths)}
            all_sizes.append(sizes | ({"v": vocab_size} if "v" in sizes else {}))
        for layer in range(shapes[paths[0]][0]) if stacked else [None]:
            out.append(Tensor(name.replace("*", str(layer)), layout, paths, layer, tuple(all_sizes)))
    return out


def zeros(shapes: Mapping[str, jax.ShapeDtypeStruct], places: Mapping[str, NamedSharding]) -> dict[str, jax.Array]:
    """Empty parameters to read into."""
    return jax.jit(lambda: {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items()}, out_shardings=places)()


def read(tensor: Tensor, stored: files.Stored, leaves: dict[str, jax.Array]) -> None:
    """Reads one published tensor into its place in the parameters; `leaves` gets what takes the donated ones' place."""
    start = 0
    for run in tensor.runs:
        _read_run(run, stored.part(start, run.shape[0]), leaves)
        start += run.shape[0]


def _read_run(tensor: Tensor, stored: files.Stored, leaves: dict[str, jax.Array]) -> None:
    stacked = tensor.layer is not None
    for part, path in enumerate(tensor.paths):
        leaf = leaves[path]
        axes = (*leaf.sharding.spec, *[None] * leaf.ndim)[stacked : leaf.ndim]
        spec = P(*(axes[tensor.layout.target.index(letter)] for letter in tensor.layout.letters))
        where = NamedSharding(leaf.sharding.mesh, spec)
        write = _writer(leaf.sharding, where, tensor.layout, stacked)
        for start, block in _blocks(tensor, stored, part, leaf.shape[stacked:], where):
            leaf = jax.block_until_ready(write(leaf, block, np.int32(tensor.layer or 0), np.int32(start)))
        leaves[path] = leaf  # complete before the next: blocks do not pile up before the device


@functools.cache
def _writer(where: NamedSharding, block_where: NamedSharding, layout: Layout, stacked: bool) -> Callable:
    """Puts a block into a parameter, on each device for itself."""
    order = [layout.letters.index(letter) for letter in layout.target]

    def write(leaf, block, layer, start):
        at = [start if letter == layout.rows else 0 for letter in layout.target]
        block = block.transpose(order).astype(leaf.dtype)
        return jax.lax.dynamic_update_slice(leaf, block[None] if stacked else block, [layer, *at] if stacked else at)

    specs = (where.spec, block_where.spec, P(), P())
    local = jax.shard_map(write, mesh=where.mesh, in_specs=specs, out_specs=where.spec, check_vma=False)
    return jax.jit(local, donate_argnums=0)


def _blocks(
    tensor: Tensor, stored: files.Stored, part: int, shape: Sequence[int], where: NamedSharding
) -> Iterator[tuple[int, jax.Array]]:
    """(start, block) of one parameter, in the published order of axes.

    Where the axis of the rows is spread over n shards, a block is n runs of rows, one from each shard's part: every
    device gets rows of its own, at the same place of its part. All blocks are of one size: the last overlaps.
    """
    layout = tensor.layout
    whole = tuple(shape[layout.target.index(letter)] for letter in layout.letters)
    if not layout.rows:
        values = _part(tensor, stored.rows(0, stored.shape[0]), part)
        yield 0, jax.make_array_from_callback(whole, where, lambda index: np.ascontiguousarray(values[index]))
        return
    share = where.shard_shape(whole)[0]
    shards = whole[0] // share
    row_bytes = math.prod(stored.shape) * files.DTYPES[stored.dtype].itemsize // tensor.sizes[layout.rows]
    size = min(share, max(1, BLOCK_BYTES // (row_bytes * shards)))
    for start in range(0, share, size):
        start = min(start, share - size)
        run = functools.cache(lambda i, start=start: _run(tensor, stored, part, i * share + start, size))

        def of_device(index, run=run):
            return np.ascontiguousarray(run((index[0].start or 0) // size)[:, *index[1:]])

        yield start, jax.make_array_from_callback((size * shards, *whole[1:]), where, of_device)


def _run(tensor: Tensor, stored: files.Stored, part: int, start: int, size: int) -> np.ndarray:
    """A run along the first axis of a parameter in the published order; zero where rows are not published (padding)."""
    there = tensor.sizes[tensor.layout.rows]
    rows = stored.shape[0] // there  # published rows for one of ours
    stop = min(start + size, there)
    values = _part(tensor, stored.rows(min(start, stop) * rows, stop * rows), part)
    return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1)) if len(values) < size else values


def _part(tensor: Tensor, rows: np.ndarray, part: int) -> np.ndarray:
    """Published rows with one axis for each letter, of one of the parameters that lie in them."""
    letters = "".join(tensor.layout.published)
    values = rows.reshape(-1, *(tensor.sizes[letter] for letter in letters[1:]))
    return values.take(part, letters.index("p")) if "p" in letters else values


def entry(tensor: Tensor, leaves: Mapping[str, jax.Array], dtype: str) -> files.Entry:
    """A published tensor to be written, in the format's `dtype`: a layer at a time, or in runs of rows."""
    blocks = lambda: itertools.chain.from_iterable(_written(run, leaves, dtype) for run in tensor.runs)  # noqa: E731
    return files.Entry(tensor.name, tensor.shape, blocks)


def _written(tensor: Tensor, leaves: Mapping[str, jax.Array], dtype: str) -> Iterator[np.ndarray]:
    layout, stacked = tensor.layout, tensor.layer is not None
    total = size = tensor.sizes[layout.rows] if layout.rows else 1
    if not stacked:
        row_bytes = math.prod(tensor.shape) * files.DTYPES[dtype].itemsize // total
        size = min(total, max(1, BLOCK_BYTES // row_bytes))
    reader = _reader(layout, stacked, size, dtype)
    letters = "".join(layout.published)
    for start in range(0, total, size):
        at = min(start, total - size)
        parts = [np.asarray(reader(leaves[path], np.int32(tensor.layer or 0), np.int32(at))) for path in tensor.paths]
        values = np.stack(parts, letters.index("p")) if "p" in letters else parts[0]
        if layout.rows:
            values = values[start - at :]
        yield values.reshape(-1, *tensor.shape[1:])


@functools.cache
def _reader(layout: Layout, stacked: bool, size: int, dtype: str) -> Callable:
    """Takes a layer, or a run of rows, out of a parameter and turns it to the published order of axes."""
    order = [layout.target.index(letter) for letter in layout.letters]

    def read(leaf, layer, start):
        if stacked:
            leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
        elif layout.rows:
            leaf = jax.lax.dynamic_slice_in_dim(leaf, start, size, layout.target.index(layout.rows))
        return leaf.transpose(order).astype(files.DTYPES[dtype])

    return jax.jit(read)
