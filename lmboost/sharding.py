"""Mesh and sharding: the only file that names mesh axes.

Arrays carry logical axis names; RULES maps them to the mesh axes ("data", "fsdp", "tensor"). Rows of
the batch are spread over data and fsdp; parameters, whose axes `axes.py` names, over fsdp (their model-width
axis) and tensor (heads, MLP width, vocabulary).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmboost import axes as parameter_axes
from lmboost.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# The mesh axes over which a logical axis is spread; None is whole on every device.
RULES = {
    "batch": ("data", "fsdp"),  # rows
    "length": None,  # tokens of a row
    "act_embed": None,  # features of the residual stream, in activations
    "embed": "fsdp",  # the same in parameters
    "vocab": "tensor",
    "heads": "tensor",  # of queries
    "kv_heads": "tensor",
    "mlp": "tensor",  # units
} | dict.fromkeys(("features", "heads*features", "kv_heads*features", "positions", "state", "teacher_state"))


def mesh_sizes(data: int, fsdp: int, tensor: int, num_devices: int) -> tuple[int, int, int]:
    """The sizes with a -1 replaced by the devices that are left.

    Raises a UserError where they do not make up the number of devices.
    """
    sizes = [data, fsdp, tensor]
    asked = f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}"
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{asked}: each size must be at least 1, and at most one of them -1 (what is left).")
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(num_devices // known, 1)
    if (total := math.prod(sizes)) != num_devices:
        raise UserError(
            f"{asked} asks for {total} devices, but there are {num_devices}. "
            "Choose sizes whose product is the number of devices, or -1 for one of them."
        )
    return tuple(sizes)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) over `devices` (all of them by default); sizes as in `mesh_sizes`.

    Of several TPU slices, each holds a run of the data axis: only the reduction of gradients leaves a slice.
    """
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 is on, under which the programs would be others: unset it, and start again.")
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, tensor, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data={sizes[0]} is not a multiple of the {slices} slices: the network between slices is for the "
            "data axis alone. Choose mesh.fsdp and mesh.tensor so that their product fits into one slice."
        )
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def on_cpu() -> bool:
    """Whether the devices of the mesh in use are CPUs; without one, whether jax computes on them."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.device_kind if device else jax.default_backend()) == "cpu"


def batch_shards(mesh: Mesh | None = None) -> int:
    """Into how many parts the rows of a batch are spread, on `mesh` or on the mesh in use (1 without one)."""
    return shards("batch", mesh)


def spec(axes: Sequence[str | None]) -> P:
    """The PartitionSpec of an array with these logical axes."""
    return P(*(RULES[a] if a else None for a in axes))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Tells the compiler how to lay out an activation; without a mesh in use, nothing.

    axes: for each axis of x a name out of RULES, or None for one that is whole on every device. So is an axis whose
      size the devices do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _fit(axes, x.shape, mesh))


def per_device(fn: Callable, in_axes: Sequence[Sequence[str | None]], out_axes: Sequence[str | None]) -> Callable:
    """Runs `fn` on each device's own part of its arguments (shard_map); without a mesh in use, as it is.

    The result has the shape of the first argument, or several have. As in `constrain`, an axis that does not divide
    stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn

    def run(*args):
        in_specs = tuple(_fit(axes, x.shape, mesh) for axes, x in zip(in_axes, args, strict=True))
        return jax.shard_map(
            fn, mesh=mesh, in_specs=in_specs, out_specs=_fit(out_axes, args[0].shape, mesh), check_vma=False
        )(*args)

    return run


def shards(axis: str, mesh: Mesh | None = None) -> int:
    """Into how many parts `mesh`, or the mesh in use, splits a logical axis that it divides (1 without a mesh)."""
    mesh, rule = jax.sharding.get_abstract_mesh() if mesh is None else mesh, RULES[axis] or ()
    return math.prod(mesh.shape.get(name, 1) for name in ((rule,) if isinstance(rule, str) else rule))


def _fit(axes: Sequence[str | None], shape: Sequence[int], mesh) -> P:
    """As `spec`, but an axis whose size the mesh axes do not divide stays whole."""
    return spec([a if a and size % shards(a, mesh) == 0 else None for a, size in zip(axes, shape, strict=True)])


def path_name(keys: Sequence[Any]) -> str:
    """The path of a leaf, as jax.tree_util gives it, with "/" between: "model/layers/attn/q/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def tree_sharding(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for parameters, or for any state that mirrors them (optimizer moments).

    Entries of dicts are parameters or what mirrors them, and are laid out by their names; a KeyError on a name that
    `axes.py` does not know. Those of fewer axes than their parameter has (factored statistics), and the fields
    of a state (counters), are whole on every device, and so are norms and biases of the model's width.
    """

    def leaf(keys, x):
        is_named = bool(keys) and isinstance(keys[-1], jax.tree_util.DictKey)
        axes = parameter_axes.of(path_name(keys)) if is_named else ()
        axes = axes if x.ndim >= len(axes) and axes != ("embed",) else ()
        return NamedSharding(mesh, _fit((None,) * (x.ndim - len(axes)) + axes, x.shape, mesh))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def row_axes(ndim: int) -> tuple[str | None, ...]:
    """The logical axes of rows [B], [B, T] or [B, T, ...] of a batch."""
    return ("batch", "length", *[None] * ndim)[:ndim]


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Rows of `ndim` axes over data and fsdp, all else whole."""
    return NamedSharding(mesh, spec(row_axes(ndim)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


@functools.lru_cache
def host_share(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """(shards, count): of the `count` equal runs of a batch's rows, this process reads those with these numbers.

    They need not be neighbours, as the compiler may lay a mesh over a torus in any order. Processes whose devices
    hold the same rows (a tensor axis across hosts) read the same ones.
    """
    count = batch_shards(mesh)
    places = batch_sharding(mesh).addressable_devices_indices_map((count, 1)).values()
    return tuple(sorted({rows.start or 0 for rows, _ in places})), count


def put_batch(local: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows [B, ...], those of `host_share` in ascending order, as its part of the global batch."""
    shards, count = host_share(mesh)

    def put(x):
        rows = len(x) // len(shards)

        def part(index):
            place = shards.index((index[0].start or 0) // rows)
            return x[place * rows : (place + 1) * rows]

        return jax.make_array_from_callback((rows * count, *x.shape[1:]), batch_sharding(mesh, x.ndim), part)

    return {name: put(x) for name, x in local.items()}


def batch_like(batch: dict[str, np.ndarray], rows: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and places of a global batch of so many rows like those of `batch`, to compile for."""
    return {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=batch_sharding(mesh, x.ndim))
        for name, x in batch.items()
    }


def put_rows(rows: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Rows [B, ...] that every process has in full, as a global batch; B is a multiple of `batch_shards`."""
    return {
        name: jax.make_array_from_callback(x.shape, batch_sharding(mesh, x.ndim), lambda index, x=x: x[index])
        for name, x in rows.items()
    }
