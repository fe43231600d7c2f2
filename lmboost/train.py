"""Pretrains a language model, alone or with the help of another.

    python -m lmboost.train --config=configs/quickstart.py:helped --config.teacher.path=RUN --workdir=DIR

  --config=FILE[:VARIANT]   the recipe
  --config.a.b=VALUE        overrides one field of it (lmboost/config.py lists all of them)
  --workdir=DIR             where the run writes, local or gs://bucket/path; the same command in the same workdir goes
                            on where it stopped, on as many hosts and devices as there are now
  --traceback               shows the traceback of a user error

Of several processes, each is started with the same command, and (but for TPU pods) with

  --coordinator=HOST:PORT --num_processes=N --process_id=I    where the first one listens, and which one this is
  --multihost               instead of these: jax finds the cluster (TPU VMs, GKE, Slurm, Open MPI)
  --start_timeout=300       seconds that they wait for one another at the start
  --heartbeat_timeout=100   seconds without a sign of life after which one is taken for dead

Exit status: 0 finished; 2 a user error, with one message; 75 asked to stop by SIGTERM, saved; 76 hung, with the stacks
of all threads; anything else a crash. Launchers start the same command again unless it is 0 or 2.
"""

import contextlib
import functools
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import absl.logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import checkpoint, config, evaluate, optimizers, plan, sharding, start, teacher  # fmt: skip
from lmboost.data import loader, tokenizer
from lmboost.errors import EXIT_PREEMPTED, Stop, UserError, exit_at_once, exit_on_user_error
from lmboost.run import goodput, guard, lock, processes
from lmboost.run.checkpointer import Checkpointer, check_fingerprints, restore_state
from lmboost.run.log import RunLog
from lmboost.run.logdir import LogDir
from lmboost.run.metrics import take_over
from lmboost.run.processes import say
from lmboost.train_step import TrainState, init_params, init_state, jit_train_step


def train(c: ConfigDict, workdir: str, started: float | None = None) -> TrainState:
    """Runs the config to its end, from wherever the workdir stands; returns the last state.

    started: wall-clock time at which the attempt began; None is now.

    Raises a Stop if it is asked to stop before its end, and a UserError on what the user can mend.
    """
    # ------------------------------------------------------------------ what is asked for, checked
    started = time.time() if started is None else started
    with processes.together("reading the config"):
        run = plan.make(c, workdir, jax.default_backend(), jax.device_count())
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    say(f"student: {run.student.num_params():,} parameters, mesh {dict(mesh.shape)}")

    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        keep = lambda thing: closing.callback(thing.close) and thing  # noqa: E731
        # -------------------------------------------------------------- data
        with processes.together("opening the data and the workdir"):
            data = loader.Loader(
                c.data.train, "train", c.seq_len, c.seed, *sharding.host_share(mesh), workers=c.data.workers
            )
            validate = evaluate.Validation(
                run.student, c.data.validation or c.data.train, c.seq_len, c.batch_size, c.eval.batches, mesh,
                c.objective.block_tokens,
            )  # fmt: skip
            tasks = _tasks(run, mesh) if c.eval.tasks else None
            keep(lock.Lock(workdir))
            log_dir = keep(LogDir(workdir))
        clock = goodput.Clock(log_dir.path, started=started)
        watch = keep(guard.Watchdog(c.watchdog.seconds))
        preempted = keep(guard.Preemption())

        # -------------------------------------------------------------- state and helpers
        with clock.measure("restore"):
            tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, _shapes(run))
            checkpointer = closing.enter_context(Checkpointer(workdir, c.checkpoint, mesh))
            state, start, evaluated = _start(run, mesh, tx, checkpointer, log_dir)
            if start >= c.steps:
                say(f"the run in {workdir} is finished: {c.steps} steps")
                return state
            needed = {name: getattr(run, name) for name in teacher.needed(run.spans(), start)}
            helpers = teacher.load(needed, mesh, c.teacher.dtype, c.seed + 1 if c.teacher.random else None)
            manifest = _write_manifest(run, helpers, workdir)
        clock.begin(start)
        log = keep(RunLog(run, log_dir, clock, start))

        def evaluate_at(done: int) -> bool:
            """Validates, if it is due after so many steps; False if it was broken off to stop."""
            if done != c.steps and not (c.eval.every and done % c.eval.every == 0):
                return True
            log.pause()
            with clock.measure("evaluate"):
                values = validate(state.params["model"], preempted.told if done < c.steps else lambda: False)
            if values is not None:
                log.validation(done, values)
            return values is not None

        # -------------------------------------------------------------- the loop
        batches = keep(data.batches(run.rows, start, c.steps))
        step_fn = None
        evaluated = evaluated or evaluate_at(start)
        for step in range(start, c.steps):
            if preempted.reached(step):
                with clock.measure("save"):
                    _stop(checkpointer, state, step, start, evaluated, run, manifest, log)
            helps = run.helps(step)
            fresh = step_fn is None or helps != run.helps(step - 1)
            if fresh:
                log.pause()
                helpers = {k: v for k, v in helpers.items() if k in teacher.needed(run.spans(), step)}
                step_fn = jit_train_step(run, tx, learning_rate, helps, state)
                say(f"step {step}: training {'with ' + ', '.join(sorted(helps)) if helps else 'alone'}")
            log.profile(step)
            watch.beat(f"waiting for the data of step {step}")
            with clock.measure("data", busy=lambda: log.busy):
                batch = sharding.put_batch(next(batches), mesh)
            watch.beat(f"working on step {step}")
            with clock.measure("compile" if fresh else "step"):
                state, step_metrics = step_fn(state, helpers, batch)
            log.step(step, step_metrics)
            done = step + 1
            watch.beat(f"evaluating after step {done}")
            evaluated = evaluate_at(done)
            watch.beat(f"saving step {done}")
            if done < c.steps and checkpointer.due(done):
                log.pause()
                with clock.measure("save"):
                    checkpointer.save(state, done, run.position(done) | {"evaluated": evaluated}, manifest)
                log.saved(done)
            if tasks and done < c.steps and c.eval.tasks_every and done % c.eval.tasks_every == 0:
                log.pause()
                with clock.measure("evaluate"), watch.patient():
                    log.validation(done, tasks(state.params["model"]))

        # -------------------------------------------------------------- the end
        log.flush()
        with clock.measure("save"):
            checkpointer.finish(state, c.steps, run.position(c.steps) | {"evaluated": True}, manifest)
        if tasks:
            with clock.measure("evaluate"), watch.patient():
                log.validation(c.steps, tasks(state.params["model"]))
        log.saved(c.steps)
        say(f"time: {clock.summary()}")
    say(f"finished: {c.steps} steps, checkpoint in {checkpointer.directory / str(c.steps)}")
    return state


def _stop(checkpointer, state, done: int, start: int, evaluated: bool, run: plan.Plan, manifest, log) -> None:
    """Saves what was trained since the start, and raises the Stop that ends the process."""
    log.flush()
    if done > start:
        checkpointer.finish(state, done, run.position(done) | {"evaluated": evaluated}, manifest)
    log.saved(done)
    steps = checkpointer.finished_steps()
    raise Stop(
        f"stopped before step {done} as asked; {f'saved: step {steps[-1]}' if steps else 'nothing to save yet'}. "
        "The same command goes on from there.",
        EXIT_PREEMPTED,
    )


def _tasks(run: plan.Plan, mesh: Mesh) -> Callable[[Any], dict[str, float]]:
    """What the lm-evaluation-harness finds out about parameters; texts are read in rows of the run's length."""
    from lmboost import harness  # needs a package that is not always there

    c = run.config
    coder = tokenizer.load(run.train_data.tokenizer_path)
    length = min(c.seq_len, run.student.max_seq_len)
    lm = harness.LanguageModel(run.student, None, mesh, coder, c.batch_size, length, c.objective.block_tokens)
    return harness.in_training(lm, harness.names_of(c.eval.tasks), c.eval.tasks_include)


def _shapes(run: plan.Plan) -> Any:
    teacher = run.teacher.model if run.teacher else None
    return jax.eval_shape(lambda: init_params(run.student, run.objective, run.config.seed, teacher))


def _start(run: plan.Plan, mesh: Mesh, tx, checkpointer: Checkpointer, log_dir: LogDir) -> tuple[TrainState, int, bool]:
    """The state to go on from, its step, and whether it was evaluated.

    That of the run's own newest whole checkpoint, else resume.path, else init.path, else random.
    """
    c = run.config
    fresh = functools.partial(_fresh_state, run, tx)
    like = jax.eval_shape(fresh)
    shardings = sharding.tree_sharding(like, mesh)
    resume, init = c.resume.path, c.init.path
    found, origin = checkpointer.restore(like, shardings), "own checkpoint"
    if not found and resume:
        directory, origin = checkpoint.find(resume, c.resume.step, "resume.path"), "resume.path"
        state, position = restore_state(directory, like, shardings)
        check_fingerprints(directory, state, position)
        found = state, position, position["step"]
    if found:
        state, position, step = found
        evaluated = position.pop("evaluated", True)
        run.check_position(position, f"the {origin} of step {step}")
        if origin == "resume.path" and (old := checkpoint.Run.of(directory)):
            take_over(log_dir.path, old.workdir, step)
        say(f"start: {origin}, step {step}")
        return state, step, evaluated
    state = jax.jit(fresh, out_shardings=shardings)()
    if init:
        parent = checkpoint.Saved.find(init, c.init.step, "init.path")
        params, remarks = start.from_init(
            parent, c.init.kind, c.init.layers, c.init.fresh, run.student, run.train_data, state.params["model"], mesh
        )
        state = state.replace(params=state.params | {"model": params})
        for remark in remarks:
            say(f"init.path: {remark}")
        say(f"start: init.path {parent.directory}, step 0")
    else:
        say(f"start: random parameters, seed {c.seed}, step 0")
    return state, 0, True


def _fresh_state(run: plan.Plan, tx) -> TrainState:
    teacher = run.teacher.model if run.teacher else None
    return init_state(init_params(run.student, run.objective, run.config.seed, teacher), tx)


def _write_manifest(run: plan.Plan, helpers: dict[str, Any], workdir: str) -> dict[str, Any]:
    """Writes WORKDIR/manifest.json, with the fingerprints of the helpers; they must be those of an earlier start."""
    manifest, place = dict(run.manifest), checkpoint.Run(workdir)
    path, old = place.manifest_path, place.manifest() or {}
    for name, params in helpers.items():
        mark = checkpoint.fingerprint(params)
        before = (old.get(name) or {}).get("fingerprint", mark)
        if before != mark:
            raise UserError(
                f"the {name} in {getattr(run, name).saved.directory} is not the one that the run in {workdir} was "
                f"started with (fingerprint {before[:12]}, now {mark[:12]}): give the same checkpoint, or another "
                "workdir."
            )
        manifest[name] = manifest[name] | {"fingerprint": mark}
    for name in ("teacher", "scorer"):  # not needed any more, and not loaded
        manifest[name] = manifest[name] if name in helpers else old.get(name) or manifest[name]
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(json.dumps(manifest, indent=1))
        partial.replace(path)
    return manifest


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
    cluster, rest = processes.parse([a for a in argv if a != "--traceback"])
    c, workdir = config.load(rest)
    processes.start(cluster)
    if jax.process_count() == 1:
        train(c, workdir, goodput.process_start())
        return
    try:
        exit_on_user_error(lambda: train(c, workdir, goodput.process_start()), show_traceback="--traceback" in argv)
    except SystemExit as end:  # jax would wait for the others, which may be waiting for this one
        exit_at_once(end.code)
    except BaseException:
        traceback.print_exc()
        exit_at_once(1)


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    exit_on_user_error(lambda: main(sys.argv[1:]), show_traceback="--traceback" in sys.argv)
