"""The forward pass of a parent with masks over what a cut drops, as an oracle for the model that is cut out.

Every array has the parent's full size, in float64, and what is dropped is held at zero: no smaller matrix is ever made.
`logits` is all that a test needs; `PARENTS`, `random_params` and `random_cut` are what it is tried on.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from scipy.special import erf

from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from lmboost.surgery.subnet import Cut, LayerCut

GPT2 = ModelConfig(
    vocab_size=97, num_layers=4, d_model=24, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=40, max_seq_len=32,
    norm="layernorm", position="learned", mlp="gelu_tanh", qkv_bias=True, attn_out_bias=True, mlp_bias=True,
    tie_embeddings=True, dtype="float32",
)  # fmt: skip
LLAMA = ModelConfig(
    vocab_size=97, num_layers=4, d_model=24, num_heads=9, num_kv_heads=3, head_dim=8, mlp_dim=40, max_seq_len=32,
    dtype="float32",
)  # fmt: skip


def _with(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, **changes)


PARENTS = {
    "gpt2": GPT2,
    "gpt2 by layer": _with(GPT2, scale_attn_by_layer=True, tie_embeddings=False, vocab_multiple=64),
    "opt": _with(GPT2, mlp="relu", position_offset=2),
    "opt without biases": _with(
        GPT2, mlp="relu", position_offset=2, final_norm=False, qkv_bias=False, attn_out_bias=False, mlp_bias=False
    ),
    "pythia": _with(
        GPT2, head_dim=32, position="rope", rope_fraction=0.25, mlp="gelu", parallel_residual=True,
        tie_embeddings=False,
    ),
    "llama": LLAMA,
    "llama3": _with(
        LLAMA, num_kv_heads=1, rope_scaling_factor=8.0, rope_original_seq_len=16, rope_theta=500.0,
        tie_embeddings=True, vocab_multiple=64,
    ),
    "mistral": _with(LLAMA, sliding_window=5),
    "qwen2": _with(LLAMA, qkv_bias=True, tie_embeddings=True),
    "qwen3": _with(LLAMA, qk_norm="head"),
    "olmo1": _with(LLAMA, norm="layernorm_nobias", norm_eps=1e-3),
    "olmo2": _with(LLAMA, qk_norm="full", norm_placement="post"),
    "gemma": _with(
        LLAMA, sliding_window=5, qk_norm="head", norm_placement="both", zero_centred_norm=True, mlp="gelu_tanh_gated",
        embed_scale=24**0.5, residual_scale=0.7, attn_scale=0.4, attn_softcap=2.0, logit_divisor=1.5,
        logit_softcap=3.0, rope_scaling="linear", rope_scaling_factor=4.0, tie_embeddings=True,
    ),
    "others": _with(LLAMA, qk_norm="full", final_norm=False, scale_attn_by_layer=True, norm_eps=1e-2, qkv_bias=True),
}  # fmt: skip
SPACES = [f"{granularity} {scope}" for granularity in ("coarse", "fine") for scope in ("uniform", "layerwise")]


def random_params(config: ModelConfig, seed: int = 1):
    """Every parameter drawn at random, biases and scales of norms too; numpy float32."""
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))

    def one(path, x):
        ones = jax.tree_util.keystr(path).endswith("['scale']") and not config.zero_centred_norm
        return np.asarray(ones + 0.3 * draw.normal(size=x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def random_batch(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of 16 tokens: one document, two of them, padding around one. int32 "tokens", "segment_ids", "positions"."""
    segment_ids = np.array([[1] * 16, [1] * 7 + [2] * 9, [0] * 3 + [1] * 8 + [0] * 5], np.int32)
    positions = np.array([[*range(16)], [*range(7), *range(9)], [0] * 3 + [*range(8)] + [0] * 5], np.int32)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, segment_ids.shape, dtype=np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}


# ---------------------------------------------------------------- cuts


def whole(config: ModelConfig) -> Cut:
    """The cut that keeps everything."""
    heads = (tuple(range(config.num_heads // config.num_kv_heads)),) * config.num_kv_heads
    rest = tuple(range(config.num_kv_heads)), heads, tuple(range(config.head_dim)), tuple(range(config.mlp_dim))
    return Cut(tuple(range(config.d_model)), tuple(LayerCut(i, *rest) for i in range(config.num_layers)))


def random_cut(config: ModelConfig, space: str, seed: int, head_sizes: Sequence[int] = ()) -> Cut:
    """A cut in one of SPACES, with at least two layers and a third of everything else.

    head_sizes: those to choose from; empty is all from a quarter of the parent's on.
    """
    granularity, scope = space.split()
    draw = np.random.default_rng([seed, SPACES.index(space)])
    head_sizes = head_sizes or range(max(1, config.head_dim // 4), config.head_dim + 1)
    ratio = config.num_heads // config.num_kv_heads

    def some(count, of):
        kept = np.sort(draw.permutation(of)[:count]) if granularity == "fine" else range(count)
        return tuple(int(i) for i in kept)

    def count(largest):
        return int(draw.integers(-(-largest // 3), largest + 1))

    def sizes():
        return count(config.num_kv_heads), count(ratio), int(draw.choice(head_sizes)), count(config.mlp_dim)

    shared, layers = sizes(), []
    for layer in np.sort(draw.permutation(config.num_layers)[: draw.integers(2, config.num_layers + 1)]):
        groups, each, features, units = sizes() if scope == "layerwise" else shared
        heads = tuple(some(each, ratio) for _ in range(groups))
        kept = some(groups, config.num_kv_heads), heads, some(features, config.head_dim), some(units, config.mlp_dim)
        layers.append(LayerCut(int(layer), *kept))
    return Cut(some(count(config.d_model), config.d_model), tuple(layers))


def _ones_at(kept, size: int) -> np.ndarray:
    mask = np.zeros(size)
    mask[list(kept)] = 1
    return mask


# ---------------------------------------------------------------- the forward pass


def logits(config: ModelConfig, params, cut: Cut, tokens, segment_ids, positions) -> np.ndarray:
    """float64 [B, T, V] without padded vocabulary, of what `cut` leaves of a parent with equal layers.

    config, params: the parent's; tokens, segment_ids, positions: int [B, T].
    """
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    width_D = _ones_at(cut.width, config.d_model)
    x_BxTxD = p["embed"]["embedding"][tokens] * width_D
    if config.position == "learned":
        x_BxTxD += p["position_embed"]["embedding"][positions + config.position_offset] * width_D
    x_BxTxD *= config.embed_scale
    kept = {layer.layer: layer for layer in cut.layers}
    passed = 0
    for layer in range(config.num_layers):
        if layer in kept:
            passed += 1
            own = jax.tree.map(lambda a, i=layer: a[i], p["layers"])
            x_BxTxD = _block(config, own, kept[layer], x_BxTxD, width_D, segment_ids, positions, passed)
    if config.final_norm:
        x_BxTxD = _norm(config, config.norm, p["final_norm"], x_BxTxD, width_D)
    head_DxV = p["embed"]["embedding"].T if config.tie_embeddings else p["head"]
    return _cap((x_BxTxD @ head_DxV)[..., : config.vocab_size] / config.logit_divisor, config.logit_softcap)


def _cap(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def _norm(config, kind, p, x, mask):
    """Over the last axis: mean and variance of what the mask keeps; the rest stays zero."""
    count = mask.sum()
    if kind != "rmsnorm":
        x = (x - (x * mask).sum(-1, keepdims=True) / count) * mask
    y = x / np.sqrt((x * x * mask).sum(-1, keepdims=True) / count + config.norm_eps)
    y = y * (p["scale"] + config.zero_centred_norm)
    return (y + p["bias"]) * mask if kind == "layernorm" else y * mask


def _block(config, p, cut, x_BxTxD, width_D, segment_ids, positions, number):
    def attn(x):
        y = _attention(config, p["attn"], cut, x, segment_ids, positions, number) * width_D
        return post("attn_post_norm", y)

    def mlp(x):
        return post("mlp_post_norm", _mlp(config, p["mlp"], _ones_at(cut.units, config.mlp_dim), x) * width_D)

    def post(name, y):
        if config.norm_placement == "both":
            y = _norm(config, config.norm, p[name], y, width_D)
        return y * config.residual_scale

    def attn_norm(x):
        return _norm(config, config.norm, p["attn_norm"], x, width_D)

    def mlp_norm(x):
        return _norm(config, config.norm, p["mlp_norm"], x, width_D)

    if config.norm_placement == "post":
        x_BxTxD = x_BxTxD + attn_norm(attn(x_BxTxD))
        return x_BxTxD + mlp_norm(mlp(x_BxTxD))
    if config.parallel_residual:
        return x_BxTxD + attn(attn_norm(x_BxTxD)) + mlp(mlp_norm(x_BxTxD))
    x_BxTxD = x_BxTxD + attn(attn_norm(x_BxTxD))
    return x_BxTxD + mlp(mlp_norm(x_BxTxD))


def _attention(config, p, cut, x_BxTxD, segment_ids, positions, number):
    group_size = config.num_heads // config.num_kv_heads
    kv_K = _ones_at(cut.groups, config.num_kv_heads)
    heads_H = _ones_at(
        [g * group_size + h for g, heads in zip(cut.groups, cut.heads, strict=True) for h in heads], config.num_heads
    )
    features_N = _ones_at(cut.features, config.head_dim)

    def project(name, heads):
        y = np.einsum("btd,dhn->bthn", x_BxTxD, p[name]["kernel"]) + (p[name]["bias"] if config.qkv_bias else 0)
        return y * heads[:, None] * features_N

    def turned(name, heads):
        y = project(name, heads)
        if config.qk_norm == "head":
            y = _norm(config, "rmsnorm", p[f"{name}_norm"], y, features_N)
        elif config.qk_norm == "full":
            flat = y.reshape(*y.shape[:2], -1)
            flat = _norm(config, "rmsnorm", p[f"{name}_norm"], flat, np.outer(heads, features_N).ravel())
            y = flat.reshape(y.shape)
        y = y * heads[:, None]
        return _rotate(config, cut.features, y, positions) if config.position == "rope" else y

    q_BxTxHxN, k_BxTxKxN, v_BxTxKxN = turned("q", heads_H), turned("k", kv_K), project("v", kv_K)
    y_BxTxHxN = np.zeros_like(q_BxTxHxN)
    for head in range(config.num_heads):
        q, k, v = q_BxTxHxN[:, :, head], k_BxTxKxN[:, :, head // group_size], v_BxTxKxN[:, :, head // group_size]
        scores_BxTxT = q @ k.swapaxes(1, 2) * (config.attn_scale or 1 / math.sqrt(len(cut.features)))
        scores_BxTxT = _cap(scores_BxTxT, config.attn_softcap)
        if config.scale_attn_by_layer:
            scores_BxTxT = scores_BxTxT / number
        y_BxTxHxN[:, :, head] = _softmax(scores_BxTxT, _seen(config, segment_ids)) @ v * heads_H[head]
    o = np.einsum("bthn,hnd->btd", y_BxTxHxN, p["o"]["kernel"])
    return o + (p["o"]["bias"] if config.attn_out_bias else 0)


def _seen(config, segment_ids):
    """bool [B, T, T]: earlier tokens of the query's segment, within its window."""
    rows, tokens = segment_ids.shape
    seen = np.zeros((rows, tokens, tokens), bool)
    for t in range(tokens):
        first = max(0, t + 1 - config.sliding_window) if config.sliding_window else 0
        for s in range(first, t + 1):
            seen[:, t, s] = segment_ids[:, t] == segment_ids[:, s]
    return seen


def _softmax(scores, seen):
    weights = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True)), 0)
    return weights / weights.sum(-1, keepdims=True)


def _rotate(config, features, x_BxTxHxN, positions):
    """Rotary positions of a head that has only these features: the j-th of them is turned with the (j + r / 2)-th."""
    turned = int(len(features) * config.rope_fraction) // 2 * 2
    out = x_BxTxHxN.copy()
    for j in range(turned // 2):
        angle_BxTx1 = positions[..., None] * _frequency(config, config.rope_theta ** (-2 * j / turned))
        a, b = x_BxTxHxN[..., features[j]], x_BxTxHxN[..., features[j + turned // 2]]
        out[..., features[j]] = a * np.cos(angle_BxTx1) - b * np.sin(angle_BxTx1)
        out[..., features[j + turned // 2]] = b * np.cos(angle_BxTx1) + a * np.sin(angle_BxTx1)
    return out


def _frequency(config, frequency: float) -> float:
    """With Llama 3.1's stretching of long waves, case by case as in its release."""
    if config.rope_scaling_factor == 1.0:
        return frequency
    if config.rope_scaling == "linear":
        return frequency / config.rope_scaling_factor
    wavelength, original = 2 * math.pi / frequency, config.rope_original_seq_len
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / config.rope_scaling_factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / config.rope_scaling_factor + smooth * frequency


def _mlp(config, p, units_F, x_BxTxD):
    def dense(name, x):
        return x @ p[name]["kernel"] + (p[name]["bias"] if config.mlp_bias else 0)

    h_BxTxF = dense("up", x_BxTxD)
    if config.mlp == "silu_gated":
        gate_BxTxF = dense("gate", x_BxTxD)
        h_BxTxF = h_BxTxF * gate_BxTxF / (1 + np.exp(-gate_BxTxF))
    elif config.mlp == "gelu_tanh_gated":
        h_BxTxF = h_BxTxF * _gelu_tanh(dense("gate", x_BxTxD))
    elif config.mlp == "relu":
        h_BxTxF = np.maximum(h_BxTxF, 0)
    elif config.mlp == "gelu":
        h_BxTxF = h_BxTxF * (1 + erf(h_BxTxF / math.sqrt(2))) / 2
    else:
        h_BxTxF = _gelu_tanh(h_BxTxF)
    return dense("down", h_BxTxF * units_F)


def _gelu_tanh(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
