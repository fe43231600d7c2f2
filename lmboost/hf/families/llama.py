"""Llama and what follows it: RMSNorm, rotary positions, a gate of SiLU.

Mistral, Qwen2, Qwen3, OLMo-2, OLMo 3, SmolLM3, Phi-3 (and Phi-4-mini), Granite; Falcon 3 is published as a Llama.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lmboost.hf import rope
from lmboost.hf.family import ANYTHING, BIASED, NAMES, Family, Keys, Values, linear, norm, read_biases
from lmboost.models import layer_kinds
from lmboost.models.model_config import MAX_LAYERS, ModelConfig

LLAMA_NAMES = NAMES | {
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps", "initializer_range": "init_std",
}  # fmt: skip
LLAMA_KEYS = rope.KEYS | {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_KEYS = LLAMA_KEYS | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
SWITCHES = {"rope_fraction": (1.0,)}
ANY_WINDOW = {"sliding_window": ANYTHING}
ATTENTIONS = {"full_attention": "full", "sliding_attention": "window"}


def patterns(*kinds: str) -> Values:
    """Of the switch `layer_kinds`: layers of these kinds, in any order."""

    def holds(text: str) -> bool:
        return not text or set(layer_kinds.parse(text, MAX_LAYERS)) <= set(kinds)

    return Values(f"layers of the kinds {' and '.join(kinds)}", holds)


def read_kinds(c: Keys, default: Sequence[str]) -> tuple[str, ...]:
    """The kind of each layer by `layer_types`, or where it is absent the default."""
    given = c["layer_types"]
    if given is None:
        return tuple(default)
    if len(given) != len(default) or not set(given) <= set(ATTENTIONS):
        raise c.refuse(
            "layer_types", given, f"expected {' or '.join(ATTENTIONS)} for each of the {len(default)} layers"
        )
    return tuple(ATTENTIONS[word] for word in given)


def windows(c: Keys, kinds: Sequence[str]) -> dict[str, Any]:
    """The fields that say which layers have a window, and of how many tokens."""
    window = c["sliding_window"] or 0
    if "window" in kinds and not window:
        raise c.refuse("sliding_window", c["sliding_window"], "expected its size, as layers have a window")
    # As `ModelConfig.with_layers` would write them.
    if set(kinds) == {"full"}:
        return {"sliding_window": 0}
    return {"sliding_window": window, "layer_kinds": "" if set(kinds) == {"window"} else layer_kinds.write(kinds)}


def read_local_theta(c: Keys, fields: Mapping[str, Any], default: float) -> dict[str, float]:
    """The base of windowed layers, whose positions are never scaled in some families; 0 where it says nothing new.

    fields: of the model otherwise.
    """
    local = rope.read_local(c, default)
    as_others = "rope_scaling" not in fields and local == fields["rope_theta"]
    return {"rope_local_theta": 0.0 if as_others or not fields["sliding_window"] else local}


def needed_local_theta(m: ModelConfig) -> float:
    """What `rope_local_theta` is in a model of such a family: its own, where others are scaled."""
    return m.rope_local_theta or (m.rope_theta if m.sliding_window and m.scales_positions else 0.0)


def layer_types(m: ModelConfig) -> list[str]:
    """`layer_types` of a model whose layers are full or have a window."""
    names = {ours: theirs for theirs, ours in ATTENTIONS.items()}
    return [names[kind] for kind in m.kinds]


def read_shape(c: Keys, by_layer: bool = False, partial: bool = False) -> dict[str, Any]:
    """Heads and rotary positions; `by_layer` as in `rope.read`, `partial`: of some features of a head alone."""
    heads = c["num_attention_heads"]
    head_dim = c["head_dim"] or c["hidden_size"] // heads
    fields = rope.read(c, head_dim, by_layer=by_layer)
    if fields["rope_fraction"] != 1.0 and not partial:
        raise c.refuse("partial_rotary_factor", fields["rope_fraction"], "expected 1.0 in this architecture")
    return fields | {"num_kv_heads": c["num_key_value_heads"] or heads, "head_dim": head_dim}


def _read_llama(c: Keys, by_layer: bool = False, **more: Any) -> dict[str, Any]:
    c.need("hidden_act", "silu", "swish")
    return read_shape(c, by_layer) | more


def _write_llama(m: ModelConfig, **more: Any) -> dict[str, Any]:
    return {"hidden_act": "silu"} | rope.write(m) | more


def _write_qwen(m: ModelConfig, **more: Any) -> dict[str, Any]:
    window = {"sliding_window": m.sliding_window, "max_window_layers": 0} if m.sliding_window else {}
    types = {"layer_types": layer_types(m)} if m.layer_kinds else {}
    return _write_llama(m, use_sliding_window=bool(m.sliding_window), **window, **types, **more)


def _read_qwen(c: Keys, **more: Any) -> dict[str, Any]:
    """With the window of the layers from `max_window_layers` on."""
    layers = c["num_hidden_layers"]
    full = min(c["max_window_layers"], layers) if c["use_sliding_window"] and c["sliding_window"] else layers
    kinds = read_kinds(c, ("full",) * full + ("window",) * (layers - full))
    if "window" in kinds and not c["use_sliding_window"]:
        raise c.refuse(
            "sliding_window", c["sliding_window"],
            "expected its size, as the layers have a window, and use_sliding_window=true",
        )  # fmt: skip
    return _read_llama(c, **windows(c, kinds), **more)


def tensors(attn_norm: str = "input_layernorm", mlp_norm: str = "post_attention_layernorm") -> tuple:
    attn, mlp = "model.layers.*.self_attn.", "model.layers.*.mlp."
    return (
        ("model.embed_tokens.weight", "v,d->vd", ("embed/embedding",)),
        *norm(f"model.layers.*.{attn_norm}", "layers/attn_norm"),
        *linear(f"{attn}q_proj", "hn,d->dhn", "hn->hn", "layers/attn/q"),
        *linear(f"{attn}k_proj", "hn,d->dhn", "hn->hn", "layers/attn/k"),
        *linear(f"{attn}v_proj", "hn,d->dhn", "hn->hn", "layers/attn/v"),
        *linear(f"{attn}o_proj", "d,hn->hnd", "d->d", "layers/attn/o"),
        *norm(f"{attn}q_norm", "layers/attn/q_norm"),
        *norm(f"{attn}k_norm", "layers/attn/k_norm"),
        *norm(f"model.layers.*.{mlp_norm}", "layers/mlp_norm"),
        *linear(f"{mlp}gate_proj", "f,d->df", "f->f", "layers/mlp/gate"),
        *linear(f"{mlp}up_proj", "f,d->df", "f->f", "layers/mlp/up"),
        *linear(f"{mlp}down_proj", "d,f->fd", "d->d", "layers/mlp/down"),
        *norm("model.norm", "final_norm"),
        ("lm_head.weight", "v,d->dv", ("head",)),
    )


_llama_like = functools.partial(Family, names=LLAMA_NAMES, prefix="model.", tensors=tensors())
_EQUAL = (("qkv_bias", "attn_out_bias"),)


def _read_plain(c: Keys) -> dict[str, Any]:
    c.need("activation", None, "swiglu")  # Falcon 3 says so beside hidden_act
    return _read_llama(c, **read_biases(c))


LLAMA = _llama_like(
    architecture="LlamaForCausalLM",
    model_type="llama",
    keys=LLAMA_KEYS | {"attention_bias": False, "mlp_bias": False, "activation": None},
    names=LLAMA_NAMES | {"mlp_bias": "mlp_bias"},
    read=_read_plain,
    write=lambda m: _write_llama(m, attention_bias=m.qkv_bias),
    switches=SWITCHES | BIASED,
    equal=_EQUAL,
    heads="divide",  # since transformers 5
)

MISTRAL = _llama_like(
    architecture="MistralForCausalLM",
    model_type="mistral",
    keys=LLAMA_KEYS
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    read=lambda c: _read_llama(c, sliding_window=c["sliding_window"] or 0),
    write=lambda m: _write_llama(m, sliding_window=m.sliding_window or None),
    switches=SWITCHES | ANY_WINDOW,
)

QWEN2 = _llama_like(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    keys=_QWEN_KEYS,
    read=lambda c: _read_qwen(c, qkv_bias=True),
    write=_write_qwen,
    switches=SWITCHES | ANY_WINDOW | {"layer_kinds": patterns("full", "window"), "qkv_bias": (True,)},
)

QWEN3 = _llama_like(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    keys=_QWEN_KEYS | {"head_dim": 128, "attention_bias": False},
    read=lambda c: _read_qwen(c, **read_biases(c), qk_norm="head"),
    write=lambda m: _write_qwen(m, attention_bias=m.qkv_bias),
    switches=SWITCHES | BIASED | ANY_WINDOW | {"layer_kinds": patterns("full", "window"), "qk_norm": ("head",)},
    equal=_EQUAL,
)

_OLMO_KEYS = LLAMA_KEYS | {"vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False}
_OLMO_SWITCHES = SWITCHES | BIASED | {"norm_placement": ("post",), "qk_norm": ("full",)}


def _read_olmo(c: Keys, **more: Any) -> dict[str, Any]:
    return _read_llama(c, **read_biases(c), qk_norm="full", norm_placement="post", **more)


def _read_olmo3(c: Keys) -> dict[str, Any]:
    layers = c["num_hidden_layers"]
    fields = windows(c, read_kinds(c, ["full" if (i + 1) % 4 == 0 else "window" for i in range(layers)]))
    fields = _read_olmo(c, by_layer=True, **fields)
    return fields | read_local_theta(c, fields, fields["rope_theta"])


def _write_olmo3(m: ModelConfig) -> dict[str, Any]:
    """The newer keys, too: transformers 5 has a base of its own for windows where there are the older ones alone."""
    fields = _write_llama(m, attention_bias=m.qkv_bias, sliding_window=m.sliding_window or None)
    full = {"rope_type": "default"} | (fields["rope_scaling"] or {}) | {"rope_theta": m.rope_theta}
    local = {"rope_type": "default", "rope_theta": m.rope_local_theta or m.rope_theta}
    positions = {"full_attention": full, "sliding_attention": local}
    return fields | {"layer_types": layer_types(m), "rope_parameters": positions}


OLMO2 = _llama_like(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    keys=_OLMO_KEYS,
    read=_read_olmo,
    write=lambda m: _write_llama(m, attention_bias=m.qkv_bias),
    switches=_OLMO_SWITCHES,
    equal=_EQUAL,
    tensors=tensors("post_attention_layernorm", "post_feedforward_layernorm"),
)

OLMO3 = _llama_like(
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    keys=_OLMO_KEYS | {"sliding_window": 4096, "layer_types": None, "rope_theta": 500000.0},
    read=_read_olmo3,
    write=_write_olmo3,
    switches=_OLMO_SWITCHES | ANY_WINDOW | {"layer_kinds": patterns("full", "window"), "rope_local_theta": ANYTHING},
    equal=_EQUAL,
    follows={"rope_local_theta": needed_local_theta},
    tensors=tensors("post_attention_layernorm", "post_feedforward_layernorm"),
)

# ---------------------------------------------------------------- SmolLM3: layers without positions


def _read_smollm3(c: Keys) -> dict[str, Any]:
    layers = c["num_hidden_layers"]
    turned = c["no_rope_layers"]
    if turned is None:
        turned = [int((i + 1) % c["no_rope_layer_interval"] != 0) for i in range(layers)]
    if len(turned) < layers or not all(x in (0, 1) for x in turned):
        raise c.refuse("no_rope_layers", turned, f"expected 0 or 1 for each of the {layers} layers")
    c.need("use_sliding_window", False)
    if "window" in read_kinds(c, ("full",) * layers):
        raise c.refuse("layer_types", c["layer_types"], "expected full_attention in all layers")
    kinds = ["full" if turns else "nope" for turns in turned[:layers]]
    pattern = {"layer_kinds": layer_kinds.write(kinds)} if "nope" in kinds else {}
    return _read_llama(c, **read_biases(c), **pattern)


def _write_smollm3(m: ModelConfig) -> dict[str, Any]:
    no_rope = {"no_rope_layers": [int(kind != "nope") for kind in m.kinds], "layer_types": None}
    return _write_llama(m, attention_bias=m.qkv_bias, use_sliding_window=False, sliding_window=None, **no_rope)


SMOLLM3 = _llama_like(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    keys=LLAMA_KEYS
    | {
        "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 2e6,
        "attention_bias": False, "mlp_bias": False, "no_rope_layers": None, "no_rope_layer_interval": 4,
        "layer_types": None, "use_sliding_window": False, "sliding_window": None, "max_window_layers": None,
    },
    names=LLAMA_NAMES | {"mlp_bias": "mlp_bias"},
    read=_read_smollm3,
    write=_write_smollm3,
    switches=SWITCHES | BIASED | {"layer_kinds": patterns("full", "nope")},
    equal=_EQUAL,
)  # fmt: skip

# ---------------------------------------------------------------- Phi-3 and Phi-4-mini: fused projections

_PHI3_CODE = {  # that its files name beside what transformers has
    "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    "AutoTokenizer": "Xenova/gpt-4o",
}  # fmt: skip


def _read_phi3(c: Keys) -> dict[str, Any]:
    c.need("hidden_act", "silu", "swish")
    if c["auto_map"] and not c["auto_map"].items() <= _PHI3_CODE.items():
        raise c.refuse("auto_map", c["auto_map"], "expected what Phi-3's own files name, or nothing")
    c.need("attention_bias", False)
    c.need("full_attn_mod", None, 1)
    c.need("interpolate_factor", None, 1)
    return read_shape(c, partial=True) | {"sliding_window": c["sliding_window"] or 0}


def _write_phi3(m: ModelConfig) -> dict[str, Any]:
    fields = _write_llama(m, sliding_window=m.sliding_window or None, partial_rotary_factor=m.rope_fraction)
    original = m.rope_original_seq_len if m.rope_scaling == "longrope" else m.max_seq_len
    return fields | {"original_max_position_embeddings": original}


def _fused(tensors: tuple) -> tuple:
    """Queries, keys and values in one tensor, gate and up in another: rows of one after those of the other."""
    attn, mlp = "layers/attn/", "layers/mlp/"
    alone = {f"{attn}k/kernel", f"{attn}v/kernel", f"{mlp}up/kernel"}
    qkv = linear("model.layers.*.self_attn.qkv_proj", "hn,d->dhn", "hn->hn", *(f"{attn}{name}" for name in "qkv"))
    gates = linear("model.layers.*.mlp.gate_up_proj", "f,d->df", "f->f", f"{mlp}gate", f"{mlp}up")
    fused = {f"{attn}q/kernel": qkv[0], f"{mlp}gate/kernel": gates[0]}
    kept = [x for x in tensors if x[2][0] not in alone and not x[2][0].endswith("bias")]
    return tuple(fused.get(x[2][0], x) for x in kept)


PHI3 = _llama_like(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    keys=LLAMA_KEYS
    | {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "sliding_window": None, "rms_norm_eps": 1e-5,
        "attention_bias": False, "auto_map": None, "full_attn_mod": None, "interpolate_factor": None,
    },
    read=_read_phi3,
    write=_write_phi3,
    switches=ANY_WINDOW,
    tensors=_fused(tensors()),
)  # fmt: skip

# ---------------------------------------------------------------- Granite: multipliers

_GRANITE = {
    "embedding_multiplier": "embed_scale", "residual_multiplier": "residual_scale", "logits_scaling": "logit_divisor",
    "attention_multiplier": "attn_scale",
}  # fmt: skip


def _read_granite(c: Keys) -> dict[str, Any]:
    return _read_llama(c, **read_biases(c), **{ours: float(c[theirs]) for theirs, ours in _GRANITE.items()})


GRANITE = _llama_like(
    architecture="GraniteForCausalLM",
    model_type="granite",
    keys=LLAMA_KEYS | dict.fromkeys(_GRANITE, 1.0) | {"attention_bias": False, "mlp_bias": False},
    names=LLAMA_NAMES | _GRANITE | {"mlp_bias": "mlp_bias"},
    read=_read_granite,
    write=lambda m: _write_llama(
        m, attention_bias=m.qkv_bias, attention_multiplier=m.attention_rule.of_head(m.head_dim)
    ),
    switches=SWITCHES | BIASED,
    equal=_EQUAL,
)
