"""What the recipes of "Where to Begin" cost: the search, the teacher and the student, against the plain model alone.

    python benchmarks/subnet_costs.py [--result=benchmarks/results/subnet_costs.md]

Model FLOPs by lmboost.flops; nothing is run, and it takes seconds. All candidates of a search are computed in the shape
that holds every one of them, the hull: the model of the largest choices.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator

from lmboost import config as configs
from lmboost import flops
from lmboost.models.model_config import ModelConfig
from lmboost.search.space import Orders, Space

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = ("subnet_pythia_410m", "subnet_pythia_1b", "subnet_pythia_2p8b", "subnet_smollm2", "subnet_qwen2p5")
ARMS = ("scratch", "distil", "cut", "nokd", "")  # the comparison's; "" is the searched cut with its teacher
HEADER = """\
# What Where to Begin costs

`python benchmarks/subnet_costs.py` wrote this: model FLOPs by arithmetic, nothing was run. All arms train on
{tokens:.1f}B tokens. *Search* is forward passes of the hull (the model of the largest choices) over every candidate's
rows, *teacher* the parent's forward passes in training. The right half is all that an arm takes as a multiple of
*plain*, the published model alone (`scratch`); a winner is taken to cost what `cut` does, which is in the same bin.
At a multiple of r, help pays if it meets the plain run's loss within 1 / r of its tokens. Below 1, a cut has fewer
layers, or a second embedding, which costs parameters but no FLOPs. The parent's own training is in none of them.

| recipe | parent | hull | search | teacher | plain | `distil` | `cut` | searched, `nokd` | searched |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Costs:
    """FLOPs of one arm."""

    search: float
    teacher: float
    student: float

    @property
    def total(self) -> float:
        return self.search + self.teacher + self.student


def hull(search, parent: ModelConfig) -> ModelConfig:
    """The model of the largest choices."""
    space = Space.from_config(search, parent, Orders.natural(parent))
    return dataclasses.replace(
        parent, num_layers=max(space.layers), d_model=max(space.d_model), num_kv_heads=max(space.num_kv_heads),
        num_heads=max(space.num_kv_heads) * max(space.group_heads), head_dim=max(space.head_dim),
        mlp_dim=max(space.mlp_dim),
    )  # fmt: skip


def arm_costs(module, arm: str, sizes: str) -> Costs:
    """The costs of one arm of a recipe; `sizes` are the words beside it, as in "7b,1.5b"."""

    def tree(arm):
        return module.get_config(",".join(filter(None, (arm, sizes))))

    c, searched = tree(arm), arm in ("", "nokd")
    parent = module.parent(sizes)
    student = ModelConfig(**(tree("cut") if searched else c).model)
    alone = c.steps * flops.step_flops(student, c.batch_size, c.seq_len)
    helpers = [flops.Forward(parent)] if c.objective.kd.weight else []
    helped = c.steps * flops.step_flops(student, c.batch_size, c.seq_len, helpers)
    tokens = c.search.candidates * c.search.rows * c.seq_len
    search = tokens * flops.forward_flops(hull(c.search, parent), c.seq_len) if searched else 0.0
    return Costs(search, helped - alone, alone)


def rows() -> Iterator[str]:
    """A line for each recipe and each of its sizes."""
    for recipe in RECIPES:
        module = configs.load_module(str(ROOT / "configs" / f"{recipe}.py"))
        words = [v for v in module.VARIANTS if v not in (*ARMS, "parent", "tiny")]
        for count in range(len(words) + 1):
            for chosen in itertools.combinations(words, count):
                sizes = ",".join(chosen)
                yield row(f"{recipe}{':' if sizes else ''}{sizes}", module, sizes)


def row(name: str, module, sizes: str) -> str:
    plain, distil, cut, nokd, searched = (arm_costs(module, arm, sizes) for arm in ARMS)
    parent = module.parent(sizes)
    parts = [f"`{name}`", billions(parent), billions(hull(module.get_config(sizes).search, parent))]
    parts += [f"{x:.1e}" for x in (searched.search, searched.teacher, plain.total)]
    parts += [f"{arm.total / plain.total:.2f}" for arm in (distil, cut, nokd, searched)]
    return f"| {' | '.join(parts)} |"


def billions(model: ModelConfig) -> str:
    return f"{model.num_params() / 1e9:.1f}B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", default=str(ROOT / "benchmarks/results/subnet_costs.md"))
    flags = parser.parse_args()
    c = configs.load_module(str(ROOT / "configs" / f"{RECIPES[0]}.py")).get_config()
    text = HEADER.format(tokens=c.steps * c.batch_size * c.seq_len / 1e9) + "\n".join(rows()) + "\n"
    os.makedirs(os.path.dirname(os.path.abspath(flags.result)), exist_ok=True)
    pathlib.Path(flags.result).write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
