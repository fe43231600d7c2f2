"""lmboost.train, which also writes down the batches that its devices are given: python -m tests.record FLAGS...

$RECORD/STEP-PROCESS.npz has the rows of each of the process's devices, by the number of their first row.
"""

import os
import pathlib
import sys

import jax
import numpy as np

from lmboost import train
from lmboost.errors import exit_on_user_error


def recording(directory: pathlib.Path, compile_step):
    """`jit_train_step` whose steps write down their batch."""

    def build(*arguments):
        step_fn = compile_step(*arguments)

        def run(state, helpers, batch):
            parts = {
                f"{name}@{shard.index[0].start or 0}": np.asarray(shard.data)
                for name, array in batch.items()
                for shard in array.addressable_shards
            }
            path = directory / f"{int(state.step)}-{jax.process_index()}.npz"
            np.savez(path.with_suffix(".tmp.npz"), **parts)
            path.with_suffix(".tmp.npz").rename(path)  # whole or not there: the process may be killed at any time
            return step_fn(state, helpers, batch)

        return run

    return build


def read(directory: pathlib.Path) -> dict[int, dict[str, np.ndarray]]:
    """{step: global batch} of what was written down by all processes of one attempt."""
    parts: dict[int, dict[str, np.ndarray]] = {}
    for path in directory.glob("*[0-9].npz"):
        parts.setdefault(int(path.name.split("-")[0]), {}).update(np.load(path))
    batches = {}
    for step, rows in parts.items():
        names = {name.split("@")[0] for name in rows}
        order = sorted({int(name.split("@")[1]) for name in rows})
        batches[step] = {name: np.concatenate([rows[f"{name}@{first}"] for first in order]) for name in names}
    return batches


if __name__ == "__main__":
    out = pathlib.Path(os.environ["RECORD"])
    out.mkdir(parents=True, exist_ok=True)
    train.jit_train_step = recording(out, train.jit_train_step)
    exit_on_user_error(lambda: train.main(sys.argv[1:]), show_traceback=True)
