"""The quickstart over several seeds, with an untrained teacher as control.

    python benchmarks/quickstart.py [--seeds=0,1,2] [--out=runs/benchmark] [--result=benchmarks/results/quickstart.md]

For each seed: a small model, then the larger one alone, with the small one's help, and with the help of random
parameters in the small one's place. Every run is a call of the public verbs, as in launch/quickstart.sh; what is
finished is not run again. About 8 minutes a seed on two CPU cores.
"""

import argparse
import json
import os
import subprocess
import sys

import jax

HEADER = """\
# Quickstart over seeds

`python benchmarks/quickstart.py` wrote this: jax {jax}, {device}. Tokens and FLOPs are what it took to reach the
plain run's final validation loss, as a fraction of what the plain run took; "-" is never. FLOPs count the teacher's
forward passes; the last column also the teacher's own training.

| seed | teacher | run | final validation loss | tokens | FLOPs | with teacher's training |
|---|---|---|---|---|---|---|
"""


def verb(name: str, *flags: str) -> None:
    print("python -m", f"lmboost.{name}", *flags, flush=True)
    subprocess.run([sys.executable, "-m", f"lmboost.{name}", *flags], check=True)


def train(out: str, seed: int, variant: str, name: str, *flags: str) -> str:
    workdir = f"{out}/{seed}/{name}"
    recipe = f"--config=configs/quickstart.py:{variant}"
    verb("train", recipe, f"--workdir={workdir}", f"--config.seed={seed}", f"--config.data.train={out}/data", *flags)
    return workdir


def run_seed(out: str, seed: int) -> dict:
    """The report of one seed: plain against helped and against helped by an untrained teacher."""
    teacher = train(out, seed, "teacher", "teacher")
    plain = train(out, seed, "plain", "plain")
    from_teacher = f"--config.teacher.path={teacher}"
    helped = train(out, seed, "helped", "helped", from_teacher)
    untrained = train(out, seed, "helped", "untrained", from_teacher, "--config.teacher.random=true")
    report = f"{out}/{seed}/report"
    runs = [f"--baseline={plain}", f"--run={helped}", f"--run={untrained}"]
    verb("report", *runs, f"--helper={teacher}", f"--out={report}")
    with open(f"{report}/report.json") as file:
        return json.load(file)


def rows(seed: int, report: dict) -> list[str]:
    def share(value):
        return "-" if value is None else f"{value:.2f}"

    lines = [f"| {seed} | none | plain | {report['target_loss']:.4f} | 1 | 1 | 1 |"]
    for run, teacher in zip(report["runs"], ("trained", "untrained"), strict=True):
        numbers = [share(run[f"{n}_fraction"]) for n in ("tokens", "flops", "flops_with_helper")]
        cells = [str(seed), teacher, "helped", f"{run['final']['val_loss']:.4f}", *numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--result", default="benchmarks/results/quickstart.md")
    flags = parser.parse_args()
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    data = ["--source=stdlib", "--tokenizer=train:2048", "--validation_fraction=0.05", f"--out={flags.out}/data"]
    verb("prepare", *data)
    lines = [line for seed in flags.seeds.split(",") for line in rows(int(seed), run_seed(flags.out, int(seed)))]
    text = HEADER.format(jax=jax.__version__, device=jax.devices()[0].device_kind) + "\n".join(lines) + "\n"
    os.makedirs(os.path.dirname(flags.result), exist_ok=True)
    with open(flags.result, "w") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    main()
