"""lmboost's plain step beside MaxText's of the same shapes, both by the TPU compiler, without a TPU.

    python -m benchmarks.peers.tpu [--envs=DIR] [--keep=DIR] [--result=benchmarks/results/maxtext.md]

MaxText is installed into an environment of its own (some 4 GB, below --envs, once), by uv, as pip's resolver finds no
end of its pins. It needs Python 3.12: python3.12 on the path, or of pyenv. lmboost is installed beside it, so that one
compiler judges both. About six minutes of a core for each program.
"""

import argparse
import glob
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from benchmarks import reports
from benchmarks.calibration import LLAMA3_8B, flags_of
from lmboost.errors import UserError, run_flags

MAXTEXT = "maxtext[tpu]==0.2.5"
LLAMA2_7B = (32, 4096, 32, 32, 11008, 32000)
BLOCKS = [f"sa_block_{name}=1024" for name in (
    "q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq"
)]  # fmt: skip


class Case(NamedTuple):
    """A model by MaxText's name and by its sizes, as in benchmarks/calibration.py, and a batch; rows of a chip."""

    name: str
    sizes: tuple[int, ...]
    pod: str
    seq_len: int
    rows: int


CASES = (Case("llama3.1-8b", LLAMA3_8B, "v6e-256", 8192, 2), Case("llama2-7b", LLAMA2_7B, "v5p-128", 4096, 4))
TEXT = """\
# A step beside MaxText's, by the TPU compiler

`python -m benchmarks.peers.tpu` wrote this: {maxtext}, jax {jax}, libtpu {libtpu} for both. Nothing was
run. Plain steps of the same shapes: AdamW, clipped gradients, bfloat16 with parameters and optimizer in float32, every
layer rematerialised, parameters spread over all chips. Cycles are the compiler's estimate of what a chip computes,
attention's kernels by their schedules (benchmarks/results/splash_blocks.md); exchanges are not in them, but in what a
chip receives, if each is done as a ring: MaxText adds up gradients of the chips in bfloat16, lmboost in float32.
MaxText's own distillation is another trainer, which its train_compile does not compile.

| model | pod | rows of a chip | step | memory of a chip, GiB | cycles, 10^6 | of attention | received, GiB |
|---|---|---|---|---|---|---|---|
"""


def python_of(envs: pathlib.Path) -> str:
    """The interpreter of the environment that has both, made if it is not there. A UserError where it can't be."""
    where = envs / "maxtext"
    python = str(where / "bin/python")
    if (where / "ready").exists():
        return python
    pyenv = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.12*/bin/python")))
    base = shutil.which("python3.12") or next(iter(pyenv), None)
    if base is None:
        raise UserError("MaxText needs Python 3.12, and there is no python3.12: install one, or put it on the path.")
    for command in (
        [base, "-m", "venv", "--clear", str(where)],
        [python, "-m", "pip", "install", "-q", "uv"],
        [python, "-m", "uv", "pip", "install", "--python", python, MAXTEXT, "-e", f"{reports.HOME}[tpu]"],
    ):
        print(" ".join(command), flush=True)
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{MAXTEXT} could not be installed into {where}; what was said of it is above.")
    (where / "ready").touch()
    return python


def maxtext(python: str, path: pathlib.Path, case: Case, *fields: str) -> dict:
    """What the compiler says of MaxText's step; what is at `path` is not made again."""
    if not path.exists():
        given = [f"model_name={case.name}", f"max_target_length={case.seq_len}", f"per_device_batch_size={case.rows}"]
        command = [python, str(pathlib.Path(__file__).with_name("maxtext_peer.py")), case.pod, str(path), *given]
        subprocess.run([*command, *fields], env=reports.environment(), check=True, stdout=sys.stderr)
    return json.loads(path.read_text())


def lmboost(python: str, path: pathlib.Path, case: Case) -> dict:
    """The same of lmboost's."""
    report = reports.aot(path, *flags_of(case.sizes, case.pod, case.seq_len, case.rows), python=python)
    phase = report["phases"][-1]
    return {name: report[name] for name in ("jax", "libtpu")} | phase | {"received": sum(phase["collectives"].values())}


def main(envs: str, keep: str, result: str) -> None:
    where = pathlib.Path(envs).absolute()
    where.mkdir(parents=True, exist_ok=True)
    python, rows = python_of(where), []
    with tempfile.TemporaryDirectory() as temporary:
        kept = pathlib.Path(keep or temporary)
        kept.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            steps = {
                "MaxText": maxtext(python, kept / f"{case.name}.json", case),
                "MaxText, attention in blocks of 1,024": maxtext(python, kept / f"{case.name}-b.json", case, *BLOCKS),
                "lmboost": lmboost(python, kept / f"{case.name}-lmboost.json", case),
            }
            for name, said in steps.items():
                total, attention = said["cycles"] + said["attention"], said["attention"]
                memory, received = said["memory"]["total"] / 2**30, said["received"] / 2**30
                cells = [case.name, case.pod, f"{case.rows} of {case.seq_len:,}", name, f"{memory:.1f}"]
                cells += [f"{total / 1e6:,.0f}", f"{attention / 1e6:,.0f}", f"{received:.1f}"]
                rows.append(f"| {' | '.join(cells)} |")
                print(rows[-1], flush=True)
    head = TEXT.format(maxtext=MAXTEXT.replace("==", " "), jax=said["jax"], libtpu=said["libtpu"])
    pathlib.Path(result).write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", default="runs/peers")
    parser.add_argument("--keep", default="")
    parser.add_argument("--result", default=str(reports.HOME / "benchmarks/results/maxtext.md"))
    run_flags(main, parser)
