"""Named models: shapes and switches as published, to be used as they are or with changes.

`preset("gpt2", dtype="float32")` gives a ModelConfig. Vocabulary sizes are the rows of the released
checkpoints, so that these load without resizing.
"""

import dataclasses

from lmboost.errors import UserError, nearest
from lmboost.models.model_config import ModelConfig


def _gpt2(layers: int, width: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=50257, num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads,
        head_dim=width // heads, mlp_dim=4 * width, max_seq_len=1024, norm="layernorm", position="learned",
        mlp="gelu_tanh", qkv_bias=True, attn_out_bias=True, mlp_bias=True, tie_embeddings=True,
    )  # fmt: skip


def _pythia(layers: int, width: int, heads: int, vocab: int = 50304) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads,
        head_dim=width // heads, mlp_dim=4 * width, max_seq_len=2048, norm="layernorm", rope_fraction=0.25,
        mlp="gelu", parallel_residual=True, qkv_bias=True, attn_out_bias=True, mlp_bias=True,
    )  # fmt: skip


def _llama(layers: int, width: int, heads: int, mlp: int, vocab: int, kv_heads: int = 0, **changes) -> ModelConfig:
    """RMSNorm, rotary positions, SiLU-gated MLP, no biases."""
    return ModelConfig(
        vocab_size=vocab, num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=kv_heads or heads,
        head_dim=width // heads, mlp_dim=mlp, **{"max_seq_len": 2048, **changes},
    )  # fmt: skip


def _qwen2p5(
    layers: int, width: int, heads: int, kv_heads: int, mlp: int, vocab: int = 151936, **changes
) -> ModelConfig:
    """As Llama, with biases on queries, keys and values. The released vocabularies are padded, that of 7B further."""
    return _llama(
        layers, width, heads, mlp, vocab, kv_heads, norm_eps=1e-6, rope_theta=1000000.0, qkv_bias=True,
        **{"max_seq_len": 32768, "tie_embeddings": True, **changes},
    )  # fmt: skip


PRESETS: dict[str, ModelConfig] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32, vocab=50432),
    "pythia-12b": _pythia(36, 5120, 40, vocab=50688),
    # The released 135M was initialised with 1/24; the others with 0.02.
    "smollm2-135m": _llama(
        30, 576, 9, 1536, 49152, 3, max_seq_len=8192, rope_theta=100000.0, tie_embeddings=True, init_std=1 / 24
    ),
    "smollm2-360m": _llama(32, 960, 15, 2560, 49152, 5, max_seq_len=8192, rope_theta=100000.0, tie_embeddings=True),
    "smollm2-1.7b": _llama(24, 2048, 32, 8192, 49152, max_seq_len=8192, rope_theta=130000.0, tie_embeddings=True),
    "llama-3.2-1b": _llama(
        16, 2048, 32, 8192, 128256, 8, max_seq_len=131072, rope_theta=500000.0, tie_embeddings=True,
        rope_scaling_factor=32.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_seq_len=8192,
    ),
    "qwen2.5-0.5b": _qwen2p5(24, 896, 14, 2, 4864),
    "qwen2.5-1.5b": _qwen2p5(28, 1536, 12, 2, 8960, max_seq_len=131072),
    "qwen2.5-3b": _qwen2p5(36, 2048, 16, 2, 11008),
    "qwen2.5-7b": _qwen2p5(28, 3584, 28, 4, 18944, vocab=152064, max_seq_len=131072, tie_embeddings=False),
    "openllama-3b": _llama(26, 3200, 32, 8640, 32000, norm_eps=1e-6),
    "opt-125m": ModelConfig(
        vocab_size=50272, num_layers=12, d_model=768, num_heads=12, num_kv_heads=12, head_dim=64, mlp_dim=3072,
        max_seq_len=2048, norm="layernorm", position="learned", position_offset=2, mlp="relu",
        qkv_bias=True, attn_out_bias=True, mlp_bias=True, tie_embeddings=True,
    ),
    # LET (arXiv 2602.05393). Published: LLaMA style, the sizes, and for 1.4B 24 layers of width 2048 with an MLP
    # of 5461. Chosen: heads of 128, the vocabulary (that of the teacher: SmolLM for 1.4B and 3B, Llama 3.2 for
    # 7B), tied embeddings for 7B (untied would be 7.5B), and the shape of 3B. Llama 7B's layers for 7B.
    "let-1.4b": _llama(24, 2048, 16, 5461, 49152),
    "let-3b": _llama(32, 2560, 20, 7680, 49152),
    "let-7b": _llama(32, 4096, 32, 11008, 128256, tie_embeddings=True),
    # SALT (arXiv 2410.18779). Published: the sizes. Chosen: LLaMA-style layers, heads of 128, and the vocabulary
    # of the GPT-NeoX tokenizer, which was trained on the paper's data, the Pile.
    "salt-1.5b": _llama(24, 2048, 16, 6144, 50304),
    "salt-2.8b": _llama(30, 2560, 20, 7680, 50304),
    "salt-8.6b": _llama(32, 4096, 32, 15360, 50304),
}  # fmt: skip


def preset(name: str, **changes) -> ModelConfig:
    """The model called `name`, with some of its fields changed.

    Raises a UserError on an unknown name or field, with the nearest known one.
    """
    if name not in PRESETS:
        raise UserError(f"there is no model {name!r}{nearest(name, PRESETS)}: expected one of {', '.join(PRESETS)}.")
    fields = [f.name for f in dataclasses.fields(ModelConfig)]
    for field in changes:
        if field not in fields:
            raise UserError(f"a model has no field {field!r}{nearest(field, fields)}.")
    return dataclasses.replace(PRESETS[name], **changes).validate(name)


def tiny(config: ModelConfig, layers: int = 4) -> ModelConfig:
    """The same switches at a size for tests: width 64, `layers` layers, 300 tokens, grouped where `config` is."""
    return dataclasses.replace(
        config, vocab_size=300, num_layers=layers, d_model=64, num_heads=4, head_dim=16, mlp_dim=128, max_seq_len=64,
        num_kv_heads=2 if config.num_kv_heads < config.num_heads else 4, dtype="float32",
    )  # fmt: skip
