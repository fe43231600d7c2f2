"""One run of the track, in a process of its own: train, evaluate, and print what came out as a JSON line.

python -m benchmarks.track.one TIER ARM SEED OUT
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax

from benchmarks.track.arms import ARMS
from benchmarks.track.setting import TIERS, Tier, recipe
from lmboost import checkpoint, config, evaluate, sharding
from lmboost.data import loader
from lmboost.run import goodput, metrics
from lmboost.train import train

ASKED = {"final": "train", "bible": "bible", "javascript": "javascript"}


def run(tier: Tier, name: str, seed: int, out: pathlib.Path) -> dict:
    arm, data = ARMS[name], out / "data"
    model = tier.helpers[arm.model] if arm.model else tier.student
    c = recipe(tier, model, round(arm.length * tier.steps_of(model)))
    c.update_from_flattened_dict(arm.changes)
    c.seed, c.data.train = seed, str(data / "train")
    if arm.teacher:
        c.teacher.path = str(workdir_of(out, tier, arm.teacher, seed))
    workdir = workdir_of(out, tier, name, seed)
    state = train(c, str(workdir))
    lines = [line for line in metrics.read(str(workdir)) if line.get("val_loss") is not None]
    return {
        "tier": tier.name, "arm": name, "seed": seed, "steps": c.steps, "parameters": model.num_params(),
        "teacher": arm.teacher, **_asked(tier, model, state.params["model"], data),
        "flops": lines[-1]["flops"], "seconds": _seconds(workdir),
        "curve": [[line["step"], round(line["val_loss"], 5), line["flops"]] for line in lines],
        "config": _changed(c), "data": loader.info(str(data / "train"), "train").fingerprint,
        "versions": checkpoint.versions(), "model": dataclasses.asdict(model),
    }  # fmt: skip


def workdir_of(out: pathlib.Path, tier: Tier, arm: str, seed: int) -> pathlib.Path:
    return out / tier.name / arm / str(seed)


def _asked(tier: Tier, model, params, data: pathlib.Path) -> dict[str, float]:
    """Losses, in nats per token, on held-out documents and on the texts out of the domain."""
    mesh, found = sharding.make_mesh(1, 1, 1), {}
    with jax.set_mesh(mesh):
        for name, directory in ASKED.items():
            validation = evaluate.Validation(
                model, str(data / directory), tier.seq_len, tier.batch_size, tier.final_batches, mesh, 512
            )
            found[name] = round(validation(params)["val_loss"], 5)
    return found


def _seconds(workdir: pathlib.Path) -> float:
    """Of steps, compiled or being compiled, over all attempts."""
    last = {}
    for line in map(json.loads, (workdir / goodput.FILE).read_text().splitlines()):
        last[line["attempt"]] = line["seconds"]
    return round(sum(s["step"] + s.get("compile", 0.0) for s in last.values()), 1)


def _changed(c) -> dict:
    """What is not as in config.base(), but for places."""
    base = config.flatten(config.base())
    flat = config.flatten(c)
    return {k: v for k, v in flat.items() if v != base[k] and not k.startswith(("model.", "data.", "teacher.path"))}


def commit() -> str:
    """Of the code that runs; with "+" where it was changed since, empty without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        result = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


if __name__ == "__main__":
    tier, arm, seed, out = sys.argv[1:5]
    at = commit()  # before the run: the code may change while it lasts
    result = {"commit": at} | run(TIERS[tier], arm, int(seed), pathlib.Path(out))
    path = workdir_of(pathlib.Path(out), TIERS[tier], arm, int(seed)) / "line.json"
    path.with_suffix(".part").write_text(json.dumps(result))
    os.replace(path.with_suffix(".part"), path)
