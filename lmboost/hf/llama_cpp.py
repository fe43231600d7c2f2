"""A model of ours as a GGUF file, which llama.cpp reads.

Sources: llama.cpp's convert_hf_to_gguf.py and src/llama-vocab.cpp for the keys and the order of rotated features; names
of tensors and of keys come from its package, gguf.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lmboost import sharding
from lmboost.data.tokenizer import Tokenizer
from lmboost.errors import UserError
from lmboost.hf import llama_cpp_vocab, weights, writer
from lmboost.hf.families import LLAMA, QWEN2, QWEN3
from lmboost.hf.family import Family
from lmboost.models import rope
from lmboost.models.model_config import ModelConfig

PREFIX = "gguf:"
# Llama's features are turned in neighbouring pairs there, Qwen's in two halves, as here.
_ARCHITECTURES = {LLAMA.architecture: "LLAMA", QWEN2.architecture: "QWEN2", QWEN3.architecture: "QWEN3"}
# Llama's features have a factor each, which says what llama3's are stretched by.
_ROPE_SCALINGS = {LLAMA.architecture: ("linear", "llama3"), QWEN2.architecture: ("linear",)}
_ROPE_SCALINGS |= {QWEN3.architecture: ("linear",)}
_FACTORS = "rope_freqs.weight"
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def check_installed(out: str) -> None:
    """Raises a UserError where gguf is missing."""
    if not importlib.util.find_spec("gguf"):
        raise UserError(f'--out={out!r}: GGUF files need the package gguf: pip install "lmboost[gguf]".')


def family_of(model: ModelConfig) -> Family:
    """The family that a model is written as; a UserError says what of it llama.cpp lacks."""
    return writer.family_of(model, "", (LLAMA, QWEN2, QWEN3), _lacks, "llama.cpp")


def _lacks(family: Family, model: ModelConfig) -> list[str]:
    """What a model has that transformers' architecture computes, and the file has no place for."""
    expected = {"sliding_window": 0, "mlp_bias": False, "attn_out_bias": False}
    expected |= {"qkv_bias": False} if family is not QWEN2 else {}
    if model.scales_positions and model.rope_scaling not in _ROPE_SCALINGS[family.architecture]:
        expected |= {"rope_scaling_factor": 1.0, "rope_scaling": " or ".join(_ROPE_SCALINGS[family.architecture])}
    return [
        f"{name}={getattr(model, name)!r} (expected {value!r})"
        for name, value in expected.items()
        if getattr(model, name) != value
    ]


def export(
    path: pathlib.Path,
    model: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    dtype: str = "float32",
    name: str = "",
    license: str = "",
) -> list[str]:
    """Writes one GGUF file; matrices in `dtype`, norms and biases in float32. Returns a line that says what is in it.

    Padded rows of the vocabulary are left out, layers of unequal sizes filled up with zeros. One tensor at a time is on
    the host. Raises a UserError where llama.cpp has no architecture or no tokenizer that does the same.
    """
    import gguf

    family = family_of(model)
    vocabulary = llama_cpp_vocab.of(tokenizer, model.vocab_size)
    model, params = writer.widened(model, params, family)
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[family.architecture]]
    leaves = {sharding.path_name(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(params)}
    tensors = weights.tensors(family, {path: x.shape for path, x in leaves.items()}, model.vocab_size)
    names = gguf.get_tensor_name_map(architecture, model.num_layers)
    file = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        _add_settings(file, model, dtype, name, license)
        vocabulary.add_to(file)
        kinds = ["F32" if len(tensor.shape) == 1 else _DTYPES[dtype] for tensor in tensors]
        for tensor, kind in zip(tensors, kinds, strict=True):
            size = int(np.prod(tensor.shape)) * (4 if kind == "F32" else 2)
            theirs = names.get_name(tensor.name, (".weight", ".bias"))
            # With a raw type the numpy type is not read.
            file.add_tensor_info(theirs, tensor.shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType[kind])
        factors = _rope_factors(model)
        if factors is not None:
            file.add_tensor_info(_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        for tensor, kind in zip(tensors, kinds, strict=True):
            rows = np.concatenate(list(weights.entry(tensor, leaves, kind).blocks()))
            file.write_tensor_data(_turned(rows, tensor, model) if family is LLAMA else rows)
        if factors is not None:
            file.write_tensor_data(factors)
    finally:
        file.close()
    return [f"{file.arch} for llama.cpp, {model.num_params():,} parameters in {dtype}, {len(tensors)} tensors"]


def _add_settings(file: Any, model: ModelConfig, dtype: str, name: str, license: str) -> None:
    """The keys that say what the model is."""
    import gguf

    if name:
        file.add_name(name)
    if license:
        file.add_license(license)
    file.add_file_type(gguf.LlamaFileType[{"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16"}[dtype]])
    file.add_vocab_size(model.vocab_size)
    file.add_context_length(model.max_seq_len)
    file.add_embedding_length(model.d_model)
    file.add_block_count(model.num_layers)
    file.add_feed_forward_length(model.mlp_dim)
    file.add_head_count(model.num_heads)
    file.add_head_count_kv(model.num_kv_heads)
    file.add_key_length(model.head_dim)
    file.add_value_length(model.head_dim)
    file.add_rope_dimension_count(model.head_dim)
    file.add_rope_freq_base(model.rope_theta)
    file.add_layer_norm_rms_eps(model.norm_eps)
    if model.scales_positions and model.rope_scaling == "linear":
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(model.rope_scaling_factor)


def _rope_factors(model: ModelConfig) -> np.ndarray | None:
    """What each frequency is divided by, float32 [R]; None where no list of them is needed."""
    if not model.scales_positions or model.rope_scaling != "llama3":
        return None
    plain = rope.frequencies(dataclasses.replace(model, rope_scaling_factor=1.0))
    return np.asarray(plain / rope.frequencies(model), np.float32)


def _turned(rows: np.ndarray, tensor: weights.Tensor, model: ModelConfig) -> np.ndarray:
    """Queries' and keys' rows with the two halves of each head's features taken in turns."""
    heads = {"q_proj.weight": model.num_heads, "k_proj.weight": model.num_kv_heads}
    count = heads.get(tensor.name.rpartition("self_attn.")[2])
    if count is None:
        return rows
    halves = rows.reshape(count, 2, rows.shape[0] // count // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
