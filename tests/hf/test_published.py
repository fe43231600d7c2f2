"""What is published is read: config.json of models of each family, as their makers wrote it, and how large they are."""

import json

import pytest

from lmboost.hf import config_json

SMALL = [1.0, 1.05, 1.1]
_GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02, "max_position_embeddings": 8192, "model_type": "gemma2", "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32",
    "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
_GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02, "model_type": "gemma3_text", "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_theta": 1000000, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
_SMOLLM3 = {
    "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
_OLMO3 = {
    "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8,
    "max_position_embeddings": 65536, "model_type": "olmo3", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_theta": 500000,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
    "sliding_window": 4096, "tie_word_embeddings": False, "dtype": "float32", "vocab_size": 100278,
}  # fmt: skip
_PHI3_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
_PHI3 = {
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": _PHI3_CODE,
    "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 8192, "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32064,
}  # fmt: skip
_PHI4_MINI = _PHI3 | {
    "auto_map": _PHI3_CODE | {"AutoTokenizer": "Xenova/gpt-4o"}, "full_attn_mod": 1, "interpolate_factor": 1,
    "lm_head_bias": False, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24,
    "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "sliding_window": 262144, "vocab_size": 200064,
    "rope_scaling": {"long_factor": (SMALL * 16)[:48], "short_factor": [1.0] * 48, "type": "longrope"},
    "tie_word_embeddings": True,
}  # fmt: skip
_GRANITE = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "hidden_act": "silu",
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "initializer_range": 0.02, "mlp_bias": False,
    "model_type": "granite", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
_FALCON3 = {
    "activation": "swiglu", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "eos_token_id": 11, "head_dim": 256, "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False,
    "model_type": "llama", "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000042, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 131072,
}  # fmt: skip


def sized(config, hidden, mlp, layers, heads, kv_heads, **more):
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return config | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | more


# Name: (config.json, parameters).
PUBLISHED = {
    "gemma-2-2b": (sized(_GEMMA2, 2304, 9216, 26, 8, 4, head_dim=256, query_pre_attn_scalar=256), 2_614_341_888),
    "gemma-2-9b": (
        sized(_GEMMA2, 3584, 14336, 42, 16, 8, head_dim=256, query_pre_attn_scalar=256, sliding_window_size=4096),
        9_241_705_984,
    ),
    "gemma-2-27b": (
        sized(_GEMMA2, 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144, sliding_window_size=4096),
        27_227_128_320,
    ),
    "gemma-3-270m": (
        sized(
            _GEMMA3, 640, 2048, 18, 4, 1, max_position_embeddings=32768, sliding_window=512, _sliding_window_pattern=6,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3, use_bidirectional_attention=False,
        ),
        268_098_176,
    ),
    "gemma-3-1b": (
        sized(
            _GEMMA3, 1152, 6912, 26, 4, 1, max_position_embeddings=32768, sliding_window=512, sliding_window_pattern=6
        ),
        999_885_952,
    ),
    "gemma-3-4b, its text": (
        sized(
            _GEMMA3, 2560, 10240, 34, 8, 4, max_position_embeddings=131072, sliding_window=1024, vocab_size=262208,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
        ),
        3_880_263_168,
    ),
    "smollm3-3b": (_SMOLLM3, 3_075_098_624),
    "olmo-3-7b": (_OLMO3, 7_298_011_136),
    "phi-3-mini-4k": (_PHI3 | {"max_position_embeddings": 4096, "sliding_window": 2047}, 3_821_079_552),
    "phi-4-mini": (_PHI4_MINI, 3_836_021_760),
    "granite-3.1-2b": (
        sized(
            _GRANITE, 2048, 8192, 40, 32, 8, attention_multiplier=0.015625, logits_scaling=8.0, vocab_size=49155,
            max_position_embeddings=131072, rope_theta=5000000.0,
        ),
        2_533_531_648,
    ),
    "granite-3.1-8b": (
        sized(
            _GRANITE, 4096, 12800, 40, 32, 8, attention_multiplier=0.0078125, logits_scaling=16.0, vocab_size=49155,
            max_position_embeddings=131072, rope_theta=10000000.0,
        ),
        8_170_848_256,
    ),
    "falcon3-1b": (sized(_FALCON3, 2048, 8192, 18, 8, 4, max_position_embeddings=4096), 1_669_408_768),
    "falcon3-7b": (sized(_FALCON3, 3072, 23040, 28, 12, 4, max_position_embeddings=32768), 7_455_550_464),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_read_and_counted(name, tmp_path):
    config, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_json.read(tmp_path).model.num_params() == parameters


@pytest.mark.peers
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_counts_as_many(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    with torch.device("meta"):
        assert transformers.AutoModelForCausalLM.from_config(theirs).num_parameters() == parameters


LAYERS = {
    "gemma-2-2b": ("window,full", ["window", "full"] * 13),
    "gemma-3-1b": ("5*window,full", (["window"] * 5 + ["full"]) * 4 + ["window"] * 2),
    "smollm3-3b": ("3*full,nope", (["full"] * 3 + ["nope"]) * 9),
    "olmo-3-7b": ("3*window,full", (["window"] * 3 + ["full"]) * 8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_of_its_kind(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
    model = config_json.read(tmp_path).model
    assert (model.layer_kinds, list(model.kinds)) == LAYERS[name]
