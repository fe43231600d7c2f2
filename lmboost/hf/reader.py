"""Models of the Hugging Face Hub as checkpoints, without PyTorch.

A local directory with config.json, safetensors and a tokenizer can stand wherever a checkpoint can, written "hf:DIR":
`checkpoint` asks here where it is, what it holds and for its parameters. `writer` writes such directories.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lmboost import sharding
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError
from lmboost.hf import config_json, files, weights
from lmboost.hf.family import Family
from lmboost.models import transformer

PREFIX = "hf:"
_HEADS = ("lm_head.weight", "embed_out.weight")
# Tensors that are no parameters: masks and rotary tables that older versions saved.
_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def find(path: str, step: int, field: str) -> epath.Path:
    """The directory of "hf:DIR"."""
    directory = epath.Path(os.path.abspath(os.path.expanduser(path.removeprefix(PREFIX))))
    if not directory.is_dir():
        raise UserError(
            f"{field}={path!r}: there is no directory {directory}. Models are read from a local directory: "
            "`hf download OWNER/NAME --local-dir DIR`, then give hf:DIR."
        )
    if not is_directory(directory):
        raise UserError(
            f"{field}={path!r} is no Hub directory: there is neither config.json nor {files.WEIGHTS} in it. A run "
            f"or a checkpoint is given without {PREFIX!r}."
        )
    if step != -1:
        raise UserError(f"{field}={path!r}, step {step}: a Hub directory has no steps, give none.")
    return directory


def is_directory(directory: epath.Path) -> bool:
    """Whether a directory is one of the Hub's, and no checkpoint."""
    return not (directory / "params").exists() and any(
        (directory / name).exists() for name in ("config.json", files.WEIGHTS, files.INDEX)
    )


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """A manifest as a checkpoint has it, but without "config": nothing was trained here.

    `manifest["data"]["tokenizer"]` is the tokenizer's fingerprint, None where the directory has no file of one.
    """
    published = config_json.read(pathlib.Path(directory))
    if (layers := published.model.num_layers) > (stored := len(files.open_tensors(published.directory))):
        raise UserError(
            f"config.json in {directory} speaks of {layers} layers, but only {stored} tensors are stored beside it: "
            "the two are not of one model."
        )
    there = any((directory / name).exists() for name in tokenizer_lib.FILE_NAMES.values())
    tokenizer = tokenizer_lib.load(directory) if there else None
    if tokenizer and tokenizer.text_vocab_size > published.model.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.text_vocab_size} pieces, but config.json beside it vocab_size="
            f"{published.model.vocab_size}: give the tokenizer that the model was trained with."
        )
    return {
        "model": dataclasses.asdict(published.model),
        "data": {"tokenizer": tokenizer and tokenizer.fingerprint},
        "source": {"directory": str(directory), "architecture": published.family.architecture},
    }


def shapes(directory: epath.Path, vocab_rows: int) -> Any:
    """The parameters of a Hub directory as a tree of shapes, padded to `vocab_rows` where these are more."""
    model = config_json.read(pathlib.Path(directory)).model
    model = dataclasses.replace(model, vocab_multiple=max(vocab_rows, model.vocab_size))
    return jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))


def load_params(directory: epath.Path, like: Any, mesh: Mesh) -> tuple[Any, list[str]]:
    """(parameters, report): the tensors of a Hub directory, read into their places on `mesh`.

    Args:
      like: the tree of `shapes`, with the dtypes that the parameters get.

    Returns:
      The tree, and lines that say of every tensor where it went or why it was left out.

    Raises:
      UserError: a tensor is missing, left over, of another shape or of a dtype that is not read; a file is damaged.
    """
    published = config_json.read(pathlib.Path(directory))
    stored = files.open_tensors(published.directory)
    paths = {sharding.path_name(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(like)}
    wanted = weights.tensors(published.family, {k: x.shape for k, x in paths.items()}, published.model.vocab_size)
    found, skipped = _match(published, wanted, stored)
    places = jax.tree_util.tree_leaves_with_path(sharding.tree_sharding(like, mesh))
    leaves = weights.zeros(paths, {sharding.path_name(keys): place for keys, place in places})
    for tensor in wanted:
        weights.read(tensor, found[tensor.name], leaves)
    tree = jax.tree_util.tree_map_with_path(lambda keys, _: leaves[sharding.path_name(keys)], like)
    return tree, [*_report(published.family, wanted, found, paths), *skipped]


def _match(
    published: config_json.Published, wanted: Sequence[weights.Tensor], stored: Mapping[str, files.Stored]
) -> tuple[dict[str, files.Stored], list[str]]:
    """The tensors that are wanted by their full names, and why the others are left out."""
    where, prefix = published.directory, published.family.prefix
    left = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    found, skipped = {}, []
    for tensor in wanted:
        there = left.pop(tensor.name.removeprefix(prefix), None)
        if there is None:
            raise UserError(f"tensor {tensor.name!r} is missing in {where}: download all of the model's files.")
        if there.dtype not in files.DTYPES:
            raise UserError(
                f"tensor {tensor.name!r} in {where} is of dtype {there.dtype}, expected one of "
                f"{', '.join(files.DTYPES)}: quantized models are not read, give the one it was made from."
            )
        if there.shape != tensor.shape:
            raise UserError(
                f"tensor {tensor.name!r} in {where} has shape {list(there.shape)}, but config.json makes it "
                f"{list(tensor.shape)}: the two files are not of one model."
            )
        found[tensor.name] = there
    for name, tensor in left.items():
        if _BUFFERS.search(name):
            skipped.append(f"{name} left out: a buffer, not a parameter")
        elif name in _HEADS and published.model.tie_embeddings:
            _check_tied(name, tensor, next(found[t.name] for t in wanted if t.paths == ("embed/embedding",)))
            skipped.append(f"{name} left out: the embedding again")
        else:
            raise UserError(
                f"tensor {name!r} is left over in {where}: {published.family.architecture} with this config.json has "
                "none of that name. The two files are not of one model."
            )
    return found, skipped


def _check_tied(name: str, head: files.Stored, embedding: files.Stored) -> None:
    """The head that a tied model was saved with says the same as its embedding."""
    rows = max(1, weights.BLOCK_BYTES // max(1, 4 * embedding.shape[1]))
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    for start in range(0, embedding.shape[0] if same else 0, rows):
        stop = min(start + rows, embedding.shape[0])
        same = same and np.array_equal(head.rows(start, stop), embedding.rows(start, stop))
    if not same:
        raise UserError(
            f"tensor {name!r} in {head.file} is not the embedding, but config.json says tie_word_embeddings=true: "
            "set it to false to read both, or download the files again."
        )


def _report(family: Family, tensors: Sequence[weights.Tensor], found: Mapping, paths: Mapping) -> list[str]:
    """One line for each name of a tensor, the layers together."""
    lines = []
    for name, _, targets in family.tensors:
        same = [t for t in tensors if t.paths == targets]
        if same:
            there, into = found[same[0].name], ", ".join(f"{path} {list(paths[path].shape)}" for path in targets)
            times = f" x {len(same)}" if "*" in name else ""
            lines.append(f"{name} {list(there.shape)} {there.dtype}{times} -> {into}")
    return lines
