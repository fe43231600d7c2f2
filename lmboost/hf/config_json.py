"""Which model a config.json describes.

Whatever it says that is not understood is an error, never a model that computes something else.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from lmboost.errors import UserError
from lmboost.hf import files
from lmboost.hf.families import FAMILIES
from lmboost.hf.family import KINDS, Family, Keys
from lmboost.models.model_config import ModelConfig

# Keys that change nothing about what is computed from tokens, dropout left out.
_HARMLESS = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version _name_or_path name_or_path tokenizer_class prefix
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id use_cache gradient_checkpointing is_decoder return_dict return_dict_in_generate output_scores
    output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward
    attention_dropout hidden_dropout activation_dropout dropout resid_pdrop embd_pdrop attn_pdrop classifier_dropout
    layerdrop initializer_factor pretraining_tp reorder_and_upcast_attn n_ctx n_special predict_special_tokens
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj id2label label2id
    num_labels problem_type finetuning_task task_specific_params attn_implementation _attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values suppress_tokens
    begin_suppress_tokens bad_words_ids exponential_decay_length_penalty is_llama_config transformers.js_config
    unsloth_fixed unsloth_version cache_implementation resid_pdrop embd_pdrop
    """.split()
)
# Keys that may be null although they have another value where they are absent.
_NULLABLE = (
    "sliding_window", "num_key_value_heads", "head_dim", "hidden_activation", "attn_logit_softcapping",
    "final_logit_softcapping", "use_bidirectional_attention", "layer_types",
)  # fmt: skip
# What the decoder lacks for some others, by model_type.
_LACKS = {
    "gpt_neo": "windows in every other layer, unscaled attention",
    "gptj": "rotary positions of interleaved pairs, one norm for attention and MLP",
    "falcon": "keys and values fused with queries group by group, one norm for attention and MLP",
    "phi": "one norm for attention and MLP, a bias of the head",
    "stablelm": "LayerNorm with a gated MLP",
    "gpt_oss": "mixture of experts, attention sinks, windows in every other layer",
    "deepseek_v3": "latent attention, mixture of experts",
    "olmo": "norms without weights",
    "cohere": "rotary positions of interleaved pairs, a logit scale",
    "mamba": "state-space layers",
    "t5": "an encoder",
    "bert": "attention to later tokens",
    **dict.fromkeys(("bloom", "mpt"), "ALiBi positions"),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), "mixture of experts"),
    **dict.fromkeys(("gemma3", "gemma3n"), "an encoder of images; its text model alone would do, as gemma3_text"),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """What a Hub directory holds, as its config.json says."""

    directory: pathlib.Path
    family: Family
    model: ModelConfig


def read(directory: pathlib.Path) -> Published:
    """The model of a Hub directory; a UserError where the decoder can't compute it.

    Its compute dtype is bfloat16 where it was published in that, else float32.
    """
    path = directory / "config.json"
    kinds = {"architectures?": list | None} | dict.fromkeys(("model_type?", "dtype?", "torch_dtype?"), str | None)
    values = files.read_json(path, kinds)
    family = _family(path, values)
    dtype = values.get("dtype") or values.get("torch_dtype")
    model = family.model(_keys(path, values, family), "bfloat16" if dtype == "bfloat16" else "float32")
    return Published(directory, family, model)


def _family(path: pathlib.Path, values: Mapping[str, Any]) -> Family:
    names, kind = values.get("architectures") or [], values.get("model_type")
    for family in FAMILIES:
        if kind in (family.model_type, None) and (family.architecture in names or (kind and not names)):
            return family
    name = " ".join([*map(str, names), f"(model_type={kind!r})"])
    lacks = f", which lacks what it needs ({_LACKS[kind]})" if kind in _LACKS else ""
    raise UserError(
        f"{path}: {name} is no architecture of this decoder{lacks}. Expected one of "
        f"{', '.join(family.architecture for family in FAMILIES)}."
    )


def _keys(path: pathlib.Path, values: Mapping[str, Any], family: Family) -> Keys:
    """The keys that matter, of the right types; a UserError on a key that is neither known nor off."""
    for key, value in values.items():
        off = value is None or value is False or value in ("", [], {})
        if not off and key not in family.keys and key not in _HARMLESS:
            raise UserError(
                f"{path}: {key}={value!r} is not known of {family.architecture}, and may change what it computes. "
                "If it does not, take it out of the file."
            )
    out = {key: values.get(key, default) for key, default in family.keys.items()}
    for key, value in out.items():
        default = family.keys[key]
        if value is None and (default is None or key in _NULLABLE):
            continue
        kind = KINDS.get(key) or (int if default is None else type(default))
        kinds = (int, float) if kind is float else (kind,)
        least = 0 if "window" in key else 1  # of whole numbers
        if type(value) not in kinds or (kind is int and value < least):
            what = f"a whole number, at least {least}" if kind is int else f"a value of type {kind.__name__}"
            raise UserError(f"{path}: {key}={value!r}: expected {what}. Download it again.")
    return Keys(path, out)
