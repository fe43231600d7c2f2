"""Checkpoints with Orbax: what is in them, and how they are found and read (checkpointer.py writes those of a run).

    WORKDIR/manifest.json                 what the run is: config, model, data, tokenizer, teacher, versions
    WORKDIR/checkpoints/STEP/params       the model's parameters, alone: what a teacher or an init is read from
    WORKDIR/checkpoints/STEP/training     optimizer, counters, learned maps of the alignment
    WORKDIR/checkpoints/STEP/position     where in the data the next batch begins; fingerprints of the two above
    WORKDIR/checkpoints/STEP/manifest     as above, so that a checkpoint can be moved by itself

Teacher parameters are in none of them. What lmboost.convert writes has params and manifest alone, with the tokenizer
beside them. Wherever a checkpoint is read, "hf:DIR" stands for a Hugging Face Hub directory in its place.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding

from lmboost import places, sharding
from lmboost.errors import UserError
from lmboost.hf import reader
from lmboost.train_step import TrainState


class Damaged(UserError):
    """A checkpoint whose files are missing, cut off, or changed."""


def split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    training = {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    if "align" in state.params:
        training["align"] = state.params["align"]
    return state.params["model"], training


def _join(params: Any, training: dict[str, Any]) -> TrainState:
    tree = {"model": params}
    if "align" in training:
        tree["align"] = training["align"]
    return TrainState(training["step"], tree, training["opt_state"], training["skipped"], training["skipped_in_a_row"])


def restore_state(directory: epath.Path, like: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The whole state in a checkpoint directory, and its data position.

    Each process reads its part. Raises a UserError on other shapes, a Damaged where the files cannot be read.
    """
    if not (directory / "training").exists():
        raise UserError(
            f"{directory} has parameters alone, no optimizer and no data position to go on from: give it as init.path."
        )
    parts = []
    for name, tree, layout in zip(("params", "training"), split(like), split(shardings), strict=True):
        parts.append(_restore_tree(directory, name, tree, layout))
    return _join(*parts), _read_json(directory, "position")


def fingerprints(state: TrainState) -> dict[str, str]:
    """What is written beside a state, and what it must have when it is read again."""
    return {name: fingerprint(tree) for name, tree in zip(("params", "training"), split(state), strict=True)}


def check_fingerprints(directory: epath.Path, state: TrainState, position: dict[str, Any]) -> None:
    """Raises a Damaged where a restored state is not, bit for bit, the one that was saved. All processes must ask."""
    written = position.pop("fingerprints", None)  # checkpoints of earlier releases have none
    if written and written != (found := fingerprints(state)):
        changed = [name for name in found if found[name] != written.get(name)]
        raise Damaged(f"{directory} has changed since it was written: the bits of {' and '.join(changed)} are others.")


def find(path: str, step: int = -1, field: str = "path") -> epath.Path:
    """The checkpoint directory that `path` names: itself, the one of `step` (-1: the last) of a run, or "hf:DIR"."""
    if path.startswith(reader.PREFIX):
        return reader.find(path, step, field)
    root = places.find(path, field)
    if (root / "params").exists() and (root / "manifest").exists() and ocp.utils.is_checkpoint_finalized(root):
        return root
    if not (root / "checkpoints").exists() and reader.is_directory(root):
        raise UserError(f"{field}={path!r} is a Hugging Face Hub directory: give it as {reader.PREFIX}{path}.")
    if not (root / "checkpoints").exists():
        raise UserError(
            f"{field}={path!r} is neither a run (there is no {root / 'checkpoints'}) nor a checkpoint. "
            "Give a directory that lmboost.train wrote with --workdir, or one of its checkpoints/STEP."
        )
    steps = sorted(ocp.utils.checkpoint_steps(root / "checkpoints"))
    if not steps or step not in (-1, *steps):
        has = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no finished checkpoint"
        raise UserError(f"{field}={path!r}, step {step}: {has}.")
    return root / "checkpoints" / str(steps[-1] if step == -1 else step)


def save_params(directory: str | os.PathLike, params: Any, manifest: dict[str, Any]) -> None:
    """Writes parameters that no run has trained as a checkpoint of their own.

    Not compressed: that would hold a second copy of the model, and parameters hardly shrink.
    """
    handlers = {"params": ocp.PyTreeCheckpointHandler(use_compression=False), "manifest": ocp.JsonCheckpointHandler()}
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(params), manifest=ocp.args.JsonSave(manifest))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(epath.Path(directory), args=items)


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """The manifest inside a checkpoint. That of a model from the Hub has no "config", as no run of ours made it."""
    if reader.is_directory(directory):
        return reader.read_manifest(directory)
    return _read_json(directory, "manifest")


def _read_json(directory: epath.Path, item: str) -> dict[str, Any]:
    try:
        return json.loads((directory / item / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(directory / item / "metadata", error) from error


def load_params(directory: epath.Path, like: Any, mesh: Mesh, dtype: str = "float32") -> Any:
    """A checkpoint's model parameters, read straight to their place on `mesh` in `dtype`.

    `like` is a tree of shapes; a UserError names the first parameter that is missing, left over, or of
    another shape. Padded rows of the vocabulary that a Hub directory does not have are zero.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), like)
    if reader.is_directory(directory):
        _check_same(directory, reader.shapes(directory, like["embed"]["embedding"].shape[0]), like)
        return reader.load_params(directory, like, mesh)[0]
    return _restore_tree(directory, "params", like, sharding.tree_sharding(like, mesh))


def _restore_tree(directory: epath.Path, item: str, like: Any, shardings: Any) -> Any:
    try:
        found = tree_metadata(directory, item)
    except Exception as error:  # what damage shows as is up to Orbax and TensorStore
        raise _damaged(directory / item, error) from error
    _check_same(directory, found, like)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
    try:
        return ocp.StandardCheckpointHandler().restore(directory / item, args=ocp.args.StandardRestore(target))
    except (MemoryError, jax.errors.JaxRuntimeError):  # nothing is wrong with the files
        raise
    except Exception as error:
        raise _damaged(directory / item, error) from error


def _damaged(path: epath.Path, error: Exception) -> Damaged:
    while inner := error.__cause__ or error.__context__:  # the innermost says which file
        error = inner
    cause = str(error).strip().split("\n")[0][:300]
    return Damaged(f"{path} cannot be read ({type(error).__name__}: {cause}): the checkpoint is damaged.")


def _check_same(directory: epath.Path, found: Any, wanted: Any) -> None:
    """Raises a UserError on the first leaf that the tree in a directory has not, has besides, or in another shape."""
    found, wanted = dict(_named(found)), dict(_named(wanted))
    for name in sorted({*found, *wanted}):
        if name not in found or name not in wanted:
            where = "is missing in" if name in wanted else "is left over in"
            raise UserError(f"parameter {name!r} {where} {directory}: it belongs to another model or optimizer.")
        if tuple(found[name].shape) != tuple(wanted[name].shape):
            raise UserError(
                f"parameter {name!r} has shape {tuple(found[name].shape)} in {directory}, but the config "
                f"asks for {tuple(wanted[name].shape)}: give the config of the checkpoint's model."
            )


def tree_metadata(directory: epath.Path, item: str) -> Any:
    """The tree of a checkpoint's item ("params", "training"), with shapes and dtypes; reads no arrays."""
    return ocp.StandardCheckpointHandler().metadata(directory / item).tree


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) with every kind of key written alike, as Orbax's own metadata is."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if hasattr(leaf, "shape"):
            yield sharding.path_name(keys), leaf


def fingerprint(params: Any) -> str:
    """sha256 over every parameter's bits, the same on any mesh.

    Bits are reduced on the devices by wrapping integer sums, plain and weighted by place, which no order
    of summation changes.
    """

    shapes = [(name, tuple(x.shape), str(x.dtype)) for name, x in _named(params)]
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(x.sharding, NamedSharding)), None)
    numbers = [int(n) for n in jax.tree.leaves(jax.device_get(_sums_of_bits(mesh)(params)))]
    return hashlib.sha256(json.dumps([shapes, numbers]).encode()).hexdigest()


@functools.lru_cache  # one compilation for all saves of a run
def _sums_of_bits(mesh: Mesh | None) -> Callable[[Any], Any]:
    def reduce(x):
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        places = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0) if bits.ndim else jnp.uint32(0)
        for axis in range(1, bits.ndim):
            places = places * jnp.uint32(31) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (places * 2 + 1), dtype=jnp.uint32)

    everywhere = {"out_shardings": sharding.replicated(mesh)} if mesh else {}
    return jax.jit(lambda tree: jax.tree.map(reduce, tree), **everywhere)


PACKAGES = ("lmboost", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions; "source" for a package that runs from a checkout."""
    installed = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    return {p: metadata.version(p) if p in installed else "source" for p in packages}
