"""Surgery on files: a checkpoint with layers of another model. Nothing is trained."""

import dataclasses
from collections.abc import Callable

import jax

from lmboost import checkpoint, ranges, sharding, standalone
from lmboost.errors import UserError
from lmboost.hf import reader
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import inherit


def write_inherited(
    parent: str,
    layers: str,
    out: str,
    fresh: str = "",
    *,
    step: int = -1,
    seed: int = 0,
    tokenizer: str = "",
    report: Callable[[str], None] = print,
) -> None:
    """Writes the model that some layers of `parent` make as a checkpoint, in float32.

    A run can start from it (init.path), and it is evaluated and converted as any checkpoint.

    Args:
      parent: a run, one of its checkpoints, or "hf:DIR".
      layers: the parent's, counted from 0, as "0-5,8".
      out: a directory to make.
      fresh: parts that start at random, as "embedding,head".
      step: of a run: which checkpoint; -1 is the last.
      seed: of the random parts, which are those of a run with this seed.
      tokenizer: as for `standalone.find_tokenizer`.
      report: receives lines that say what became of each part.

    Raises:
      UserError: layers that are not the parent's, not in order or named twice, a part that is not known, no such
        parent, an `out` that is not empty, or a full disk.
    """
    if out.startswith(reader.PREFIX):
        raise UserError(f"--out={out!r}: a checkpoint is written; lmboost.convert makes a Hub directory of it.")
    target = standalone.find_target(out)
    directory = checkpoint.find(parent, step, "--parent")
    manifest = checkpoint.read_manifest(directory)
    model = ModelConfig(**manifest["model"])
    child = inherit.of_layers(model, inherit.parse_layers(layers, model.num_layers, "--layers"))
    taken = inherit.plan("inherit", layers, fresh, model, child, field="--")
    coder = standalone.find_tokenizer(directory, manifest, tokenizer, model, needed=False)
    about = {
        "model": dataclasses.asdict(child),
        "data": {"tokenizer": manifest["data"]["tokenizer"]},
        "source": {
            "directory": str(directory), "kind": "inherit", "layers": ranges.write(taken.layers),
            "fresh": sorted(taken.fresh), "seed": seed,
        },
    }  # fmt: skip
    mesh = sharding.make_mesh(1, -1, 1)  # each device holds a part
    with standalone.whole(target) as partial, jax.set_mesh(mesh):
        key = jax.random.split(jax.random.key(seed))[0]  # as train_step.init_params
        like, small = (jax.eval_shape(lambda c=c: transformer.init(c, key)) for c in (model, child))
        params = checkpoint.load_params(directory, like, mesh)
        make = jax.jit(
            lambda params: taken(params, transformer.init(child, key)),
            out_shardings=sharding.tree_sharding(small, mesh),
        )
        standalone.write_checkpoint(partial, make(params), about, coder)
    for line in [*taken.report(small), f"{parent} -> {out}"]:
        report(line)
