"""A config.json becomes the model it describes, or an error that names what the decoder does not compute."""

import dataclasses
import json

import pytest

from lmboost.errors import UserError
from lmboost.hf import config_json, writer
from lmboost.hf.families import GEMMA3
from lmboost.models.presets import preset
from tests import hub


@pytest.fixture
def directory(tmp_path):
    hub.write_config(tmp_path, hub.LLAMA)
    return tmp_path


def set_keys(directory, **keys):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KEYS = {
    "architecture": (
        {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
        r"BertForMaskedLM .* \(attention to later tokens\)",
    ),
    "falcon": ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, "FalconForCausalLM.*one norm for"),
    "unheard of": (
        {"architectures": ["XForCausalLM"], "model_type": "x"},
        "XForCausalLM .*is no arch.*Expected one of Llama",
    ),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "two kinds": ({"model_type": "mixtral"}, r"LlamaForCausalLM \(model_type='mixtral'\).*mixture of experts"),
    "unknown key": ({"logit_scale": 0.5}, "logit_scale=0.5 is not known of LlamaForCausalLM"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not known"),
    "own code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map=.* is not known"),
    "zero is a value": ({"residual_multiplier": 0}, "residual_multiplier=0 is not known"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act='gelu': the decoder computes only what 'silu' or 'swish'"),
    "rope type": ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "no rotary positions of type 'ntk', only def"),
    "linear without": ({"rope_scaling": {"type": "linear"}}, "expected 'factor' in it"),
    "yarn cut off": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
        "expected its 'truncate' to be true",
    ),
    "longrope without": ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "expected 'short_factor' in it"),
    "longrope number": (
        {"rope_scaling": {"type": "longrope", "factor": 4.0, "short_factor": [1.0, 0], "long_factor": [1.0]}},
        "expected a list of positive numbers as short_factor",
    ),
    "longrope length": (
        {"rope_scaling": {"type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [1.0] * 4}},
        "rope_short_factors has 1 numbers, but heads of 8 features turn 4 pairs of them",
    ),
    "rope key": ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "'mrope_section' is not known"),
    "rope by layer": (
        {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "'full_attention' is not known",
    ),
    "rope by two kinds of layers": (
        {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), {"rope_theta": 1e4})},
        "'full_attention' is not known",
    ),
    "llama3 without": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "expected 'low_freq_factor' in it"),
    "rope number": ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "'8': expected a positive number as factor"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: expected 1.0 in this"),
    "type": ({"num_hidden_layers": "2"}, "num_hidden_layers='2': expected a whole number"),
    "bool": ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: expected a value of type bool"),
    "nothing": ({"hidden_size": None}, "hidden_size=None: expected a whole number"),
    "negative": ({"intermediate_size": -1}, "intermediate_size=-1: expected a whole number, at least 1"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0"),
    "groups": ({"num_key_value_heads": 3}, "num_heads=4 is not a multiple of .*num_kv_heads=3"),
}
OTHERS = {
    "opt-350m": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
    "opt projection": ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim=16: the decoder computes only"),
    "opt norms": ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    "opt activation": ("opt", {"activation_function": "swish"}, "activation_function='swish': expected one of gelu"),
    "gpt2 scale": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
    "gpt2 cross": ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    "gpt2 heads": ("gpt2", {"n_head": 7}, "expected a divisor of the width"),
    "neox rotary": ("gpt_neox", {"hidden_size": 512, "num_attention_heads": 8, "rotary_pct": 0.05}, "3 of 64 features"),
    "neox two bases": ("gpt_neox", {"rope_theta": 500.0}, "rope_theta=500.0"),
    "qwen layer types": (
        "qwen3", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 2},
        "layer_types=.*: expected full_attention or sliding_attention for each of the 3 layers",
    ),
    "gemma activation": ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    "gemma types": ("gemma3_text", {"layer_types": ["chunked_attention"] * 26}, "layer_types=.*: expected full_attent"),
    "gemma partial": ("gemma2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: expected 1.0 in this"),
    "gemma local": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "linear"}}},
        "rope_parameters=.*: expected the default type in layers that have a window",
    ),
    "gemma bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "gemma window": ("gemma2", {"sliding_window": None}, "sliding_window=None: expected its size, as layers"),
    "smollm3 positions": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers=.*: expected 0 or 1 for each"),
    "smollm3 windows": ("smollm3", {"use_sliding_window": True}, "use_sliding_window=True"),
    "phi3 code": ("phi3", {"auto_map": {"AutoConfig": "mine.Config"}}, "auto_map=.*: expected what Phi-3's own files"),
    "granite bias": ("granite", {"residual_multiplier": 0.0}, "residual_scale=0.0: expected a finite number above 0"),
    "qwen no window": (
        "qwen3", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "sliding_window=4096: expected its",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_what_the_decoder_does_not_compute_is_named(name, directory):
    keys, message = KEYS[name]
    set_keys(directory, **keys)
    with pytest.raises(UserError, match=message):
        config_json.read(directory)


@pytest.mark.parametrize("name", OTHERS)
def test_so_it_is_for_the_other_architectures(name, tmp_path):
    kind, keys, message = OTHERS[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | keys))
    with pytest.raises(UserError, match=message):
        config_json.read(tmp_path)


def test_keys_that_are_off_or_harmless_do_not_matter(directory):
    before = config_json.read(directory).model
    set_keys(
        directory, logit_scale=None, residual_in_fp32=False, pruned_heads={}, use_cache=True, attention_dropout=0.3
    )
    assert config_json.read(directory).model == before


def test_a_neox_may_say_its_rotary_settings_twice(tmp_path):
    keys = {"model_type": "gpt_neox", "rotary_emb_base": 500, "rope_theta": 500, "partial_rotary_factor": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert config_json.read(tmp_path).model.rope_theta == 500.0


# As published, but for keys that say nothing about the model.
PUBLISHED = {
    "gpt2": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 1024, "n_embd": 768, "n_head": 12,
             "n_layer": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-05, "vocab_size": 50257},
    "pythia-160m": {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 768,
                    "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "rotary_pct": 0.25,
                    "rotary_emb_base": 10000, "vocab_size": 50304, "torch_dtype": "float16"},
    "opt-125m": {"model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": 3072, "hidden_size": 768,
                 "vocab_size": 50272, "word_embed_proj_dim": 768, "_remove_final_layer_norm": False, "prefix": "</s>"},
    "smollm2-360m": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 960,
                     "intermediate_size": 2560, "num_attention_heads": 15, "num_hidden_layers": 32, "vocab_size": 49152,
                     "num_key_value_heads": 5, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
                     "rope_theta": 100000, "tie_word_embeddings": True, "max_position_embeddings": 8192,
                     "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "torch_dtype": "bfloat16"},
    "llama-3.2-1b": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "head_dim": 64,
                     "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16,
                     "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True, "rope_theta": 5e5,
                     "rms_norm_eps": 1e-05, "max_position_embeddings": 131072, "pretraining_tp": 1,
                     "rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}},
    "openllama-3b": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 3200,
                     "intermediate_size": 8640, "num_attention_heads": 32, "num_hidden_layers": 26},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    found = config_json.read(tmp_path).model
    expected = preset(name, dtype=found.dtype)
    initial = {"init_std": found.init_std, "rope_original_seq_len": found.rope_original_seq_len}
    assert found == dataclasses.replace(expected, **initial)


# ---------------------------------------------------------------- the way out

GEMMA = {
    "norm_placement": "both", "zero_centred_norm": True, "mlp": "gelu_tanh_gated", "embed_scale": 32**0.5,
    "layer_kinds": "window,full", "sliding_window": 8, "logit_softcap": 30.0,
}  # fmt: skip
FITS = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 8},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": "head", "sliding_window": 8},
    "Olmo2ForCausalLM": {"qk_norm": "full", "norm_placement": "post"},
    "Olmo3ForCausalLM": {
        "qk_norm": "full",
        "norm_placement": "post",
        "layer_kinds": "window,full",
        "sliding_window": 8,
        "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_local_theta": 10000.0,
    },
    "SmolLM3ForCausalLM": {"layer_kinds": "full,nope"},
    "GraniteForCausalLM": {"residual_scale": 0.5},
    "Phi3ForCausalLM": {"rope_fraction": 0.5},
    "Gemma2ForCausalLM": GEMMA,
    "Gemma3ForCausalLM": GEMMA | {"qk_norm": "head", "rope_local_theta": 500.0},
}
MISFITS = {
    "norm": ({"norm": "layernorm_nobias"}, "norm='layernorm_nobias'"),
    "gate": ({"mlp": "relu"}, "mlp='relu'"),
    "final": ({"final_norm": False}, r"LlamaForCausalLM would, but for final_norm=False \(expected True\)"),
    "biases": ({"attn_out_bias": True}, "qkv_bias=False and attn_out_bias=True"),
    "width": (GEMMA | {"embed_scale": 4.0}, r"Gemma2ForCausalLM would, but for embed_scale=4.0 \(expected 5.65"),
    "scale": (GEMMA | {"attn_scale": 0.3}, r"attn_scale=0.3 \(expected 1 / sqrt of a whole number"),
    "kinds": ({"layer_kinds": "full,window,nope", "sliding_window": 8}, r"layer_kinds='full,window,nope' \(expected "),
    "qk": ({"qk_norm": "full"}, "Olmo2ForCausalLM would, but for norm_placement='pre'|LlamaFor.*qk_norm='full'"),
}


@pytest.mark.parametrize("name", FITS)
def test_switches_choose_the_architecture(name):
    assert writer.family_of(dataclasses.replace(hub.LLAMA, **FITS[name])).architecture == name


@pytest.mark.parametrize("name", MISFITS)
def test_what_no_architecture_computes_is_named(name):
    changes, message = MISFITS[name]
    with pytest.raises(UserError, match=message):
        writer.family_of(dataclasses.replace(hub.LLAMA, **changes))


def test_windows_whose_positions_are_scaled_are_no_gemma_3():
    changes = GEMMA | {"qk_norm": "head", "rope_scaling": "linear", "rope_scaling_factor": 8.0}
    model = dataclasses.replace(hub.LLAMA, **changes)
    assert GEMMA3.misfits(model) == ["rope_local_theta=0.0 (expected 10000.0)"]
    assert not GEMMA3.misfits(dataclasses.replace(model, rope_local_theta=10000.0))
