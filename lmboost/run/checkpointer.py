"""Writes a run's checkpoints in the background, and reads back the newest one that is whole.

A save that fails does not end the run: it is reported and tried again. What each process sees of its own (an error, a
clock) is agreed upon, because all of them save at the same step or none does.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import checkpoint, places
from lmboost.errors import Stop, UserError
from lmboost.run import processes
from lmboost.train_step import TrainState

LAST_ATTEMPTS = 3  # of the save at the end of a run; before the end there is no limit
_LOSS = "val_loss"  # in the item "metrics" of a checkpoint
MIN_PIECE_BYTES = 1 << 20  # of an array that several devices write in pieces: each piece costs a compiled program


class Checkpointer:
    """The checkpoints of one run.

    Args:
      workdir: the run's; local or remote.
      c: the config's `checkpoint` subtree.
      mesh: of the run.
    """

    def __init__(self, workdir: str, c: ConfigDict, mesh: Mesh):
        self._run = checkpoint.Run(workdir)
        self.directory = self._run.checkpoints
        self._c, self._wish = c, processes.Wish(mesh)
        self._report_unfinished()
        self._open()
        self._saved = None  # step of the last save that has begun and not failed
        self._failure = None  # (time, message) of the last save, if it failed and was not tried again yet
        self._broken = False  # whether the manager is to be opened anew
        self._time = time.monotonic()
        self._proven = False  # whether a checkpoint of this run has been read
        self._shapes: dict[str, Any] = {}  # of what was saved last

    def _open(self) -> None:
        managers = ocp.checkpoint_managers
        kept = [managers.LatestN(n=self._c.keep)]
        if self._c.keep_every:
            kept.append(managers.EveryNSteps(interval_steps=self._c.keep_every))
        if self._c.keep_best:
            best = {"n": self._c.keep_best, "keep_checkpoints_without_metrics": False}
            kept.append(managers.BestN(get_metric_fn=_goodness, **best))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(kept),
            best_fn=_goodness if self._c.keep_best else None,  # or losses are not written
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=600),
        )
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=MIN_PIECE_BYTES)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        handlers = {
            **{name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for name in ("params", "training")},
            **{name: ocp.JsonCheckpointHandler() for name in ("position", "manifest")},
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _report_unfinished(self) -> None:
        if jax.process_index() or not self.directory.exists():
            return
        finished = {str(step) for step in self._run.steps()}
        for path in self.directory.iterdir():
            step = path.name.split(".")[0]
            if step.isdigit() and path.name not in finished:
                processes.warn(f"the checkpoint of step {step} was not finished when the run ended; it is removed.")

    def restore(self, like: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any], int] | None:
        """(state, data position, step) of the newest checkpoint that is whole; None if there is no checkpoint.

        Newer ones that are damaged are named and moved to WORKDIR/damaged-STEP. Raises a UserError if all of them are.
        """
        damaged = []
        for step in self._run.steps()[::-1]:
            directory = self._run.at(step)
            found = self._try(restore_state, directory, like, shardings)
            error = found if isinstance(found, Exception) else self._try(check_fingerprints, directory, *found)
            if error:
                damaged.append((step, error))
                continue
            self._put_aside(damaged)
            self._saved, self._proven = step, True
            return *found, step
        if damaged:
            reasons = "; ".join(str(error) for _, error in damaged)
            raise UserError(
                f"none of the checkpoints in {self.directory} can be read ({reasons}). Nothing was changed: mend them, "
                "or start anew in another workdir, with resume.path or init.path if there is a copy."
            )
        return None

    def _try(self, part: Callable, *args: Any) -> Any:
        """The result of a part that every process does, or an error if it failed in any of them."""
        result = None
        try:
            result = part(*args)
        except UserError as error:
            result = error
        if not processes.all_true(not isinstance(result, UserError)) and not isinstance(result, UserError):
            return checkpoint.Damaged("another process could not read its part of it.")
        return result

    def _put_aside(self, damaged: list[tuple[int, Exception]]) -> None:
        if not damaged:
            return
        for step, error in damaged:
            target = self._aside(step)
            processes.warn(f"{error} It is put aside as {target}, and the one before it is used.")
            if jax.process_index() == 0:
                self._run.at(step).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are put aside")
        self._manager.reload()

    def _aside(self, step: int) -> epath.Path:
        """A place for a damaged checkpoint, where none is yet."""
        for n in itertools.count():
            path = self._run.workdir / (f"damaged-{step}-{n}" if n else f"damaged-{step}")
            if not path.exists() and not os.path.islink(path):
                return path

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps. All processes must ask at every boundary."""
        now = time.monotonic()
        late = 0 < self._c.seconds <= now - self._time
        self._poll()
        again = self._failure is not None and now - self._failure[0] >= self._c.retry_seconds
        wished = self._wish.exchange(late or again)
        return wished or done % self._c.every == 0

    def save(
        self,
        state: TrainState,
        done: int,
        position: dict[str, Any],
        manifest: dict[str, Any],
        loss: float | None = None,
    ) -> None:
        """Copies the state to the host and returns; the writing goes on meanwhile. A failure is reported.

        `position` is where the data stands and `manifest` what the run is, as `Plan` says: JSON, kept beside the state.
        `loss` is that of the validation after these steps, if there was one: by it the best are kept.
        """
        self._settle()
        if self._saved == done and self._failure is None:
            return
        trees = {name: ocp.args.PyTreeSave(tree) for name, tree in split(state).items()}
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), split(state))
        position = ocp.args.JsonSave(position | {"fingerprints": fingerprints(state, position)})
        items = ocp.args.Composite(**trees, position=position, manifest=ocp.args.JsonSave(manifest))
        self._saved, self._time = done, time.monotonic()
        self._failure = None
        if self._broken:
            self.close()
            self._broken = False
            self._attempt(self._open)
        if not self._broken:
            metrics = None if loss is None else {_LOSS: loss}
            self._attempt(lambda: self._manager.save(done, args=items, metrics=metrics, force=True))

    def finish(self, state: TrainState, done: int, *what: Any) -> None:
        """As `save`, unless these steps are saved, and waits until it is on disk. Raises a UserError if that fails.

        It is tried LAST_ATTEMPTS times, `retry_seconds` apart.
        """
        for attempt in range(LAST_ATTEMPTS):
            if attempt:
                time.sleep(self._c.retry_seconds)
            self.save(state, done, *what)
            self._settle()
            if self._failure is None:
                return
        steps = self._run.steps()
        safe = f"the checkpoint of step {steps[-1]} is whole" if steps else "no checkpoint has been written yet"
        raise UserError(
            f"saving the checkpoint of step {done} to {self.directory} failed {LAST_ATTEMPTS} times "
            f"({self._failure[1]}); {safe}. Make room or mend the disk, and start the same command again: it goes on "
            "from there."
        )

    def best(self) -> tuple[int, float] | None:
        """(step, validation loss) of the best checkpoint that is kept for it; None where none is."""
        step = self._manager.best_step() if self._c.keep_best and not self._broken else None
        return None if step is None else (step, self._manager.metrics(step)[_LOSS])

    def _poll(self) -> None:
        """Takes notice of a save in the background that has failed since."""
        if not self._broken:
            try:
                self._manager.check_for_errors()
            except Exception as error:
                self._fail(error)

    def _settle(self) -> None:
        """Waits for the save in the background; the first of a run must be found again."""
        self._attempt(self._wait)

    def _wait(self) -> None:
        if self._broken:
            return
        self._manager.wait_until_finished()
        if self._shapes and not self._proven and self._failure is None:
            directory = self._run.at(self._saved)
            for name, shapes in self._shapes.items():
                checkpoint.check_same(directory, checkpoint.tree_metadata(directory, name), shapes)
            for name in ("position", "manifest"):
                checkpoint.read_json(directory, name)
            self._proven = True

    def _attempt(self, part: Callable[[], Any]) -> None:
        """Does a part of a save; a failure in any process breaks the manager in all of them."""
        try:
            part()
        except Exception as error:
            self._fail(error)
        if not processes.all_true(not self._broken) and not self._broken:
            self._failure, self._broken = (time.monotonic(), "it failed in another process"), True

    def _fail(self, error: Exception) -> None:
        cause = places.brief(error)
        if not self._broken:
            processes.warn(
                f"saving the checkpoint of step {self._saved} failed ({cause}). The run goes on, and saves again in "
                f"{self._c.retry_seconds:g} s or when the next is due. Whole checkpoints: {self._run.steps()}."
            )
        self._failure, self._broken = (time.monotonic(), cause), True

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # A process that failed alone does not wait for what it does with the others.
        if kind is None or issubclass(kind, Stop) or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self._manager.close()
        except Exception as error:
            self._fail(error)


def _goodness(metrics: dict[str, float]) -> float:
    """What Orbax keeps the largest of: the lower the loss, the larger; one that is lost is worst."""
    return -metrics[_LOSS] if math.isfinite(metrics[_LOSS]) else -math.inf


def split(state: TrainState) -> dict[str, Any]:
    """The items "params" and "training" of a checkpoint: the model's parameters, and what else the run changes."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    rest = {name: x for name, x in fields.items() if x is not None}  # a watch, where no help ends by itself
    learned = dict(rest.pop("params"))
    return {"params": learned.pop("model"), "training": rest | learned}


def _join(params: Any, training: dict[str, Any]) -> TrainState:
    fields = {field.name for field in dataclasses.fields(TrainState)}
    learned = {name: x for name, x in training.items() if name not in fields}
    rest = {name: x for name, x in training.items() if name in fields}
    return TrainState(params={"model": params} | learned, **rest)


def restore_state(directory: epath.Path, like: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The whole state in a checkpoint directory, and its data position.

    Each process reads its part. Raises a UserError on other shapes, a Damaged where the files cannot be read.
    """
    if not (directory / "training").exists():
        raise UserError(
            f"{directory} has parameters alone, no optimizer and no data position to go on from: give it as init.path."
        )
    layouts = split(shardings)
    trees = {name: checkpoint.restore_tree(directory, name, tree, layouts[name]) for name, tree in split(like).items()}
    return _join(**trees), checkpoint.read_json(directory, "position")


def fingerprints(state: TrainState, position: dict[str, Any]) -> dict[str, str]:
    """What is written beside a state and its position, and what they must have when they are read again."""
    told = json.dumps(position, sort_keys=True).encode()
    trees = {name: checkpoint.fingerprint(tree) for name, tree in split(state).items()}
    return trees | {"position": hashlib.sha256(told).hexdigest()}


def check_fingerprints(directory: epath.Path, state: TrainState, position: dict[str, Any]) -> None:
    """Raises a Damaged where a restored state or position is not, bit for bit, what was saved.

    All processes must ask.
    """
    written = position.pop("fingerprints", {})  # checkpoints of earlier releases have none, or none of the position
    found = fingerprints(state, position)
    if changed := [name for name in found if found[name] != written.get(name, found[name])]:
        raise checkpoint.Damaged(
            f"{directory} has changed since it was written: the bits of {' and '.join(changed)} are others."
        )
