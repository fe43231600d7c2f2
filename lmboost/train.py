"""Pretrains a language model, alone or with the help of another.

    python -m lmboost.train --config=configs/quickstart.py:helped --config.teacher.from=RUN --workdir=DIR

  --config=FILE[:VARIANT]   the recipe
  --config.a.b=VALUE        overrides one field of it (lmboost/config.py lists all of them)
  --workdir=DIR             where the run writes; the same command in the same workdir goes on where it stopped
  --traceback               shows the traceback of a user error

A user error ends with one message and exit status 2.
"""

import contextlib
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import absl.logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import checkpoint, config, evaluate, flops, metrics, optimizers, plan, sharding, start
from lmboost.data import loader, tokenizer
from lmboost.errors import UserError, exit_on_user_error
from lmboost.models import transformer
from lmboost.train_step import TrainState, init_params, init_state, make_train_step

# Fields that every training line of metrics.jsonl has, null where there is no such number.
FIELDS = ("loss", "ce", "kd", "align", "kept_fraction", "grad_norm", "learning_rate", "tokens_per_second", "mfu")


def train(c: ConfigDict, workdir: str) -> TrainState:
    """Runs the config to its end, from wherever the workdir stands; returns the last state."""
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda *_: None

    # ------------------------------------------------------------------ what is asked for, checked
    run = plan.make(c, workdir, jax.default_backend(), jax.device_count())
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    say(f"student: {run.student.num_params():,} parameters, mesh {dict(mesh.shape)}")

    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        # -------------------------------------------------------------- data
        shard_index, shard_count = sharding.host_share(mesh)
        data = loader.Loader(c.data.train, "train", c.seq_len, c.seed, shard_index, shard_count, c.data.workers)
        validate = evaluate.Validation(
            run.student, c.data.validation or c.data.train, c.seq_len, c.batch_size, c.eval.batches, mesh,
            c.objective.block_tokens,
        )  # fmt: skip
        tasks = _tasks(run, mesh) if c.eval.tasks else None

        # -------------------------------------------------------------- state and helpers
        teacher = run.teacher.model if run.teacher else None
        shapes = jax.eval_shape(lambda: init_params(run.student, run.objective, c.seed, teacher))
        tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, shapes)
        checkpointer = checkpoint.Checkpointer(workdir, c.checkpoint.keep, c.checkpoint.keep_every)
        closing.callback(checkpointer.close)
        state, start = _start(run, mesh, tx, checkpointer, say)
        if start >= c.steps:
            say(f"the run in {workdir} is finished: {c.steps} steps")
            return state
        helpers = _load_helpers(run, start, mesh, say)
        manifest = _write_manifest(run, helpers, workdir)
        log = _Log(run, workdir, start)
        closing.callback(log.close)

        # -------------------------------------------------------------- the loop
        batches = data.batches(run.rows, start, c.steps)
        closing.callback(batches.close)
        step_fn = None
        for step in range(start, c.steps):
            helps = run.helps(step)
            if step_fn is None or helps != run.helps(step - 1):
                log.pause()
                helpers = {k: v for k, v in helpers.items() if k in _helpers_needed(run, step)}
                step_fn = _compile(run, tx, learning_rate, helps, state)
                say(f"step {step}: training {'with ' + ', '.join(sorted(helps)) if helps else 'alone'}")
            log.profile(step)
            batch = sharding.put_batch(next(batches), mesh)
            state, step_metrics = step_fn(state, helpers, batch)
            log.step(step, step_metrics)
            done = step + 1
            if done == c.steps or (c.eval.every and done % c.eval.every == 0):
                log.validation(done, validate(state.params["model"]))
                log.pause()
            if done == c.steps or done % c.checkpoint.every == 0:
                log.pause()
                checkpointer.save(state, done, run.position(done), manifest)
            if tasks and (done == c.steps or (c.eval.tasks_every and done % c.eval.tasks_every == 0)):
                log.validation(done, tasks(state.params["model"]))
                log.pause()

        # -------------------------------------------------------------- the end
        log.flush()
        checkpointer.wait()
    say(f"finished: {c.steps} steps, checkpoint in {checkpointer.directory / str(c.steps)}")
    return state


def _tasks(run: plan.Plan, mesh: Mesh) -> Callable[[Any], dict[str, float]]:
    """What the lm-evaluation-harness finds out about parameters; texts are read in rows of the run's length."""
    from lmboost import harness  # needs a package that is not always there

    c = run.config
    coder = tokenizer.load(run.train_data.tokenizer_path)
    length = min(c.seq_len, run.student.max_seq_len)
    lm = harness.LanguageModel(run.student, None, mesh, coder, c.batch_size, length, c.objective.block_tokens)
    return harness.in_training(lm, harness.names_of(c.eval.tasks), c.eval.tasks_include)


def _start(run: plan.Plan, mesh: Mesh, tx, checkpointer: checkpoint.Checkpointer, say) -> tuple[TrainState, int]:
    """The state to go on from and its step: own checkpoint, else resume.from, else init.from, else random."""
    c = run.config
    fresh = functools.partial(_fresh_state, run, tx)
    like = jax.eval_shape(fresh)
    shardings = sharding.tree_sharding(like, mesh)
    own, resume, init = checkpointer.latest_step, c.resume["from"], c.init["from"]
    if own is not None or resume:
        directory = (
            checkpointer.directory / str(own) if own is not None else checkpoint.find(resume, field="resume.from")
        )
        state, position = checkpoint.restore_state(directory, like, shardings)
        step = position["step"]
        if position != run.position(step):
            raise UserError(
                f"{directory} stands at data position {position}, but this config is at {run.position(step)} there: "
                "the rows that follow would not be the ones that have not been seen."
            )
        say(f"start: {'own checkpoint' if own is not None else 'resume.from'}, step {step} ({directory})")
        return state, step
    state = jax.jit(fresh, out_shardings=shardings)()
    if init:
        params, remarks = start.from_init(run, state.params["model"], mesh)
        state = state.replace(params=state.params | {"model": params})
        for remark in remarks:
            say(f"init.from: {remark}")
        say(f"start: init.from {checkpoint.find(init, c.init.step, 'init.from')}, step 0")
    else:
        say(f"start: random parameters, seed {c.seed}, step 0")
    return state, 0


def _fresh_state(run: plan.Plan, tx) -> TrainState:
    teacher = run.teacher.model if run.teacher else None
    return init_state(init_params(run.student, run.objective, run.config.seed, teacher), tx)


def _helpers_needed(run: plan.Plan, step: int) -> set[str]:
    """Which helpers' parameters are needed in this step or a later one."""
    later = frozenset().union(*(helps for _, end, helps in run.spans() if end > step))
    return ({"teacher"} if later & {"kd", "align"} else set()) | ({"scorer"} if "select" in later else set())


def _load_helpers(run: plan.Plan, step: int, mesh: Mesh, say) -> dict[str, Any]:
    """Parameters of teacher and scorer, in their own dtype, spread over the mesh. One copy if they are one model."""
    loaded, dtype = {}, run.config.teacher.dtype
    for name in sorted(_helpers_needed(run, step)):
        helper = getattr(run, name)
        same = [other for other in loaded if getattr(run, other).directory == helper.directory]
        if same:
            loaded[name] = loaded[same[0]]
            say(f"{name}: the same parameters as the {same[0]}")
            continue
        init = functools.partial(transformer.init, helper.model, jax.random.key(run.config.seed + 1))
        like = jax.eval_shape(init)
        if run.config.teacher.random:
            cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))
            loaded[name] = jax.device_put(cast(init()), sharding.tree_sharding(like, mesh))
        else:
            loaded[name] = checkpoint.load_params(helper.directory, like, mesh, dtype)
        origin = "random parameters" if run.config.teacher.random else helper.directory
        say(f"{name}: {helper.model.num_params():,} parameters in {dtype}, {origin}")
    return loaded


def _write_manifest(run: plan.Plan, helpers: dict[str, Any], workdir: str) -> dict[str, Any]:
    """Writes WORKDIR/manifest.json, with the fingerprints of the helpers; they must be those of an earlier start."""
    manifest, path = dict(run.manifest), os.path.join(workdir, "manifest.json")
    old = plan.read_manifest(workdir) or {}
    for name, params in helpers.items():
        mark = checkpoint.fingerprint(params)
        before = (old.get(name) or {}).get("fingerprint", mark)
        if before != mark:
            raise UserError(
                f"the {name} in {getattr(run, name).directory} is not the one that the run in {workdir} was started "
                f"with (fingerprint {before[:12]}, now {mark[:12]}): give the same checkpoint, or another workdir."
            )
        manifest[name] = manifest[name] | {"fingerprint": mark}
    for name in ("teacher", "scorer"):  # not needed any more, and not loaded
        manifest[name] = manifest[name] if name in helpers else old.get(name) or manifest[name]
    if jax.process_index() == 0:
        partial = path + ".tmp"
        with open(partial, "w") as file:
            json.dump(manifest, file, indent=1)
        os.replace(partial, path)
    return manifest


def _compile(run: plan.Plan, tx, learning_rate, helps: frozenset[str], state: TrainState) -> Callable:
    """The jitted step for the helps of one phase."""
    step_fn = make_train_step(
        run.student, tx, learning_rate, run.objective, helps,
        run.teacher.model if run.teacher else None, run.scorer.model if run.scorer else None, run.config.accumulation,
    )  # fmt: skip
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


class _Log:
    """Numbers of a run: console, metrics.jsonl, TensorBoard, profiler.

    A step's metrics are fetched while the next step runs, so that the device never waits for the host.
    """

    def __init__(self, run: plan.Plan, workdir: str, start: int):
        self._run, self._start, self._workdir = run, start, workdir
        self._writers = metrics.Writers(workdir, run.config.log.tensorboard, start)
        self._progress = metrics.Progress(run.config.steps, start)
        self._pending = None
        self._clock = None  # (step, time) when the last logged step was done
        self._profiling = False

    def step(self, step: int, step_metrics: metrics.Sums) -> None:
        """Takes the metrics of `step`, which may still be running, and writes those of the step before."""
        self.flush()
        every, done = self._run.config.log.every, step + 1
        if done % every == 0 or done in (self._start + 1, self._run.config.steps):
            self._pending = (done, step_metrics)

    def flush(self) -> None:
        """Writes what is pending; waits for its step."""
        if self._pending is None:
            return
        (done, sums), self._pending = self._pending, None
        values = metrics.mean(jax.device_get(sums))
        c, now = self._run.config, time.monotonic()
        if self._clock:
            steps, seconds = done - self._clock[0], now - self._clock[1]
            values["tokens_per_second"] = steps * c.batch_size * c.seq_len / seconds
            rate = (self._run.flops(done) - self._run.flops(done - steps)) / seconds
            values["mfu"] = flops.mfu(rate, jax.devices()[0].device_kind, jax.device_count())
        self._clock = (done, now)
        self._writers.write(done, {n: values.get(n) for n in FIELDS} | self._progressed(done) | values)
        self._progress.update(done, values)
        if values["skipped_in_a_row"] >= c.max_nonfinite:
            raise UserError(
                f"step {done}: the loss or its gradient was not finite in {values['skipped_in_a_row']:.0f} steps in a "
                f"row (max_nonfinite={c.max_nonfinite}); those steps were skipped and the parameters are as before "
                "them. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or set optimizer.clip_norm."
            )

    def validation(self, done: int, values: dict[str, float]) -> None:
        """Writes the numbers of an evaluation after `done` steps."""
        self.flush()
        self._writers.write(done, self._progressed(done) | values)
        self._progress.evaluation(done, values)

    def profile(self, step: int) -> None:
        """Starts and ends the profiler trace that the config asks for."""
        first, length = self._run.config.log.profile_from, self._run.config.log.profile_steps
        if step == first:
            jax.profiler.start_trace(os.path.join(self._workdir, "profile"))
            self._profiling = True
        elif self._profiling and step >= first + length:
            self._end_profile()

    def pause(self) -> None:
        """Leaves the time until the next logged step out of tokens per second: evaluation, saving, compiling."""
        self.flush()
        self._clock = None

    def close(self) -> None:
        """Closes the files; what is still pending is not waited for."""
        self._end_profile()
        self._progress.close()
        self._writers.close()

    def _end_profile(self) -> None:
        if self._profiling:
            jax.profiler.stop_trace()
        self._profiling = False

    def _progressed(self, done: int) -> dict[str, float]:
        c = self._run.config
        return {"tokens": done * c.batch_size * c.seq_len, "flops": self._run.flops(done)}


def _quiet_libraries() -> None:
    """Leaves it to the final error to say what went wrong.

    When a save fails, Orbax and asyncio log tracebacks before it raises, and TensorStore's own threads print what
    their callbacks met. All of it is told again, shorter, by the error that ends the run.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


def main(argv: list[str]) -> None:
    if "--traceback" not in argv:
        _quiet_libraries()
    train(*config.load([a for a in argv if a != "--traceback"]))


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    exit_on_user_error(lambda: main(sys.argv[1:]), show_traceback="--traceback" in sys.argv)
