"""Models from and to the Hugging Face Hub's format, without PyTorch; models of some layers of others.

    python -m lmboost.convert --source=hf:DIR --out=DIR
    python -m lmboost.convert --source=RUN_OR_CHECKPOINT --out=hf:DIR [--dtype=bfloat16]
    python -m lmboost.convert --source=RUN_OR_CHECKPOINT_OR_hf:DIR --layers=0-5,8 --out=DIR

Known: GPT-2, OPT, GPT-NeoX (Pythia), Llama (SmolLM2, OpenLLaMA, TinyLlama), Mistral, Qwen2, Qwen3, OLMo-2. A checkpoint
made of a Hub directory has its tokenizer beside it, in DIR/tokenizer. A Hub directory needs no conversion to be a
teacher, a start or evaluated: "hf:DIR" can stand wherever a checkpoint can. With --layers it is the model that some of
the layers make, which nobody has trained yet; a run can take layers by itself, too (init.kind=inherit).
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lmboost import ranges, sharding, standalone
from lmboost.checkpoint import Saved
from lmboost.errors import UserError, one_of, run_flags
from lmboost.hf import reader, writer
from lmboost.models import transformer
from lmboost.models.model_config import DTYPES
from lmboost.surgery import inherit


def convert(
    source: str,
    out: str,
    dtype: str = "float32",
    *,
    step: int = -1,
    layers: str = "",
    fresh: str = "",
    seed: int = 0,
    tokenizer: str = "",
    max_shard_size: float = 5.0,
    report: Callable[[str], None] = print,
) -> None:
    """Writes the model `source`, or the one that some of its layers make, as `out`.

    Each is a run or checkpoint, or "hf:DIR". A run can start from what is written (init.path). The arguments are the
    flags of the verb, which say what they are; `report` receives lines that say what went where.

    Raises:
      UserError: bad arguments, a model that one of the two sides cannot express, layers that are not the source's, a
        damaged file, or a full disk.
    """
    one_of("--dtype", dtype, DTYPES)
    export = out.startswith(reader.PREFIX)
    if not (layers or export or source.startswith(reader.PREFIX)):
        raise UserError(
            f"--source={source!r} and --out={out!r} are both checkpoints: give one of them as hf:DIR, or --layers."
        )
    if fresh and not layers:
        raise UserError(f"--fresh={fresh!r} needs --layers: the layers that the model with these random parts has.")
    if max_shard_size <= 0:
        raise UserError(f"--max_shard_size={max_shard_size} must be above 0; it is in GB.")
    target = standalone.find_target(out)
    saved = Saved.find(source, step, "--source")
    model, manifest = saved.model, saved.manifest
    taken = None
    if layers:
        model = inherit.of_layers(saved.model, inherit.parse_layers(layers, saved.model.num_layers, "--layers"))
        taken = inherit.plan(layers, fresh, saved.model, model, field="--")
        manifest = _about(saved, taken, seed)
    if export:
        # A misfit is an error before anything is read.
        writer.family_of(model, manifest.get("source", {}).get("architecture", ""))
    coder = saved.tokenizer(tokenizer) if export or tokenizer or saved.tokenizer_fingerprint else None
    manifest = manifest | {"data": manifest["data"] | {"tokenizer": coder and coder.fingerprint}}
    mesh, lines = sharding.make_mesh(1, -1, 1), []  # each device holds a part
    with standalone.whole(target) as partial, jax.set_mesh(mesh):
        params = saved.load(mesh, dtype, report=lines.append)
        if taken:
            params = _take(taken, params, mesh, seed)
            lines += taken.report(params)
        if export:
            partial.mkdir(parents=True)
            lines += writer.export(partial, model, params, manifest, coder, dtype, int(max_shard_size * 1e9))
        else:
            standalone.write_checkpoint(partial, params, manifest, coder)
    for line in [*lines, f"{source} -> {out}"]:
        report(line)


def _about(saved: Saved, taken: inherit.Inheritance, seed: int) -> dict[str, Any]:
    """The manifest of a model that layers of a saved one make."""
    source = {"directory": str(saved.directory), "kind": "inherit", "layers": ranges.write(taken.layers)}
    return {
        "model": dataclasses.asdict(taken.child),
        "data": {"tokenizer": saved.tokenizer_fingerprint},
        "source": source | {"fresh": sorted(taken.fresh), "seed": seed},
    }


def _take(taken: inherit.Inheritance, params: Any, mesh: Mesh, seed: int) -> Any:
    """The child's parameters, in the dtype of the parent's."""
    dtype = jax.tree.leaves(params)[0].dtype
    key = jax.random.split(jax.random.key(seed))[0]  # as train_step.init_params

    def draw():
        return jax.tree.map(lambda x: x.astype(dtype), transformer.init(taken.child, key))

    places = sharding.tree_sharding(jax.eval_shape(draw), mesh)
    return jax.jit(lambda params: taken(params, draw()), out_shardings=places)(params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="a run, one of its checkpoints, or hf:DIR")
    parser.add_argument("--out", required=True, help="a directory to make: a checkpoint, or hf:DIR")
    parser.add_argument("--dtype", default="float32", help=f"of the parameters: {' or '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--layers", default="", help="that are taken, counted from 0, as 0-5,8; empty is all of it")
    parts = ",".join(inherit.PARTS.values())
    parser.add_argument("--fresh", default="", help=f"with --layers: parts that start at random, of {parts}")
    parser.add_argument("--seed", type=int, default=0, help="of the parts that start at random, as a run's seed is")
    parser.add_argument("--tokenizer", default="", help="empty: the model's own, beside it or in its data")
    parser.add_argument("--max_shard_size", type=float, default=5.0, help="GB in a safetensors file (%(default)s)")
    run_flags(convert, parser)


if __name__ == "__main__":
    main()
