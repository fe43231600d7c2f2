"""The architectures of the transformers library that the decoder computes: GPT-2, OPT, GPT-NeoX, Llama and its kin.

Each says how its config.json becomes a ModelConfig and back, and where its tensors lie in the parameters.
"""

import functools
from typing import Any

from lmboost.hf import family
from lmboost.hf.family import ACTIVATION_NAMES, ACTIVATIONS, ROPE_KEYS, Family, Keys
from lmboost.models.model_config import ModelConfig

_BIASES = ("qkv_bias", "attn_out_bias", "mlp_bias")
_NAMES = {  # of all but GPT-2
    "vocab_size": "vocab_size", "num_hidden_layers": "num_layers", "hidden_size": "d_model",
    "num_attention_heads": "num_heads", "max_position_embeddings": "max_seq_len",
    "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
_PLAIN = {
    "final_norm": (True,), "norm_placement": ("pre",), "parallel_residual": (False,), "qk_norm": ("none",),
    "sliding_window": (0,), "scale_attn_by_layer": (False,),
}  # fmt: skip


def _linear(name: str, weight: str, bias: str, *paths: str) -> tuple:
    """A projection: its published name, the layouts of weight and bias, our parameters that hold it."""
    return (
        (f"{name}.weight", weight, tuple(f"{path}/kernel" for path in paths)),
        (f"{name}.bias", bias, tuple(f"{path}/bias" for path in paths)),
    )


def _norm(name: str, path: str) -> tuple:
    return ((f"{name}.weight", "d->d", (f"{path}/scale",)), (f"{name}.bias", "d->d", (f"{path}/bias",)))


def _read_biases(c: Keys) -> dict[str, bool]:
    return {"qkv_bias": c["attention_bias"], "attn_out_bias": c["attention_bias"]}


# ---------------------------------------------------------------- Llama and what follows it

_LLAMA_NAMES = _NAMES | {
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps", "initializer_range": "init_std",
}  # fmt: skip
_LLAMA_KEYS = ROPE_KEYS | {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_KEYS = _LLAMA_KEYS | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_LLAMA_SWITCHES = _PLAIN | {
    "norm": ("rmsnorm",), "position": ("rope",), "rope_fraction": (1.0,), "mlp": ("silu_gated",), "mlp_bias": (False,),
}  # fmt: skip
_ANY_WINDOW = range(1 << 31)


def _read_llama(c: Keys, **more: Any) -> dict[str, Any]:
    c.need("hidden_act", "silu", "swish")
    heads = c["num_attention_heads"]
    head_dim = c["head_dim"] or c["hidden_size"] // heads
    rope = family.read_rope(c, head_dim)
    if rope["rope_fraction"] != 1.0:
        raise c.refuse("partial_rotary_factor", rope["rope_fraction"], "expected 1.0 in this architecture")
    groups = {"num_kv_heads": c["num_key_value_heads"] or heads, "head_dim": head_dim}
    return {"norm": "rmsnorm", "position": "rope", "mlp": "silu_gated"} | rope | groups | more


def _write_llama(m: ModelConfig, **more: Any) -> dict[str, Any]:
    return {"hidden_act": "silu"} | family.write_rope(m) | more


def _write_qwen(m: ModelConfig, **more: Any) -> dict[str, Any]:
    window = {"sliding_window": m.sliding_window, "max_window_layers": 0} if m.sliding_window else {}
    return _write_llama(m, use_sliding_window=bool(m.sliding_window), **window, **more)


def _llama_tensors(attn_norm: str = "input_layernorm", mlp_norm: str = "post_attention_layernorm") -> tuple:
    attn, mlp = "model.layers.*.self_attn.", "model.layers.*.mlp."
    return (
        ("model.embed_tokens.weight", "v,d->vd", ("embed/embedding",)),
        *_norm(f"model.layers.*.{attn_norm}", "layers/attn_norm"),
        *_linear(f"{attn}q_proj", "hn,d->dhn", "hn->hn", "layers/attn/q"),
        *_linear(f"{attn}k_proj", "hn,d->dhn", "hn->hn", "layers/attn/k"),
        *_linear(f"{attn}v_proj", "hn,d->dhn", "hn->hn", "layers/attn/v"),
        *_linear(f"{attn}o_proj", "d,hn->hnd", "d->d", "layers/attn/o"),
        *_norm(f"{attn}q_norm", "layers/attn/q_norm"),
        *_norm(f"{attn}k_norm", "layers/attn/k_norm"),
        *_norm(f"model.layers.*.{mlp_norm}", "layers/mlp_norm"),
        *_linear(f"{mlp}gate_proj", "f,d->df", "f->f", "layers/mlp/gate"),
        *_linear(f"{mlp}up_proj", "f,d->df", "f->f", "layers/mlp/up"),
        *_linear(f"{mlp}down_proj", "d,f->fd", "d->d", "layers/mlp/down"),
        *_norm("model.norm", "final_norm"),
        ("lm_head.weight", "v,d->dv", ("head",)),
    )


_llama_like = functools.partial(Family, names=_LLAMA_NAMES, prefix="model.", tensors=_llama_tensors())

LLAMA = _llama_like(
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys=_LLAMA_KEYS | {"attention_bias": False, "mlp_bias": False},
    names=_LLAMA_NAMES | {"mlp_bias": "mlp_bias"},
    read=lambda c: _read_llama(c, **_read_biases(c)),
    write=lambda m: _write_llama(m, attention_bias=m.qkv_bias),
    switches=_LLAMA_SWITCHES | {"mlp_bias": (False, True)},
    equal=(("qkv_bias", "attn_out_bias"),),
    heads="divide",  # since transformers 5
)

MISTRAL = _llama_like(
    architecture="MistralForCausalLM",
    model_type="mistral",
    keys=_LLAMA_KEYS
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    read=lambda c: _read_llama(c, sliding_window=c["sliding_window"] or 0),
    write=lambda m: _write_llama(m, sliding_window=m.sliding_window or None),
    switches=_LLAMA_SWITCHES | {"sliding_window": _ANY_WINDOW, "qkv_bias": (False,), "attn_out_bias": (False,)},
)

QWEN2 = _llama_like(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    keys=_QWEN_KEYS,
    read=lambda c: _read_llama(c, qkv_bias=True, sliding_window=family.read_window(c)),
    write=_write_qwen,
    switches=_LLAMA_SWITCHES | {"sliding_window": _ANY_WINDOW, "qkv_bias": (True,), "attn_out_bias": (False,)},
)

QWEN3 = _llama_like(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    keys=_QWEN_KEYS | {"head_dim": 128, "attention_bias": False},
    read=lambda c: _read_llama(c, **_read_biases(c), qk_norm="head", sliding_window=family.read_window(c)),
    write=lambda m: _write_qwen(m, attention_bias=m.qkv_bias),
    switches=_LLAMA_SWITCHES | {"sliding_window": _ANY_WINDOW, "qk_norm": ("head",)},
    equal=(("qkv_bias", "attn_out_bias"),),
)

OLMO2 = _llama_like(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    keys=_LLAMA_KEYS | {"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False},
    read=lambda c: _read_llama(c, **_read_biases(c), qk_norm="full", norm_placement="post"),
    write=lambda m: _write_llama(m, attention_bias=m.qkv_bias),
    switches=_LLAMA_SWITCHES | {"norm_placement": ("post",), "qk_norm": ("full",)},
    equal=(("qkv_bias", "attn_out_bias"),),
    tensors=_llama_tensors("post_attention_layernorm", "post_feedforward_layernorm"),
)

# ---------------------------------------------------------------- LayerNorm and two projections

_LAYERNORM = {"norm": ("layernorm",), "mlp": tuple(ACTIVATION_NAMES)}
_GROUPS = ("num_kv_heads", "num_heads")
_QKV = ("layers/attn/q", "layers/attn/k", "layers/attn/v")


def _read_layernorm(c: Keys, width: int, heads: int, activation: str, **more: Any) -> dict[str, Any]:
    """The fields that GPT-2, OPT and GPT-NeoX have in common."""
    if width % heads:
        raise c.refuse("the number of heads", heads, f"expected a divisor of the width {width}")
    if c[activation] not in ACTIVATIONS:
        raise c.refuse(activation, c[activation], f"expected one of {', '.join(ACTIVATIONS)}")
    sizes = {"num_kv_heads": heads, "head_dim": width // heads}
    return {"norm": "layernorm", "mlp": ACTIVATIONS[c[activation]]} | sizes | more


def _read_gpt2(c: Keys) -> dict[str, Any]:
    c.need("scale_attn_weights", True)
    c.need("add_cross_attention", False)
    more = {"mlp_dim": c["n_inner"] or 4 * c["n_embd"], "position": "learned"} | dict.fromkeys(_BIASES, True)
    return _read_layernorm(c, c["n_embd"], c["n_head"], "activation_function", **more)


def _write_gpt2(m: ModelConfig) -> dict[str, Any]:
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return {"activation_function": ACTIVATION_NAMES[m.mlp]} | dropout


GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    keys={
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    names={
        "vocab_size": "vocab_size", "n_positions": "max_seq_len", "n_embd": "d_model", "n_layer": "num_layers",
        "n_head": "num_heads", "n_inner": "mlp_dim", "layer_norm_epsilon": "norm_eps", "initializer_range": "init_std",
        "scale_attn_by_inverse_layer_idx": "scale_attn_by_layer", "tie_word_embeddings": "tie_embeddings",
    },
    read=_read_gpt2,
    write=_write_gpt2,
    switches=_PLAIN | _LAYERNORM | dict.fromkeys(_BIASES, (True,))
    | {"position": ("learned",), "position_offset": (0,), "scale_attn_by_layer": (False, True)},
    equal=(_GROUPS,),
    heads="full",
    prefix="transformer.",
    tensors=(
        ("transformer.wte.weight", "v,d->vd", ("embed/embedding",)),
        ("transformer.wpe.weight", "t,d->td", ("position_embed/embedding",)),
        *_norm("transformer.h.*.ln_1", "layers/attn_norm"),
        *_linear("transformer.h.*.attn.c_attn", "d,phn->dhn", "phn->hn", *_QKV),
        *_linear("transformer.h.*.attn.c_proj", "hn,d->hnd", "d->d", "layers/attn/o"),
        *_norm("transformer.h.*.ln_2", "layers/mlp_norm"),
        *_linear("transformer.h.*.mlp.c_fc", "d,f->df", "f->f", "layers/mlp/up"),
        *_linear("transformer.h.*.mlp.c_proj", "f,d->fd", "d->d", "layers/mlp/down"),
        *_norm("transformer.ln_f", "final_norm"),
        ("lm_head.weight", "v,d->dv", ("head",)),
    ),
)  # fmt: skip


def _read_opt(c: Keys) -> dict[str, Any]:
    c.need("do_layer_norm_before", True)
    c.need("word_embed_proj_dim", None, c["hidden_size"])
    c.need("layer_norm_elementwise_affine", True)
    more = {"norm_eps": 1e-5, "final_norm": not c["_remove_final_layer_norm"], "position": "learned"}
    more |= {"position_offset": 2} | dict.fromkeys(_BIASES, c["enable_bias"])
    return _read_layernorm(c, c["hidden_size"], c["num_attention_heads"], "activation_function", **more)


def _write_opt(m: ModelConfig) -> dict[str, Any]:
    out = {"word_embed_proj_dim": m.d_model, "_remove_final_layer_norm": not m.final_norm, "enable_bias": m.qkv_bias}
    return out | {"activation_function": ACTIVATION_NAMES[m.mlp], "dropout": 0.0}


_OPT_LAYER = "model.decoder.layers.*."
OPT = Family(
    architecture="OPTForCausalLM",
    model_type="opt",
    keys={
        "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "num_attention_heads": 12,
        "max_position_embeddings": 2048, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
        "word_embed_proj_dim": None, "activation_function": "relu", "init_std": 0.02, "enable_bias": True,
        "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
    },
    names=_NAMES | {"ffn_dim": "mlp_dim", "init_std": "init_std"},
    read=_read_opt,
    write=_write_opt,
    switches=_PLAIN | _LAYERNORM
    | {"position": ("learned",), "position_offset": (2,), "norm_eps": (1e-5,), "final_norm": (True, False)},
    equal=(_GROUPS, ("qkv_bias", "attn_out_bias"), ("qkv_bias", "mlp_bias")),
    heads="full",
    prefix="model.",
    tensors=(
        ("model.decoder.embed_tokens.weight", "v,d->vd", ("embed/embedding",)),
        ("model.decoder.embed_positions.weight", "t,d->td", ("position_embed/embedding",)),
        *_norm(f"{_OPT_LAYER}self_attn_layer_norm", "layers/attn_norm"),
        *_linear(f"{_OPT_LAYER}self_attn.q_proj", "hn,d->dhn", "hn->hn", "layers/attn/q"),
        *_linear(f"{_OPT_LAYER}self_attn.k_proj", "hn,d->dhn", "hn->hn", "layers/attn/k"),
        *_linear(f"{_OPT_LAYER}self_attn.v_proj", "hn,d->dhn", "hn->hn", "layers/attn/v"),
        *_linear(f"{_OPT_LAYER}self_attn.out_proj", "d,hn->hnd", "d->d", "layers/attn/o"),
        *_norm(f"{_OPT_LAYER}final_layer_norm", "layers/mlp_norm"),
        *_linear(f"{_OPT_LAYER}fc1", "f,d->df", "f->f", "layers/mlp/up"),
        *_linear(f"{_OPT_LAYER}fc2", "d,f->fd", "d->d", "layers/mlp/down"),
        *_norm("model.decoder.final_layer_norm", "final_norm"),
        ("lm_head.weight", "v,d->dv", ("head",)),
    ),
)  # fmt: skip


def _read_neox(c: Keys) -> dict[str, Any]:
    for key, same in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        c.need(key, None, c[same])
    width, heads = c["hidden_size"], c["num_attention_heads"]
    rope = family.read_rope(c, width // heads, "rotary_emb_base", "rotary_pct")
    return _read_layernorm(c, width, heads, "hidden_act", mlp_bias=True, **_read_biases(c), **rope)


def _write_neox(m: ModelConfig) -> dict[str, Any]:
    rope = family.write_rope(m)
    # transformers cuts fraction * head_dim to a whole number, which rounding must not push below ours.
    exact = int(m.head_dim * m.rope_fraction) == m.rotary_dim
    return {
        "hidden_act": ACTIVATION_NAMES[m.mlp],
        "attention_bias": m.qkv_bias,
        "rotary_emb_base": rope["rope_theta"],
        "rotary_pct": m.rope_fraction if exact else (m.rotary_dim + 0.5) / m.head_dim,
        "rope_scaling": rope["rope_scaling"],
    }


_NEOX_LAYER = "gpt_neox.layers.*."
NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    keys=ROPE_KEYS | {
        "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "initializer_range": 0.02,
        "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True,
        "rotary_pct": 0.25, "rotary_emb_base": 10000.0, "rope_theta": None, "partial_rotary_factor": None,
    },
    names=_NAMES | {
        "intermediate_size": "mlp_dim", "initializer_range": "init_std", "layer_norm_eps": "norm_eps",
        "use_parallel_residual": "parallel_residual",
    },
    read=_read_neox,
    write=_write_neox,
    switches=_PLAIN | _LAYERNORM | {"position": ("rope",), "parallel_residual": (False, True), "mlp_bias": (True,)},
    equal=(_GROUPS, ("qkv_bias", "attn_out_bias")),
    heads="full",
    prefix="gpt_neox.",
    tensors=(
        ("gpt_neox.embed_in.weight", "v,d->vd", ("embed/embedding",)),
        *_norm(f"{_NEOX_LAYER}input_layernorm", "layers/attn_norm"),
        *_linear(f"{_NEOX_LAYER}attention.query_key_value", "hpn,d->dhn", "hpn->hn", *_QKV),
        *_linear(f"{_NEOX_LAYER}attention.dense", "d,hn->hnd", "d->d", "layers/attn/o"),
        *_norm(f"{_NEOX_LAYER}post_attention_layernorm", "layers/mlp_norm"),
        *_linear(f"{_NEOX_LAYER}mlp.dense_h_to_4h", "f,d->df", "f->f", "layers/mlp/up"),
        *_linear(f"{_NEOX_LAYER}mlp.dense_4h_to_h", "d,f->fd", "d->d", "layers/mlp/down"),
        *_norm("gpt_neox.final_layer_norm", "final_norm"),
        ("embed_out.weight", "v,d->dv", ("head",)),
    ),
)  # fmt: skip

# In the order in which a model of ours is offered to them.
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GPT2, OPT, NEOX)
