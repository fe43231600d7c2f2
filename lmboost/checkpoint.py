"""Checkpoints with Orbax: what a run needs to go on, and what a helper needs to be loaded.

    WORKDIR/manifest.json                 what the run is: config, model, data, tokenizer, teacher, versions
    WORKDIR/checkpoints/STEP/params       the model's parameters, alone: what a teacher or an init is read from
    WORKDIR/checkpoints/STEP/training     optimizer, counters, learned maps of the alignment
    WORKDIR/checkpoints/STEP/position     where in the data the next batch begins
    WORKDIR/checkpoints/STEP/manifest     as above, so that a checkpoint can be moved by itself

Teacher parameters are in none of them. What lmboost.convert writes has params and manifest alone, with the tokenizer
beside them. Wherever a checkpoint is read, "hf:DIR" stands for a Hugging Face Hub directory in its place.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from lmboost import hf, sharding
from lmboost.errors import UserError
from lmboost.train_step import TrainState


class Checkpointer:
    """Writes a run's checkpoints in the background and reads the newest one."""

    def __init__(self, workdir: str, keep: int, keep_every: int):
        self.directory = epath.Path(os.path.abspath(workdir)) / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int, position: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Copies the state to the host and returns; the writing goes on meanwhile.

        Raises a UserError if this save or the one before failed; checkpoints written earlier are untouched.
        """
        params, training = _split(state)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            position=ocp.args.JsonSave(position),
            manifest=ocp.args.JsonSave(manifest),
        )
        with self._failures_named(f"the checkpoint of step {step}, or the one before it,"):
            self._manager.save(step, args=items)

    def restore(self, step: int, like: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """(state, position) of a checkpoint; every leaf must have the shape it has in `like`."""
        return restore_state(self.directory / str(step), like, shardings)

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises as `save` does."""
        with self._failures_named("the last checkpoint"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    @contextlib.contextmanager
    def _failures_named(self, what: str) -> Iterator[None]:
        """Turns what Orbax raises when a disk is full or gone into one clear error."""
        try:
            yield
        except Exception as error:
            steps = self.finished_steps()
            safe = f"the checkpoint of step {steps[-1]} is whole" if steps else "no checkpoint has been written yet"
            cause = str(error).strip().split("\n")[0][:300]
            raise UserError(
                f"saving {what} to {self.directory} failed ({type(error).__name__}: {cause}); {safe}. "
                "Make room or mend the disk, and start the same command again: it goes on from there."
            ) from error

    def finished_steps(self) -> list[int]:
        return sorted(ocp.utils.checkpoint_steps(self.directory))


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
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
    """The whole state in a checkpoint directory, and its data position. Raises a UserError on other shapes."""
    if not (directory / "training").exists():
        raise UserError(
            f"{directory} has parameters alone, no optimizer and no data position to go on from: give it as init.from."
        )
    parts = []
    for name, tree, places in zip(("params", "training"), _split(like), _split(shardings), strict=True):
        parts.append(_restore_tree(directory, name, tree, places))
    position = json.loads((directory / "position" / "metadata").read_text())
    return _join(*parts), position


def find(path: str, step: int = -1, field: str = "from") -> epath.Path:
    """The checkpoint directory that `path` names: itself, the one of `step` (-1: the last) of a run, or "hf:DIR"."""
    if path.startswith(hf.PREFIX):
        return hf.find(path, step, field)
    root = epath.Path(os.path.abspath(path)) if "://" not in path else epath.Path(path)
    if (root / "params").exists() and (root / "manifest").exists():
        return root
    if not (root / "checkpoints").exists() and hf.is_directory(root):
        raise UserError(f"{field}={path!r} is a Hugging Face Hub directory: give it as {hf.PREFIX}{path}.")
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
    if hf.is_directory(directory):
        return hf.read_manifest(directory)
    return json.loads((directory / "manifest" / "metadata").read_text())


def load_params(directory: epath.Path, like: Any, mesh: Mesh, dtype: str = "float32") -> Any:
    """A checkpoint's model parameters, read straight to their place on `mesh` in `dtype`.

    `like` is a tree of shapes; a UserError names the first parameter that is missing, left over, or of
    another shape. Padded rows of the vocabulary that a Hub directory does not have are zero.
    """
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), like)
    if hf.is_directory(directory):
        _check_same(directory, hf.shapes(directory, like["embed"]["embedding"].shape[0]), like)
        return hf.load_params(directory, like, mesh)[0]
    return _restore_tree(directory, "params", like, sharding.tree_sharding(like, mesh))


def _restore_tree(directory: epath.Path, item: str, like: Any, shardings: Any) -> Any:
    _check_same(directory, tree_metadata(directory, item), like)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
    return ocp.StandardCheckpointHandler().restore(directory / item, args=ocp.args.StandardRestore(target))


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

    def reduce(x):
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        places = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0) if bits.ndim else jnp.uint32(0)
        for axis in range(1, bits.ndim):
            places = places * jnp.uint32(31) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (places * 2 + 1), dtype=jnp.uint32)

    sums = jax.jit(lambda tree: jax.tree.map(reduce, tree))(params)
    shapes = [(name, tuple(x.shape), str(x.dtype)) for name, x in _named(params)]
    numbers = [int(n) for n in jax.tree.leaves(jax.tree.map(np.asarray, sums))]
    return hashlib.sha256(json.dumps([shapes, numbers]).encode()).hexdigest()
