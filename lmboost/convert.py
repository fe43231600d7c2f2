"""Models from and to the Hugging Face Hub's format, without PyTorch; for llama.cpp; of some layers of others.

    python -m lmboost.convert --source=hf:DIR --out=DIR
    python -m lmboost.convert --source=RUN_OR_CHECKPOINT --out=hf:DIR [--dtype=bfloat16] [--push=OWNER/NAME]
    python -m lmboost.convert --source=RUN_OR_CHECKPOINT_OR_hf:DIR --out=gguf:FILE [--dtype=bfloat16]
    python -m lmboost.convert --source=RUN_OR_CHECKPOINT_OR_hf:DIR --layers=0-5,8 --out=DIR

Which families are known stands in docs/hub.md. A checkpoint made of a Hub directory has its tokenizer beside it, in
DIR/tokenizer. A Hub directory needs no conversion to be a teacher, a start or evaluated: "hf:DIR" can stand wherever a
checkpoint can. With --layers it is the model that some of the layers make, which nobody has trained yet; a run can take
layers by itself, too (init.kind=inherit).

A Hub directory has a model card of what the run's manifest says. --push sends it to the Hub, to a private repository
that is not there yet or empty, in one commit; the token is the one in HF_TOKEN, or of `hf auth login`.
"""

import argparse
import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from lmboost import checkpoint, places, ranges, sharding, standalone
from lmboost.checkpoint import Saved
from lmboost.data import records
from lmboost.errors import UserError, one_of, run_flags
from lmboost.hf import card, llama_cpp, reader, upload, writer
from lmboost.models import transformer
from lmboost.models.model_config import DTYPES
from lmboost.run import metrics
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
    license: str = "",
    push: str = "",
    public: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Writes the model `source`, or the one that some of its layers make, as `out`.

    Each is a run or checkpoint, or "hf:DIR", and a run can start from what is written (init.path); `out` may also be
    "gguf:FILE", which is for others. The arguments are the flags of the verb, which say what they are; `report`
    receives lines that say what went where.

    Raises:
      UserError: bad arguments, a model that one of the two sides cannot express, layers that are not the source's, a
        damaged file, a full disk, or a Hub that does not take it.
    """
    one_of("--dtype", dtype, DTYPES)
    export, for_llama_cpp = out.startswith(reader.PREFIX), out.startswith(llama_cpp.PREFIX)
    if not (layers or export or for_llama_cpp or source.startswith(reader.PREFIX)):
        raise UserError(
            f"--source={source!r} and --out={out!r} are both checkpoints: give one of them as hf:DIR, --out as "
            "gguf:FILE, or --layers."
        )
    if fresh and not layers:
        raise UserError(f"--fresh={fresh!r} needs --layers: the layers that the model with these random parts has.")
    if max_shard_size <= 0:
        raise UserError(f"--max_shard_size={max_shard_size} must be above 0; it is in GB.")
    _check_leaving(out, license, push, public)
    target = standalone.find_file(out) if for_llama_cpp else standalone.find_target(out)
    repository = upload.Repository.find(push, public) if push else None
    saved = Saved.find(source, step, "--source")
    model, manifest = saved.model, saved.manifest
    taken, trained = None, _trained(saved)
    if layers:
        model = inherit.of_layers(saved.model, inherit.parse_layers(layers, saved.model.num_layers, "--layers"))
        taken = inherit.plan(layers, fresh, saved.model, model, field="--")
        manifest, trained = _about(saved, taken, seed), {}
    # A misfit is an error before anything is read.
    if export:
        writer.family_of(model, manifest.get("source", {}).get("architecture", ""))
    elif for_llama_cpp:
        llama_cpp.family_of(model)
    needs_tokenizer = export or for_llama_cpp or tokenizer or saved.tokenizer_fingerprint
    coder = saved.tokenizer(tokenizer) if needs_tokenizer else None
    manifest = manifest | {"data": manifest["data"] | {"tokenizer": coder and coder.fingerprint}}
    mesh, lines = sharding.make_mesh(1, -1, 1), []  # each device holds a part
    whole = _whole_file(target) if for_llama_cpp else standalone.whole(target)
    with whole as partial, jax.set_mesh(mesh):
        params = saved.load(mesh, dtype, report=lines.append)
        if taken:
            params = _take(taken, params, mesh, seed)
            lines += taken.report(params)
        if export:
            partial.mkdir(parents=True)
            shard_bytes = int(max_shard_size * 1e9)
            lines += writer.export(partial, model, params, manifest, coder, dtype, shard_bytes, trained, license)
        elif for_llama_cpp:
            lines += llama_cpp.export(partial, model, params, coder, dtype, target.stem, license)
        else:
            standalone.write_checkpoint(partial, params, manifest, coder)
    for line in [*lines, f"{source} -> {out}"]:
        report(line)
    if repository:
        report(f"{out} -> {repository.fill(target)}")


def _check_leaving(out: str, license: str, push: str, public: bool) -> None:
    """Raises a UserError where the flags of models that leave do not fit `out`, or a package for it is missing."""
    card.check_license(license)
    if license and not out.startswith((reader.PREFIX, llama_cpp.PREFIX)):
        raise UserError(f"--license={license!r} needs --out=hf:DIR or gguf:FILE: a checkpoint has no place for it.")
    if push and not out.startswith(reader.PREFIX):
        raise UserError(f"--push={push!r} needs --out=hf:DIR: what is sent to the Hub is a Hub directory.")
    if public and not push:
        raise UserError("--public needs --push=OWNER/NAME: what is to be seen by all.")
    if out.startswith(llama_cpp.PREFIX):
        llama_cpp.check_installed(out)


@contextlib.contextmanager
def _whole_file(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """The name of a file to write, which becomes `target` at the end; a UserError where the disk is full."""
    with records.disk_errors(target), places.whole_file(target) as partial:
        yield pathlib.Path(partial)


def _trained(saved: Saved) -> dict[str, float]:
    """How far a run had come at its checkpoint: "step", "tokens", "flops", and "val_loss" if its log has it."""
    if not (saved.directory / "position").exists():
        return {}
    position = checkpoint.read_json(saved.directory, "position")
    trained = {"step": position["step"], **position.get("spent", {})}
    run = checkpoint.Run.of(saved.directory)
    if run and (run.workdir / metrics.FILE).exists():
        for line in metrics.read(str(run.workdir)):
            if line["step"] == position["step"] and "val_loss" in line:
                trained["val_loss"] = line["val_loss"]
    return trained


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
    parser.add_argument("--out", required=True, help="to make: a directory for a checkpoint, hf:DIR, or gguf:FILE")
    parser.add_argument("--dtype", default="float32", help=f"of the parameters: {' or '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--layers", default="", help="that are taken, counted from 0, as 0-5,8; empty is all of it")
    parts = ",".join(inherit.PARTS.values())
    parser.add_argument("--fresh", default="", help=f"with --layers: parts that start at random, of {parts}")
    parser.add_argument("--seed", type=int, default=0, help="of the parts that start at random, as a run's seed is")
    parser.add_argument("--tokenizer", default="", help="empty: the model's own, beside it or in its data")
    parser.add_argument("--max_shard_size", type=float, default=5.0, help="GB in a safetensors file (%(default)s)")
    parser.add_argument("--license", default="", help="of the model, for its card: an identifier of the Hub")
    parser.add_argument("--push", default="", help="with hf:DIR: OWNER/NAME, a repository of the Hub to fill")
    parser.add_argument("--public", action="store_true", help="with --push: a repository that all can see")
    run_flags(convert, parser)


if __name__ == "__main__":
    main()
