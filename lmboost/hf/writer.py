"""A model of ours as a Hugging Face Hub directory that the transformers library loads."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmboost import sharding
from lmboost.data.tokenizer import Tokenizer
from lmboost.errors import UserError
from lmboost.hf import card, files, tokenizer_files, weights
from lmboost.hf.families import FAMILIES, QWEN2
from lmboost.hf.family import Family
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import widen

_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def export(
    directory: pathlib.Path,
    model: ModelConfig,
    params: Mapping[str, Any],
    manifest: Mapping[str, Any],
    tokenizer: Tokenizer,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    trained: Mapping[str, float] | None = None,
    license: str = "",
) -> list[str]:
    """Writes config.json, safetensors, tokenizer, generation_config.json and a model card into an empty directory.

    Padded rows of the vocabulary are left out; layers of unequal sizes are filled up with zeros to equal ones, and so
    are heads that do not make up the width where they must. Returns a line that says what was written. Raises a
    UserError where no architecture of transformers computes what the model does. Of several that do it is the one that
    the model was read from, as `manifest` says. `trained` and `license` are for the card, see `card.text`.
    """
    family = family_of(model, manifest.get("source", {}).get("architecture", ""))
    model, params = widened(model, params, family)
    if family is QWEN2 and not tokenizer_files.is_qwen(tokenizer):
        # AutoTokenizer would split texts for a Qwen2 model as Qwen does, whatever its files say.
        model = dataclasses.replace(model, attn_out_bias=True)
        params, family = _with_zero_bias(params), family_of(model)
    leaves = {sharding.path_name(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(params)}
    tensors = weights.tensors(family, {path: x.shape for path, x in leaves.items()}, model.vocab_size)
    entries = [weights.entry(tensor, leaves, _DTYPES[dtype]) for tensor in tensors]
    files.write_tensors(directory, entries, _DTYPES[dtype], max_shard_bytes)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = {"architectures": [family.architecture], "model_type": family.model_type, "torch_dtype": dtype}
    files.write_json(directory / "config.json", config | family.config(model) | special | {"pad_token_id": None})
    tokenizer_files.write(tokenizer, directory, model.max_seq_len)
    ends = tokenizer.special.stop_ids
    special |= {"eos_token_id": list(ends)} if len(ends) > 1 else {}
    files.write_json(directory / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    about = card.text(family.architecture, model, manifest, trained or {}, license)
    (directory / "README.md").write_text(about, encoding="utf-8")
    return [f"{family.architecture}, {model.num_params():,} parameters in {dtype}, {len(entries)} tensors"]


def widened(model: ModelConfig, params: Mapping[str, Any], family: Family) -> tuple[ModelConfig, Mapping[str, Any]]:
    """(model, params) with layers of equal sizes, and as many heads as the family must have: filled up with zeros."""
    wide = widen.wide_config(model, family.heads)
    if wide == model:
        return model, params
    return wide, jax.jit(lambda params: widen.widen(model, params, wide))(params)


def family_of(
    model: ModelConfig,
    origin: str = "",
    families: Sequence[Family] = FAMILIES,
    lacks: Callable[[Family, ModelConfig], Sequence[str]] = lambda family, model: (),
    library: str = "transformers",
) -> Family:
    """The architecture that a model is written as; a UserError says which switches or sizes stand in the way.

    origin: the architecture that is asked first.
    families, lacks: those to choose from for `library`, and what it lacks of one besides, worded as misfits are.
    """
    if not model.num_layers:
        raise UserError("the model has no layers, and transformers none like it: let it grow (init.grow) first.")
    equal = widen.wide_config(model)
    misfits = {family.architecture: [*family.misfits(equal), *lacks(family, equal)] for family in families}
    for family in sorted(families, key=lambda family: family.architecture != origin):
        if not misfits[family.architecture]:
            widen.wide_config(model, family.heads)  # raises where zeros can't fill it up
            return family
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    raise UserError(
        f"no architecture of {library} that lmboost writes computes what this model does. {nearest} would, but for "
        f"{', '.join(misfits[nearest])}."
    )


def _with_zero_bias(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with a bias of zero on the attention's output, which changes nothing."""
    layers = params["layers"]
    kernel = layers["attn"]["o"]["kernel"]
    o = layers["attn"]["o"] | {"bias": jnp.zeros((kernel.shape[0], kernel.shape[-1]), kernel.dtype)}
    return params | {"layers": layers | {"attn": layers["attn"] | {"o": o}}}
