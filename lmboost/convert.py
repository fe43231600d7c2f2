"""Models from and to the Hugging Face Hub's format, without PyTorch.

    python -m lmboost.convert --source=hf:DIR --out=DIR
    python -m lmboost.convert --source=RUN_OR_CHECKPOINT --out=hf:DIR [--dtype=bfloat16]

Known: GPT-2, OPT, GPT-NeoX (Pythia), Llama (SmolLM2, OpenLLaMA, TinyLlama), Mistral, Qwen2, Qwen3, OLMo-2. A checkpoint
made of a Hub directory has its tokenizer beside it, in DIR/tokenizer. A Hub directory needs no conversion to be a
teacher, a start or evaluated: "hf:DIR" can stand wherever a checkpoint can.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from lmboost import checkpoint, sharding, standalone
from lmboost.errors import UserError, exit_on_user_error, one_of
from lmboost.hf import reader, writer
from lmboost.models import transformer
from lmboost.models.model_config import DTYPES, ModelConfig


def convert(
    source: str,
    out: str,
    dtype: str = "float32",
    *,
    step: int = -1,
    tokenizer: str = "",
    max_shard_size: float = 5.0,
    report: Callable[[str], None] = print,
) -> None:
    """Writes the model `source` as `out`; each is a run or checkpoint, or "hf:DIR".

    Args:
      dtype: of the parameters that are written.
      step: of a run: which checkpoint; -1 is the last.
      tokenizer: for `tokenizer.load`; empty is the one beside the model, or of the data that it was trained on.
      max_shard_size: of a safetensors file, in GB.
      report: receives lines that say what went where.

    Raises:
      UserError: bad arguments, a model that one of the two sides cannot express, a damaged file, or a full disk.
    """
    one_of("--dtype", dtype, DTYPES)
    if not (source.startswith(reader.PREFIX) or out.startswith(reader.PREFIX)):
        raise UserError(f"--source={source!r} and --out={out!r} are both checkpoints: give one of them as hf:DIR.")
    if max_shard_size <= 0:
        raise UserError(f"--max_shard_size={max_shard_size} must be above 0; it is in GB.")
    target = standalone.find_target(out)
    directory = checkpoint.find(source, step, "--source")
    manifest = checkpoint.read_manifest(directory)
    model, export = ModelConfig(**manifest["model"]), out.startswith(reader.PREFIX)
    if export:
        writer.family_of(model)  # a misfit is an error before anything is read
    coder = standalone.find_tokenizer(directory, manifest, tokenizer, model, needed=export)
    mesh = sharding.make_mesh(1, -1, 1)  # each device holds a part
    with standalone.whole(target) as partial, jax.set_mesh(mesh):
        params, lines = _load(directory, model, mesh, dtype)
        if export:
            partial.mkdir(parents=True)
            lines += writer.export(partial, params, manifest, coder, dtype, int(max_shard_size * 1e9))
        else:
            standalone.write_checkpoint(partial, params, manifest, coder)
    for line in [*lines, f"{source} -> {out}"]:
        report(line)


def _load(directory: epath.Path, model: ModelConfig, mesh: jax.sharding.Mesh, dtype: str) -> tuple[Any, list[str]]:
    """Parameters, and lines that say where a Hub directory's tensors went."""
    like = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
    if not reader.is_directory(directory):
        return checkpoint.load_params(directory, like, mesh, dtype), []
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), like)
    return reader.load_params(directory, like, mesh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="a run, one of its checkpoints, or hf:DIR")
    parser.add_argument("--out", required=True, help="a directory to make: a checkpoint, or hf:DIR")
    parser.add_argument("--dtype", default="float32", help=f"of the parameters: {' or '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--tokenizer", default="", help="empty: the model's own, beside it or in its data")
    parser.add_argument("--max_shard_size", type=float, default=5.0, help="GB in a safetensors file (%(default)s)")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    flags = vars(parser.parse_args())
    show_traceback = flags.pop("traceback")
    exit_on_user_error(lambda: convert(**flags), show_traceback)


if __name__ == "__main__":
    main()
