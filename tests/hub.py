"""Tiny Hugging Face Hub directories for tests, written without transformers."""

import pathlib

import jax
import numpy as np
import tokenizers

from lmboost import sharding
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.hf import files, writer
from lmboost.models import transformer, vocabulary
from lmboost.models.model_config import ModelConfig

VOCAB = 301  # of the models: no multiple of anything
LLAMA = ModelConfig(
    vocab_size=VOCAB, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_seq_len=64,
    dtype="float32",
)  # fmt: skip


def write_tokenizer(directory, size: int = 280, split=None) -> pathlib.Path:
    """A byte-level tokenizer.json with <s> and </s>; `split` comes before the bytes, and NFC before that."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    if split:
        model.normalizer = tokenizers.normalizers.NFC()
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_]) if split else bytes_
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator([pathlib.Path(__file__).read_text()], trainer)
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    model.save(str(pathlib.Path(directory) / "tokenizer.json"))
    return pathlib.Path(directory) / "tokenizer.json"


def write_words(directory) -> pathlib.Path:
    """A WordPiece tokenizer.json, whose tokens do not say where spaces are."""
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.decoder = tokenizers.decoders.WordPiece()
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    model.save(str(pathlib.Path(directory) / "tokenizer.json"))
    return pathlib.Path(directory) / "tokenizer.json"


def random_params(model: ModelConfig, seed: int = 0):
    """Random parameters, the biases and norms too."""
    params = jax.jit(lambda: transformer.init(model, jax.random.key(seed)))()
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape, np.float32), params)


def write(directory, model: ModelConfig = LLAMA, dtype: str = "float32", max_shard_bytes: int = 10**9):
    """A directory as `writer` writes it; returns the parameters."""
    directory = pathlib.Path(directory)
    tokenizer = tokenizer_lib.load(write_tokenizer(directory))
    params = random_params(model)
    manifest = {"model": vars(model), "data": {"tokenizer": tokenizer.fingerprint}}
    writer.export(directory, model, params, manifest, _elsewhere(tokenizer, directory), dtype, max_shard_bytes)
    return params


def write_config(directory: pathlib.Path, model: ModelConfig) -> None:
    """config.json alone."""
    family = writer.family_of(model)
    keys = {"architectures": [family.architecture], "model_type": family.model_type} | family.config(model)
    files.write_json(directory / "config.json", keys)


def _elsewhere(tokenizer, directory: pathlib.Path):
    moved = directory.with_name(directory.name + "-tokenizer")
    tokenizer.save(moved)
    return tokenizer_lib.load(moved)


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def logits(model: ModelConfig, params, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] of whole rows, without padded vocabulary."""

    def run(params, tokens):
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        h, _ = transformer.apply(model, params, tokens, np.ones(tokens.shape, np.int32), positions)
        return vocabulary.project(h, vocabulary.Head.of(model, params))

    return np.asarray(jax.jit(run)(params, tokens))[..., : model.vocab_size]
