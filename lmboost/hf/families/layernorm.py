"""GPT-2, OPT and GPT-NeoX (Pythia): LayerNorm, biases, an MLP of two projections."""

from typing import Any

from lmboost.hf import family, rope
from lmboost.hf.family import ACTIVATION_NAMES, ACTIVATIONS, BIASED, NAMES, Family, Keys
from lmboost.models.model_config import ModelConfig

_BIASES = ("qkv_bias", "attn_out_bias", "mlp_bias")
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
    switches=_LAYERNORM | dict.fromkeys(_BIASES, (True,))
    | {"position": ("learned",), "position_offset": (0,), "scale_attn_by_layer": (False, True)},
    equal=(_GROUPS,),
    heads="full",
    prefix="transformer.",
    tensors=(
        ("transformer.wte.weight", "v,d->vd", ("embed/embedding",)),
        ("transformer.wpe.weight", "t,d->td", ("position_embed/embedding",)),
        *family.norm("transformer.h.*.ln_1", "layers/attn_norm"),
        *family.linear("transformer.h.*.attn.c_attn", "d,phn->dhn", "phn->hn", *_QKV),
        *family.linear("transformer.h.*.attn.c_proj", "hn,d->hnd", "d->d", "layers/attn/o"),
        *family.norm("transformer.h.*.ln_2", "layers/mlp_norm"),
        *family.linear("transformer.h.*.mlp.c_fc", "d,f->df", "f->f", "layers/mlp/up"),
        *family.linear("transformer.h.*.mlp.c_proj", "f,d->fd", "d->d", "layers/mlp/down"),
        *family.norm("transformer.ln_f", "final_norm"),
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
    names=NAMES | {"ffn_dim": "mlp_dim", "init_std": "init_std"},
    read=_read_opt,
    write=_write_opt,
    switches=_LAYERNORM | BIASED | {"mlp_bias": (False, True)}
    | {"position": ("learned",), "position_offset": (2,), "norm_eps": (1e-5,), "final_norm": (True, False)},
    equal=(_GROUPS, ("qkv_bias", "attn_out_bias"), ("qkv_bias", "mlp_bias")),
    heads="full",
    prefix="model.",
    tensors=(
        ("model.decoder.embed_tokens.weight", "v,d->vd", ("embed/embedding",)),
        ("model.decoder.embed_positions.weight", "t,d->td", ("position_embed/embedding",)),
        *family.norm(f"{_OPT_LAYER}self_attn_layer_norm", "layers/attn_norm"),
        *family.linear(f"{_OPT_LAYER}self_attn.q_proj", "hn,d->dhn", "hn->hn", "layers/attn/q"),
        *family.linear(f"{_OPT_LAYER}self_attn.k_proj", "hn,d->dhn", "hn->hn", "layers/attn/k"),
        *family.linear(f"{_OPT_LAYER}self_attn.v_proj", "hn,d->dhn", "hn->hn", "layers/attn/v"),
        *family.linear(f"{_OPT_LAYER}self_attn.out_proj", "d,hn->hnd", "d->d", "layers/attn/o"),
        *family.norm(f"{_OPT_LAYER}final_layer_norm", "layers/mlp_norm"),
        *family.linear(f"{_OPT_LAYER}fc1", "f,d->df", "f->f", "layers/mlp/up"),
        *family.linear(f"{_OPT_LAYER}fc2", "d,f->fd", "d->d", "layers/mlp/down"),
        *family.norm("model.decoder.final_layer_norm", "final_norm"),
        ("lm_head.weight", "v,d->dv", ("head",)),
    ),
)  # fmt: skip


def _read_neox(c: Keys) -> dict[str, Any]:
    for key, same in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        c.need(key, None, c[same])
    width, heads = c["hidden_size"], c["num_attention_heads"]
    fields = rope.read(c, width // heads, "rotary_emb_base", "rotary_pct")
    return _read_layernorm(c, width, heads, "hidden_act", mlp_bias=True, **family.read_biases(c), **fields)


def _write_neox(m: ModelConfig) -> dict[str, Any]:
    positions = rope.write(m)
    # transformers cuts fraction * head_dim to a whole number, which rounding must not push below ours.
    exact = int(m.head_dim * m.rope_fraction) == m.rotary_dim
    return {
        "hidden_act": ACTIVATION_NAMES[m.mlp],
        "attention_bias": m.qkv_bias,
        "rotary_emb_base": positions.pop("rope_theta"),
        "rotary_pct": m.rope_fraction if exact else (m.rotary_dim + 0.5) / m.head_dim,
    } | positions


_NEOX_LAYER = "gpt_neox.layers.*."
NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    keys=rope.KEYS | {
        "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "initializer_range": 0.02,
        "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_parallel_residual": True, "attention_bias": True,
        "rotary_pct": 0.25, "rotary_emb_base": 10000.0, "rope_theta": None, "partial_rotary_factor": None,
    },
    names=NAMES | {
        "intermediate_size": "mlp_dim", "initializer_range": "init_std", "layer_norm_eps": "norm_eps",
        "use_parallel_residual": "parallel_residual",
    },
    read=_read_neox,
    write=_write_neox,
    switches=_LAYERNORM | BIASED | {"parallel_residual": (False, True), "mlp_bias": (True,)},
    equal=(_GROUPS, ("qkv_bias", "attn_out_bias")),
    heads="full",
    prefix="gpt_neox.",
    tensors=(
        ("gpt_neox.embed_in.weight", "v,d->vd", ("embed/embedding",)),
        *family.norm(f"{_NEOX_LAYER}input_layernorm", "layers/attn_norm"),
        *family.linear(f"{_NEOX_LAYER}attention.query_key_value", "hpn,d->dhn", "hpn->hn", *_QKV),
        *family.linear(f"{_NEOX_LAYER}attention.dense", "d,hn->hnd", "d->d", "layers/attn/o"),
        *family.norm(f"{_NEOX_LAYER}post_attention_layernorm", "layers/mlp_norm"),
        *family.linear(f"{_NEOX_LAYER}mlp.dense_h_to_4h", "f,d->df", "f->f", "layers/mlp/up"),
        *family.linear(f"{_NEOX_LAYER}mlp.dense_4h_to_h", "d,f->fd", "d->d", "layers/mlp/down"),
        *family.norm("gpt_neox.final_layer_norm", "final_norm"),
        ("embed_out.weight", "v,d->dv", ("head",)),
    ),
)  # fmt: skip
