"""What a run's helpers say of the rows of its data, written down once: runs that read it need no helper.

    python -m lmboost.score --config=RECIPE --config.teacher.path=RUN --config.data.train=DIR --out=TARGETS
    python -m lmboost.train --config=RECIPE --config.teacher.targets=TARGETS --config.data.train=DIR --workdir=...

  --config=FILE[:VARIANT]   the recipe of the run that is to be helped; it says by what, and in which rows of text
  --config.a.b=VALUE        overrides one field of it (lmboost/config.py lists all of them)
  --out=DIR                 where it is written; work goes on in DIR.partial, and the same command continues it
  --draws=50                for kd: how often a token is drawn from the teacher's distribution at each place, unbiased
                            (with objective.kd.top_k above 0 its best tokens are kept instead, and what is left)
  --state_bytes=128         for align: a state is kept in int8, of so many bytes at most, in the directions that hold
                            most of a sample of states; 0 is all of it
  --until=-1                only the rows that this run reads in that fraction of its steps; -1 is every row, but for
                            align the ones that are read while it is on
  --rows=8                  rows that a device reads at once
  --traceback               shows the traceback of a user error

Flags of several processes are those of lmboost.train; all of them see one OUT. One result serves any number of runs,
whatever their batch size, hosts and restarts: rows are known by their numbers. With --until, and for states, runs are
served that read these rows first.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import answers, checkpoint, config, flops, plan, sharding, teacher
from lmboost.data import loader, records, scored
from lmboost.data.scored import Parts, Reach
from lmboost.data.scoring import Unfinished, opened
from lmboost.errors import UserError, count, fraction, run_verb
from lmboost.objective import terms
from lmboost.objective.ask import make_asker, make_moments
from lmboost.run import processes
from lmboost.run.processes import say

_SAMPLE_ROWS = 64  # whose states say in which directions states lie


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(config.Flags, processes.Cluster):
    """The flags of this verb. It writes to no workdir; one may be given, as in the command of the run."""

    workdir: str = ""
    out: str = config.required("the directory that is to be written")
    draws: int = 50
    state_bytes: int = 128
    until: float = -1.0
    rows: int = 8


def score(c: ConfigDict, flags: Flags) -> None:
    """Asks the helpers of the config about the rows of its data, and writes `flags.out`.

    Raises a UserError on what the user can mend. All processes of a cluster must call it; the first one writes.
    """
    with processes.together("reading the config"):
        run = _plan(c, flags)
        mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        data = loader.Loader(
            c.data.train, "train", run.seq_len, run.order, *sharding.host_share(mesh), workers=c.data.workers
        )
        parts, reach = answers.parts_of(run, flags.draws, flags.state_bytes), _reach(run, flags)
    with jax.set_mesh(mesh):
        helpers = {name: run.helpers()[name] for name in run.needed(0)}
        params = teacher.load(helpers, mesh, c.teacher.dtype)
        about = {name: helper and _about(helper, params[name]) for name, helper in run.helpers().items()}
        about["tokenizer"] = run.train_data.tokenizer_fingerprint
        asked = about | {
            "parts": dataclasses.asdict(parts), "reach": {name: r and r._asdict() for name, r in reach.items()},
            "dtype": c.teacher.dtype, "data": list(run.train_data.fingerprints), "seed": run.seed,
        }  # fmt: skip
        work = Work(run, parts, data, mesh, params, flags.rows * sharding.batch_shards(mesh))
        work.write(flags.out, asked, about, reach)


def _about(helper: teacher.Helper, params: Any) -> dict[str, Any]:
    """What is kept of what a helper was."""
    directory, model = str(helper.saved.directory), dataclasses.asdict(helper.model)
    mark = checkpoint.fingerprint(params)
    return {"directory": directory, "model": model, "data": helper.saved.manifest["data"], "fingerprint": mark}


def _plan(c: ConfigDict, flags: Flags) -> plan.Plan:
    if c.teacher.targets:
        raise UserError(
            f"teacher.targets={c.teacher.targets!r}: this is made here; leave it empty, and give the models."
        )
    if c.teacher.random:
        raise UserError("teacher.random=True: a control needs no answers on disk; leave it out.")
    if not 1 <= flags.draws <= 255:
        raise UserError(f"--draws={flags.draws}: expected 1 to 255 draws of each token.")
    if flags.state_bytes and flags.state_bytes < 8:
        raise UserError(f"--state_bytes={flags.state_bytes}: expected at least 8, or 0 for the whole state.")
    count("--rows", flags.rows)
    if flags.until != -1:
        fraction("--until", flags.until)
    run = plan.make(c, "", jax.default_backend(), jax.device_count())
    for helper in run.helpers().values():
        if helper and helper.retokenizer:
            raise UserError(
                f"{helper.saved.field}={helper.saved.path!r} has another tokenizer than the data in {c.data.train!r}, "
                "and what it says of its own tokens cannot be written down for theirs: give it to the run itself, or "
                "score with a model of the data's tokenizer."
            )
    if not any(run.stops.values()):
        raise UserError("the objective asks for no help: set objective.kd, align or select as the run will have them.")
    return run


def _reach(run: plan.Plan, flags: Flags) -> dict[str, Reach | None]:
    """Of each group the rows that are asked about; None is all of them."""

    def first(steps: int) -> Reach:
        return Reach(run.train_data.fingerprint, run.order, run.rows.stand(steps))

    if flags.until != -1:
        return dict.fromkeys(scored.GROUPS, first(round(flags.until * run.steps)))
    if run.stops["align"] == run.steps and run.objective.auto:
        raise UserError(
            "objective.align.stop=auto does not say which rows the states are asked for: give --until, the fraction of "
            "the run in which help may last, as in --until=0.3."
        )
    states = first(run.stops["align"])
    return {"labels": None if run.stops["kd"] or run.stops["select"] else states, "states": states}


class Work:
    """The helpers of a run, ready to be asked about rows of its data.

    batch_size: rows that are asked about at once. Each device reads equally many, so that with as many rows a device
      it says the same however many devices there are.
    """

    def __init__(self, run: plan.Plan, parts: Parts, data: loader.Loader, mesh: Mesh, params: dict, batch_size: int):
        self._run, self._parts, self._data, self._mesh, self._params = run, parts, data, mesh, params
        self._batch_size, self._writes = batch_size, jax.process_index() == 0
        models = {name: helper and helper.model for name, helper in run.helpers().items()}
        objective, everywhere = run.objective, sharding.replicated(mesh)
        asker = make_asker(parts, **models, selection=objective.select, block_tokens=objective.block_tokens)
        self._ask = jax.jit(asker, out_shardings=everywhere)
        self._moments = jax.jit(make_moments(parts, models["teacher"]), out_shardings=everywhere)

    def write(self, out: str, asked: dict, about: dict, reach: Mapping[str, Reach | None]) -> None:
        """Asks about all rows within reach, shard by shard, and writes `out`; goes on where it was left."""
        with contextlib.ExitStack() as stack:
            with processes.together("opening --out"):
                unfinished = stack.enter_context(opened(out, asked, self._parts)) if self._writes else None
            if not self._of_first(unfinished and not unfinished.is_finished):
                say(f"{out} is finished, and was made with these arguments: nothing to do.")
                return
            self._write(unfinished, about, reach)

    def _write(self, unfinished: Unfinished | None, about: dict, reach: Mapping[str, Reach | None]) -> None:
        fingerprints = self._run.train_data.fingerprints
        rows = {
            group: within and dict(zip(fingerprints, self._data.first_rows(within.rows), strict=True))
            for group, within in reach.items()
        }
        bases = self._bases(unfinished, rows["states"])
        for number, fingerprint in enumerate(fingerprints):
            shards = self._data.sources[number].shards()
            for shard, span in enumerate(shards):
                if not self._of_first(unfinished and not unfinished.is_done(fingerprint, shard)):
                    continue
                mine = {group: within and within[fingerprint] for group, within in rows.items()}
                asked = self._write_shard(unfinished, bases, number, shard, span, mine)
                directory = self._run.train_data.directories[number]
                say(f"{directory}: shard {shard + 1} of {len(shards)}, {asked}")
        with processes.together("finishing"):
            self._check_data()
            if self._writes:
                counts = {f: len(source.shards()) for f, source in zip(fingerprints, self._data.sources, strict=True)}
                manifest = unfinished.finish(counts, rows, reach, about, self._flops_per_token())
                size, tokens = manifest["bytes"], manifest["tokens"]
                each = f"{size:,} bytes, {size / max(tokens, 1):.1f} a token"
                say(f"finished: {unfinished.out}, {tokens:,} tokens, {each}")

    def _write_shard(self, unfinished, bases, number: int, shard: int, span: tuple[int, int], rows: Mapping) -> str:
        """Asks about a shard's rows and writes what is said; returns how many, and how fast.

        rows: of each group, those of the data set that are kept; None is all.
        """
        every, began = np.arange(*span, dtype=np.uint32), time.perf_counter()
        wanted = {
            group: every if rows[group] is None else np.intersect1d(rows[group], every)
            for group in self._parts.groups()
        }
        union = functools.reduce(np.union1d, wanted.values())
        said = self._answers(bases, number, union)
        with processes.together("writing what the helpers said"):
            try:
                if self._writes:
                    unfinished.write(self._run.train_data.fingerprints[number], shard, wanted, said)
            finally:
                for _ in said:  # all compute together to the shard's end, also where it could not be written
                    pass
        return f"{len(union)} rows, {len(union) * self._run.seq_len / (time.perf_counter() - began):,.0f} tokens/s"

    def _of_first(self, value: Any) -> bool:
        """Whether something is true of the first process, in all of them."""
        return processes.all_true(bool(value) or not self._writes)

    def _answers(self, bases: dict, number: int, rows: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(row, what the helpers say of it) of these rows of a data set."""
        key = np.array([int(self._run.train_data.fingerprints[number][:8], 16), self._run.seed % 2**32], np.uint32)
        for i, batch in enumerate(self._data.chosen(number, rows, self._batch_size)):
            part = rows[i * self._batch_size :][: self._batch_size]
            numbers = np.zeros(self._batch_size, np.uint32)
            numbers[: len(part)] = part
            put = sharding.put_batch(batch, self._mesh) | sharding.put_rows({"row": numbers}, self._mesh)
            told = jax.device_get(self._ask(self._params, bases, put, key))
            yield from ((int(row), {name: x[j] for name, x in told.items()}) for j, row in enumerate(part))

    def _bases(self, unfinished: Unfinished | None, rows: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """The directions that hold most of the states of some rows, by layer, where states are not kept whole."""
        smaller = [state for state in self._parts.states if state.kept < state.width]
        if self._of_first(unfinished and not all(unfinished.basis(state.layer).exists() for state in smaller)):
            number = int(np.argmax([len(source) for source in self._data.sources]))
            those = (
                np.arange(len(self._data.sources[number]), dtype=np.uint32)
                if rows is None
                else [*rows.values()][number]
            )
            those = those[:: max(1, len(those) // _SAMPLE_ROWS)][:_SAMPLE_ROWS]
            moments: dict[int, Any] = {}
            for batch in self._data.chosen(number, those, self._batch_size):
                for layer, moment in self._moments(self._params, sharding.put_batch(batch, self._mesh)).items():
                    moments[layer] = moments.get(layer, 0.0) + np.asarray(moment, np.float64)
            with processes.together("writing the directions of states"):
                for state in smaller if self._writes else ():
                    vectors = np.linalg.eigh(moments[state.layer])[1][:, ::-1][:, : state.kept]
                    unfinished.write_basis(state.layer, np.ascontiguousarray(vectors, np.float32))
        found = {}
        for state in smaller:
            basis = (
                np.load(unfinished.basis(state.layer)) if self._writes else np.zeros((state.width, state.kept), "f4")
            )
            found[str(state.layer)] = np.asarray(multihost_utils.broadcast_one_to_all(basis))
        return found

    def _check_data(self) -> None:
        """Raises a UserError where a data set is not what it was at the beginning."""
        about = self._run.train_data
        for directory, fingerprint in zip(about.directories, about.fingerprints, strict=True):
            if records.read_manifest(directory)["fingerprint"] != fingerprint:
                raise UserError(
                    f"{directory} has changed while it was scored: remove what was written, and score again."
                )

    def _flops_per_token(self) -> float:
        run, models = self._run, {name: helper and helper.model for name, helper in self._run.helpers().items()}
        on = frozenset(name for name, stop in run.stops.items() if stop)
        forwards = [forward._replace(rows=1) for forward in terms.forwards(run.objective, on, models)]
        with_helpers = flops.step_flops(run.student, 1, run.seq_len, forwards)
        return (with_helpers - flops.step_flops(run.student, 1, run.seq_len)) / run.seq_len


def main(argv: list[str]) -> None:
    c, flags = config.read(argv, Flags)
    processes.start(flags)
    score(c, flags)


if __name__ == "__main__":
    run_verb(main, __doc__)
