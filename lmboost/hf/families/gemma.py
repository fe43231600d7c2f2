"""Gemma 2 and 3, of text alone: norms on both sides of a sublayer, windows in most layers, scaled embeddings."""

import functools
from typing import Any

from lmboost.hf import rope
from lmboost.hf.families import llama
from lmboost.hf.families.llama import ANY_WINDOW, LLAMA_KEYS, LLAMA_NAMES, SWITCHES
from lmboost.hf.family import ANYTHING, BIASED, Family, Keys, Values, norm, read_biases
from lmboost.models.model_config import ModelConfig

_KEYS = LLAMA_KEYS | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "layer_types": None,
}  # fmt: skip
_SWITCHES = SWITCHES | BIASED | ANY_WINDOW | {
    "layer_kinds": llama.patterns("full", "window"), "norm_placement": ("both",), "zero_centred_norm": (True,),
    "mlp": ("gelu_tanh_gated",), "embed_scale": ANYTHING, "attn_softcap": ANYTHING, "logit_softcap": ANYTHING,
    "attn_scale": Values("1 / sqrt of a whole number", lambda x: not x or x == round(x**-2) ** -0.5),
}  # fmt: skip
_SOFTCAPS = {"attn_logit_softcapping": "attn_softcap", "final_logit_softcapping": "logit_softcap"}


def _read_gemma(c: Keys, period: int, by_layer: bool = False, **more: Any) -> dict[str, Any]:
    """period: layers of which the last is full and the others have a window, where `layer_types` does not say."""
    for key in ("hidden_act", "hidden_activation"):
        c.need(key, "gelu_pytorch_tanh", None)
    kinds = ["window" if (i + 1) % period else "full" for i in range(c["num_hidden_layers"])]
    shape, scalar = llama.read_shape(c, by_layer), c["query_pre_attn_scalar"]
    out = {"norm_placement": "both", "zero_centred_norm": True, "mlp": "gelu_tanh_gated"}
    out |= {"embed_scale": c["hidden_size"] ** 0.5, "attn_scale": 0.0 if scalar == shape["head_dim"] else scalar**-0.5}
    out |= {ours: float(c[theirs] or 0.0) for theirs, ours in _SOFTCAPS.items()}
    return out | shape | llama.windows(c, llama.read_kinds(c, kinds)) | read_biases(c) | more


def _write_gemma(m: ModelConfig, **more: Any) -> dict[str, Any]:
    out = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": m.qkv_bias, "layer_types": llama.layer_types(m)}
    out |= {"query_pre_attn_scalar": round(m.attn_scale**-2) if m.attn_scale else m.head_dim}
    out |= {"sliding_window": m.sliding_window or None}
    return out | {theirs: getattr(m, ours) or None for theirs, ours in _SOFTCAPS.items()} | more


def _tensors() -> tuple:
    layer = "model.layers.*."
    kept = [x for x in llama.tensors() if x[2][0].partition("/")[2] not in ("mlp_norm/scale", "mlp_norm/bias")]
    place = next(i for i, x in enumerate(kept) if x[2][0].startswith("layers/mlp/"))
    norms = (
        *norm(f"{layer}post_attention_layernorm", "layers/attn_post_norm"),
        *norm(f"{layer}pre_feedforward_layernorm", "layers/mlp_norm"),
        *norm(f"{layer}post_feedforward_layernorm", "layers/mlp_post_norm"),
    )
    return (*kept[:place], *norms, *kept[place:])


_gemma = functools.partial(
    Family, names=LLAMA_NAMES, prefix="model.", tensors=_tensors(), equal=(("qkv_bias", "attn_out_bias"),)
)
_WIDTH = {"embed_scale": lambda m: m.d_model**0.5}


def _read_gemma2(c: Keys) -> dict[str, Any]:
    c.need("sliding_window_size", None, c["sliding_window"])
    return _read_gemma(c, 2)


GEMMA2 = _gemma(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    keys=_KEYS
    | {
        "vocab_size": 256000, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "sliding_window_size": None,
    },
    read=_read_gemma2,
    write=lambda m: _write_gemma(m, **rope.write(m)),
    switches=_SWITCHES,
    follows=_WIDTH,
)  # fmt: skip


def _read_gemma3(c: Keys) -> dict[str, Any]:
    c.need("use_bidirectional_attention", False, None)
    fields = _read_gemma(c, c["sliding_window_pattern"], by_layer=True, qk_norm="head")
    return fields | llama.read_local_theta(c, fields, c["rope_local_base_freq"])


def _write_gemma3(m: ModelConfig) -> dict[str, Any]:
    return _write_gemma(m, rope_local_base_freq=m.rope_local_theta or m.rope_theta, **rope.write(m))


GEMMA3 = _gemma(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    keys=_KEYS
    | {
        "vocab_size": 262208, "max_position_embeddings": 131072, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
        "_sliding_window_pattern": None, "use_bidirectional_attention": False,
    },
    read=_read_gemma3,
    write=_write_gemma3,
    switches=_SWITCHES | {"qk_norm": ("head",), "rope_local_theta": ANYTHING},
    follows=_WIDTH | {"rope_local_theta": llama.needed_local_theta},
)  # fmt: skip
