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

Exit status: 0 finished; 2 a user error, with one message; 75 asked to stop by SIGTERM, SIGINT (Ctrl-C) or SIGHUP,
saved; 76 hung, with the stacks of all threads; anything else a crash. Launchers start the same command again unless it
is 0 or 2.
"""

if __name__ == "__main__":  # a notice to stop may come while the others are imported
    from lmboost.run import notice

    notice.listen()

import contextlib
import dataclasses
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import absl.logging
import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import answers, checkpoint, config, evaluate, going_on, optimizers, places, plan, sharding, start, teacher
from lmboost.data import loader, tokenizer
from lmboost.errors import EXIT_PREEMPTED, Stop, UserError, exit_at_once, exit_on_user_error, run_verb
from lmboost.objective import auto
from lmboost.run import goodput, guard, lock, processes
from lmboost.run.checkpointer import Checkpointer, check_fingerprints, restore_state
from lmboost.run.log import Parts, RunLog, Settings
from lmboost.run.logdir import LogDir
from lmboost.run.metrics import take_over
from lmboost.run.processes import say, warn
from lmboost.train_step import TrainState, init_state, jit_train_step


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

    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:

        def keep(thing: Any) -> Any:
            """The thing, which is closed at the end, the newest first."""
            return stack.enter_context(contextlib.closing(thing))

        # -------------------------------------------------------------- data
        with processes.together("opening the data and the workdir"):
            data = loader.Loader(
                c.data.train, "train", c.seq_len, run.order, *sharding.host_share(mesh), workers=c.data.workers
            )
            validate = evaluate.Validation(
                run.student, c.data.validation or c.data.train, c.seq_len, c.batch_size, c.eval.batches, mesh,
                c.objective.block_tokens,
            )  # fmt: skip
            tasks = _tasks(c, run, mesh) if c.eval.tasks else None
            held = keep(lock.Lock(workdir))
            log_dir = keep(LogDir(workdir))
        clock = goodput.Clock(log_dir.path, started=started)
        watch = keep(guard.Watchdog(c.watchdog.seconds))
        preempted = keep(guard.Preemption())

        # -------------------------------------------------------------- state and helpers
        with clock.measure("restore"):
            tx, learning_rate = optimizers.make_optimizer(c.optimizer, c.steps, jax.eval_shape(run.init_params))
            checkpointer = stack.enter_context(Checkpointer(workdir, c.checkpoint, mesh))
            state, first, evaluated = _start(c, run, mesh, tx, checkpointer, log_dir)
            if first >= c.steps:
                say(f"the run in {workdir} is finished: {c.steps} steps")
                _check_last(state)
                return state
            if state.watch:
                run = run.ended(int(state.watch.ended))
            helpers = _load_helpers(c, run, mesh, first)
            manifest = _write_manifest(run, helpers, workdir)
        clock.begin(first)
        spent = lambda done: run.flops(done)  # noqa: E731, of the plan as it is then: help may have ended since
        name = places.name_of(workdir)
        asked = Settings(c.steps, run.tokens, spent, c.max_nonfinite, name, manifest, **c.log)
        log = keep(RunLog(asked, log_dir, clock, first))
        part = Parts(watch, clock, log)
        losses: dict[int, float] = {}  # of validations, by the steps done

        def evaluate_at(done: int) -> bool:
            """Validates, if it is due after so many steps; False if it was broken off to stop."""
            if done != c.steps and not (c.eval.every and done % c.eval.every == 0):
                return True
            with part(f"evaluating after step {done}", "evaluate", pause=True):
                values = validate(state.params["model"], preempted.told if done < c.steps else lambda: False)
            if values is not None:
                losses[done] = values["val_loss"]
                log.validation(done, values)
            return values is not None

        def save_at(done: int, save: Callable[..., None]) -> None:
            with part(f"saving step {done}", "save", pause=True):
                held.check()
                log.check()
                _keep_manifest(manifest, workdir)
                cost = {"tokens": run.tokens(done), "flops": run.flops(done)}
                position = run.position(done) | {"evaluated": evaluated, "spent": cost}
                save(state, done, position, manifest, losses.get(done))
            log.saved(done)

        def tasks_at(done: int) -> None:
            if tasks and (done == c.steps or (c.eval.tasks_every and done % c.eval.tasks_every == 0)):
                with part(f"evaluating tasks after step {done}", "evaluate", pause=True, patient=True):
                    values = tasks(state.params["model"])
                log.validation(done, values)

        # -------------------------------------------------------------- the loop
        def batches_from(step: int):
            reads = run.groups(step), run.retokenizers(step)
            return keep(data.batches(run.rows, step, c.steps, run.scored, *reads)), reads

        batches, reads = batches_from(first)
        step_fn = told = None
        evaluated = evaluated or evaluate_at(first)
        for step in range(first, c.steps):
            if preempted.reached(step):
                if step > first:
                    save_at(step, checkpointer.finish)
                steps = checkpoint.Run(workdir).steps()
                saved = f"saved: step {steps[-1]}" if steps else "nothing to save yet"
                goes_on = "The same command goes on from there."
                raise Stop(f"stopped before step {step} as asked; {saved}. {goes_on}", EXIT_PREEMPTED)
            span = run.span(step)
            fresh = step_fn is None or step == span.first
            if fresh:
                log.pause()
                helpers = {name: helpers[name] for name in run.needed(step)}
                if (run.groups(step), run.retokenizers(step)) != reads:  # what is for helpers, while it is asked for
                    batches.close()
                    batches, reads = batches_from(step)
                step_fn = jit_train_step(run.program(span.helps), tx, learning_rate, state)
                say(f"step {step}: training {'with ' + ', '.join(sorted(span.helps)) if span.helps else 'alone'}")
            log.profile(step)
            with part(f"waiting for the data of step {step}", "data", busy=lambda: log.busy):
                batch = sharding.put_batch(next(batches), mesh)
            with part(f"working on step {step}", "compile" if fresh else "step"):
                state, step_metrics = step_fn(state, helpers, batch)
            log.step(step, step_metrics)
            run = run.ended(int(told[0])) if told else run  # of the step before: the device is not waited for
            told = step_metrics.get(auto.ENDED)
            done = step + 1
            evaluated = evaluate_at(done)
            if done < c.steps:
                if checkpointer.due(done):
                    save_at(done, checkpointer.save)
                tasks_at(done)

        # -------------------------------------------------------------- the end
        save_at(c.steps, checkpointer.finish)
        tasks_at(c.steps)
        log.saved(c.steps)
        if best := checkpointer.best():
            say(f"the best checkpoint is that of step {best[0]}, validation loss {best[1]:.4f}")
        say(f"time: {clock.summary()}")
        _check_last(state)
    say(f"finished: {c.steps} steps, checkpoint in {checkpointer.directory / str(c.steps)}")
    return state


def _check_last(state: TrainState) -> None:
    """Raises a UserError where a run has ended with steps that changed nothing, or with a model that is lost."""
    if skipped := int(state.skipped_in_a_row):
        raise UserError(
            f"the last {skipped} of {int(state.step)} steps had no finite loss or gradient and were skipped: the "
            "checkpoint holds the parameters before them. Lower optimizer.learning_rate, lengthen "
            "optimizer.warmup_steps, or set optimizer.clip_norm, and start in another workdir."
        )
    checkpoint.check_finite(state.params, "the model at the end of the run")  # the last step may have lost it


def _load_helpers(c: ConfigDict, run: plan.Plan, mesh: Mesh, first: int) -> dict[str, Any]:
    """What the steps from `first` on are given of the helpers."""
    needed = run.needed(first)
    if run.scored:
        return {"targets": answers.load(run.scored, mesh)} if needed else {}
    helpers = {name: run.helpers()[name] for name in needed}
    return teacher.load(helpers, mesh, c.teacher.dtype, c.seed + 1 if c.teacher.random else None)


def _tasks(c: ConfigDict, run: plan.Plan, mesh: Mesh) -> Callable[[Any], dict[str, float]]:
    """What the lm-evaluation-harness finds out about parameters; texts are read in rows of the run's length."""
    from lmboost import harness  # needs a package that is not always there

    coder = tokenizer.load(run.train_data.tokenizer_path)
    length = min(c.seq_len, run.student.max_seq_len)
    lm = harness.LanguageModel(run.student, None, mesh, coder, c.batch_size, length, c.objective.block_tokens)
    return harness.in_training(lm, harness.names_of(c.eval.tasks), c.eval.tasks_include)


def _start(
    c: ConfigDict, run: plan.Plan, mesh: Mesh, tx, checkpointer: Checkpointer, log_dir: LogDir
) -> tuple[TrainState, int, bool]:
    """The state to go on from, its step, and whether it was evaluated.

    That of the run's own newest whole checkpoint, else resume.path, else init.path, else random.
    """
    fresh = lambda: init_state(run.init_params(), tx, run.objective.auto)  # noqa: E731
    like = jax.eval_shape(fresh)
    shardings = sharding.tree_sharding(like, mesh)
    found, origin = checkpointer.restore(like, shardings), "own checkpoint"
    if not found and c.resume.path:
        directory, origin = checkpoint.find(c.resume.path, c.resume.step, "resume.path"), "resume.path"
        state, position = restore_state(directory, like, shardings)
        check_fingerprints(directory, state, position)
        found = state, position, position["step"]
        for remark in going_on.what_begins_again(checkpoint.read_manifest(directory).get("config", {}), c, found[2]):
            warn(f"resume.path: {remark}")
    if found:
        state, position, step = found
        evaluated, _ = position.pop("evaluated", True), position.pop("spent", None)
        run.check_position(position, f"the {origin} of step {step}")
        if origin == "resume.path" and (old := checkpoint.Run.of(directory)):
            take_over(log_dir.path, old.workdir, step)
        say(f"start: {origin}, step {step}")
        return state, step, evaluated
    state = jax.jit(fresh, out_shardings=shardings)()
    if run.stage:
        return _start_stage(c, run, state, mesh, log_dir), run.stage.step, run.stage.evaluated
    if c.init.path:
        parent = checkpoint.Saved.find(c.init.path, c.init.step, "init.path")
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


def _start_stage(c: ConfigDict, run: plan.Plan, fresh: TrainState, mesh: Mesh, log_dir: LogDir) -> TrainState:
    """The state that a stage begins with; says what is otherwise than before."""
    stage, directory = run.stage, epath.Path(run.stage.directory)
    state, new = start.from_stage(c, stage, run.student, fresh, mesh)
    take_over(log_dir.path, checkpoint.Run.of(directory).workdir, stage.step)
    lines = [f"changed, {line}" for line in stage.changes] + new
    lines += [f"the data {f'goes on at row {stage.row}' if stage.row else 'begins anew'}"]
    for line in lines:
        say(f"init.path: {line}")
    for remark in going_on.what_begins_again(checkpoint.read_manifest(directory)["config"], c, stage.step):
        warn(f"init.path: {remark}")
    say(f"start: init.path {directory}, step {stage.step}")
    return state


def _write_manifest(run: plan.Plan, helpers: dict[str, Any], workdir: str) -> dict[str, Any]:
    """Writes WORKDIR/manifest.json, with the fingerprints of the helpers; they must be those of an earlier start."""
    manifest, place = dict(run.manifest), checkpoint.Run(workdir)
    path, old = place.manifest_path, place.manifest() or {}
    marks = {name: checkpoint.fingerprint(params) for name, params in helpers.items() if name != "targets"}
    for name, mark in marks.items():
        before = (old.get(name) or {}).get("fingerprint", mark)
        if before != mark:
            raise UserError(
                f"the {name} in {getattr(run, name).saved.directory} is not the one that the run in {workdir} was "
                f"started with (fingerprint {before[:12]}, now {mark[:12]}): give the same checkpoint, or another "
                "workdir."
            )
        rows = {"old": (old.get(name) or manifest[name]).get("rows"), "new": manifest[name].get("rows")}
        if rows["old"] != rows["new"]:
            raise UserError(
                f"the {name} in {getattr(run, name).saved.directory} reads the text otherwise than that of the run in "
                f"{workdir} (rows {rows['old']}, now {rows['new']}): give the tokenizer and teacher.seq_len of before, "
                "or another workdir."
            )
        manifest[name] = manifest[name] | {"fingerprint": mark}
    for name in ("teacher", "scorer"):  # not needed any more, and not loaded
        manifest[name] = manifest[name] if name in helpers else old.get(name) or manifest[name]
    if old and run.scored and (before := (old.get("targets") or {}).get("fingerprint")) != run.scored.fingerprint:
        raise UserError(
            f"{run.scored.where} is not what the run in {workdir} was started with (fingerprint {str(before)[:12]}, "
            f"now {run.scored.fingerprint[:12]}): give the same directory, or another workdir."
        )
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with places.whole_file(path) as partial:
            partial.write_text(json.dumps(manifest, indent=1))
    return manifest


def _keep_manifest(manifest: dict[str, Any], workdir: str) -> None:
    """Writes manifest.json again where it was removed."""
    path = checkpoint.Run(workdir).manifest_path
    if jax.process_index() == 0 and not path.exists():
        warn(f"{path} was removed while the run went on; it is written again.")
        with contextlib.suppress(OSError):  # of a disk; the checkpoints have it, too
            path.parent.mkdir(parents=True, exist_ok=True)
            with places.whole_file(path) as partial:
                partial.write_text(json.dumps(manifest, indent=1))


def _quiet_libraries() -> None:
    """Leaves it to the final error to say what went wrong.

    When a save fails, Orbax and asyncio log tracebacks before it raises, and TensorStore's own threads print what
    their callbacks met. All of it is told again, shorter, by the error that ends the run.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(config.Flags, processes.Cluster):
    """The flags of this verb."""


def main(argv: list[str]) -> None:
    c, flags = config.read(argv, Flags)
    if not flags.traceback:
        _quiet_libraries()
    processes.start(flags)
    run = lambda: train(c, flags.workdir, goodput.process_start())  # noqa: E731
    if jax.process_count() == 1:
        run()
        return
    try:
        exit_on_user_error(run, flags.traceback)
    except SystemExit as end:  # jax would wait for the others, which may be waiting for this one
        exit_at_once(end.code)
    except BaseException:
        traceback.print_exc()
        exit_at_once(1)


if __name__ == "__main__":
    run_verb(main, __doc__)
