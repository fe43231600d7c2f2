"""One run of the track, in a process of its own: train, evaluate, write what came out to line.json in its workdir.

The runner starts it: python -m benchmarks.track.one TIER ARM SEED OUT CORE. It ends when its standard input does.
"""

if __name__ == "__main__":  # before jax counts the cores
    import os
    import sys

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(sys.argv[5])})

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.track import copying
from benchmarks.track.arms import ARMS, LINE, NEEDED, asked, workdir_of
from benchmarks.track.hub import HUB
from benchmarks.track.setting import TIERS, Tier, recipe
from lmboost import checkpoint, config, evaluate, flops, places, score, sharding, standalone
from lmboost.data import scored
from lmboost.models.model_config import ModelConfig
from lmboost.run import goodput, metrics
from lmboost.search import job
from lmboost.train import train

ASKED = {"final": "train", "bible": "bible", "javascript": "javascript"}  # name of the loss: data of `texts.make`
FOUND = "found"  # in the workdir of a search: its own, in which nothing else may be
HELPER_SEEDS = 1000  # above the student's: a helper has not read the student's rows in the student's order


def run(tier: Tier, name: str, seed: int, out: pathlib.Path) -> dict[str, Any]:
    """Trains an arm to its end and returns its line.

    Losses are in nats per token, "copying" is that of `copying.measure`, "flops" are those of training with the
    helpers' forward passes (where the teacher answers before the run its are in "answers"), "seconds" those of steps
    and their compilation; "curve" has (step, validation loss, FLOPs) of each evaluation on the way.
    """
    arm, data, workdir = ARMS[name], out / tier.data, str(workdir_of(out, tier.name, name, seed))
    model = tier.models[arm.model]
    c = recipe(tier, model, tier.steps_of(tier.models[arm.steps_of or arm.model], arm.length))
    c.update_from_flattened_dict(arm.changes)
    _stand(c, arm.until)
    c.seed, c.data.train = seed + (HELPER_SEEDS if name in NEEDED else 0), str(data / "train")
    if arm.teacher:
        c.teacher.path = str(workdir_of(out, tier.name, arm.teacher, seed))
    if arm.hub:
        c.teacher.path, c.teacher.seq_len = str(out / HUB / "model"), tier.hub_seq_len
    if arm.scorer:
        c.objective.select.scorer = str(workdir_of(out, tier.name, arm.scorer, seed))
    if arm.shuffled:
        c.teacher.path = shuffled(c.teacher.path, f"{workdir}/teacher", seed)
    if arm.parent:  # of a stage the checkpoint that it stands with
        c.init.path = str(workdir_of(out, tier.name, arm.parent, seed))
    if arm.rises:
        c.optimizer.begin = checkpoint.Run(c.init.path).steps()[-1]
        c.optimizer.warmup_steps = round(0.05 * (c.steps - c.optimizer.begin))
    if arm.search:
        return _search(tier, name, seed, c, workdir)
    if arm.winner:
        found = config.load_recipe(f"{workdir_of(out, tier.name, arm.winner, seed)}/{FOUND}/winner.py")
        c.model, model = found.model, ModelConfig(**found.model)
        c.init.update({} if arm.fresh else found.init)
    said = _score(c, f"{workdir}-answers", arm.answers) if arm.answers is not None else {}
    train(c, workdir)
    losses = {
        loss: evaluate.evaluate(workdir, str(data / of), -1, tier.final_batches, tier.batch_size)["val_loss"]
        for loss, of in ASKED.items()
    }
    evaluations = [line for line in metrics.read(workdir) if line.get("val_loss") is not None]
    spent, manifest = goodput.read(workdir).seconds, checkpoint.Run(workdir).manifest()
    return {
        "tier": tier.name, "arm": name, "seed": seed, "teacher": arm.teacher, "parent": arm.parent, "steps": c.steps,
        "parameters": model.num_params(), **losses,
        "copying": copying.measure(workdir, 32 * tier.batch_size, c.seq_len),
        "flops": evaluations[-1]["flops"],
        "seconds": spent["step"] + spent["compile"],
        "curve": [[line["step"], line["val_loss"], line["flops"]] for line in evaluations],
        "config": _changed(c), "model": manifest["model"], "data": manifest["data"], "versions": manifest["versions"],
        "devices": manifest["devices"], **said,
    }  # fmt: skip


def _stand(c: ConfigDict, until: float) -> None:
    """Has a run end after this share of its steps, with the learning rate that it has there."""
    if until == 1:
        return
    steps, o = c.steps, c.optimizer
    c.steps = round(until * steps / c.eval.every) * c.eval.every
    fallen = (c.steps - o.warmup_steps) / (steps - o.warmup_steps)  # the share of what is after the warm-up
    match o.schedule:
        case "wsd" if c.steps <= steps - round(o.decay_fraction * steps):
            o.schedule = "constant"
        case "linear":
            o.final_fraction += (1 - o.final_fraction) * (1 - fallen)
        case other:
            raise ValueError(f"a run with a schedule of {other} can't be told to stand at {until} of its steps.")


def _score(c: ConfigDict, out: str, answers: dict[str, Any]) -> dict[str, Any]:
    """Has the teacher answer, and the run read it; returns what that cost: FLOPs, and bytes of a token."""
    score.score(c, score.Flags(config="", out=out, **answers))
    manifest = scored.Scored.find(out).manifest
    c.teacher.update({"path": "", "targets": out})
    return {"answers": {"flops": manifest["flops"], "bytes": manifest["bytes"] / manifest["tokens"]}}


def _search(tier: Tier, name: str, seed: int, c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Searches, and returns a line whose loss is that of the best cut before it is trained."""
    c.search.update({"candidates": 384, "population": 16, "elites": 4, "rows": 64, "batch": 1} | tier.search)
    began = time.monotonic()
    _, loss = job.search(c, f"{workdir}/{FOUND}")
    cost = flops.forward_flops(tier.models["large"], c.seq_len) * c.search.candidates * c.search.rows * c.seq_len
    return {
        "tier": tier.name, "arm": name, "seed": seed, "parent": ARMS[name].parent, "final": loss, "flops": cost,
        "seconds": time.monotonic() - began, "config": _changed(c), "versions": checkpoint.versions(),
    }  # fmt: skip


def _changed(c: ConfigDict) -> dict[str, Any]:
    """The fields that are not as in config.base(), but for the model, which has a place of its own, and for paths."""
    base = config.flatten(config.base())
    paths = ("data.train", "teacher.path", "teacher.targets", "init.path", "objective.select.scorer")
    return {
        k: v for k, v in config.flatten(c).items() if v != base[k] and k not in paths and not k.startswith("model.")
    }


def shuffled(teacher: str, out: str, seed: int) -> str:
    """A model whose tensors have the teacher's entries in another order: as large, and nothing of what it learned."""
    if not pathlib.Path(out).exists():
        saved = checkpoint.Saved.find(teacher)
        params = saved.load(sharding.make_mesh(), "float32")
        keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
        keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
        params = jax.tree.map(lambda x, k: jax.random.permutation(k, x.ravel()).reshape(x.shape), params, keys)
        manifest = {**saved.manifest, "model": dataclasses.asdict(saved.model)}
        with standalone.whole(pathlib.Path(out)) as partial:
            checkpoint.save_params(partial, params, manifest)
    return out


def _end_with_runner() -> None:
    """Ends the process when its standard input does: a runner that was killed leaves no run behind."""
    os.read(0, 1)  # not by way of sys.stdin, whose lock the interpreter wants at its end
    os._exit(1)


def commit() -> str:
    """Of the code that runs; with "+" where it was changed since, empty without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        result = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


if __name__ == "__main__":
    threading.Thread(target=_end_with_runner, daemon=True).start()
    tier, arm, seed, out = TIERS[sys.argv[1]], sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4])
    at = commit()  # before the run: the code may change while it lasts
    line = {"commit": at} | run(tier, arm, seed, out) | {"asked": asked(arm)}
    places.write(workdir_of(out, tier.name, arm, seed) / LINE, json.dumps(line))
