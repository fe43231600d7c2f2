"""Models of the transformers library and ours compute the same, whichever of the two wrote the files."""

import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from lmboost import checkpoint, sharding  # noqa: E402
from lmboost.data import tokenizer as tokenizer_lib  # noqa: E402
from lmboost.hf import config_json, reader, tokenizer_files, weights, writer  # noqa: E402
from tests import hub  # noqa: E402
from tests.hf.test_config_json import FITS  # noqa: E402

pytestmark = pytest.mark.peers
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SMALL = IDS | {"vocab_size": hub.VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"max_position_embeddings": 64}
GPT2 = IDS | {"vocab_size": hub.VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
DEEP = LLAMA | {"num_hidden_layers": 9}  # two periods of four, and one more
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {  # 6 of 8 features are turned
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 8.0], "original_max_position_embeddings": 16,
}  # fmt: skip
GEMMA = LLAMA | {
    "num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8,
    "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-others": (
        "GPT2",
        GPT2 | {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False, "n_inner": 40},
    ),
    "opt": ("OPT", SMALL | {"ffn_dim": 48}),
    "opt-others": (
        "OPT",
        SMALL | {"ffn_dim": 48, "enable_bias": False, "activation_function": "gelu", "_remove_final_layer_norm": True},
    ),
    "pythia": ("GPTNeoX", SMALL | {"intermediate_size": 48}),
    "neox-others": (
        "GPTNeoX",
        SMALL | {"intermediate_size": 48, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.8,
                 "hidden_act": "gelu_new", "tie_word_embeddings": True, "rotary_emb_base": 500},
    ),
    "llama": ("Llama", LLAMA),
    "llama3": ("Llama", LLAMA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-others": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", LLAMA | WINDOW),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "olmo2": ("Olmo2", LLAMA),
    "qwen3-kinds": ("Qwen3", LLAMA | WINDOW | {"head_dim": 16, "max_window_layers": 1}),
    "olmo3": ("Olmo3", DEEP | {"sliding_window": 8}),
    "olmo3-yarn": (
        "Olmo3", DEEP | {"sliding_window": 8, "rope_parameters": {"sliding_attention": PLAIN, "full_attention": YARN}},
    ),
    "smollm3": ("SmolLM3", DEEP | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "granite": (
        "Granite",
        LLAMA | {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
                 "attention_multiplier": 0.2, "tie_word_embeddings": True},
    ),
    "phi3": ("Phi3", LLAMA | {"sliding_window": 8}),
    "phi4": (
        "Phi3",
        LLAMA | {"tie_word_embeddings": True, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", GEMMA | {"rope_parameters": {"sliding_attention": PLAIN, "full_attention": LINEAR}}),
    "falcon3": ("Llama", LLAMA | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1000042}}),
    "linear": ("Llama", LLAMA | {"rope_parameters": LINEAR}),
    "dynamic": ("Llama", LLAMA | {"max_position_embeddings": 16, "rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
    "yarn": ("Qwen3", LLAMA | {"head_dim": 32, "rope_parameters": YARN}),
    "yarn-others": ("Llama", LLAMA | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}}),
}  # fmt: skip
FAMILIES = ("gpt2", "opt", "pythia", "llama", "mistral", "qwen2", "qwen3", "olmo2")
LATER = ("olmo3", "smollm3", "granite", "phi4", "gemma2", "gemma3")
TOKENS = np.random.default_rng(0).integers(0, hub.VOCAB, (8, 33)).astype(np.int32)


def make(name, directory, dtype="float32", **saving):
    """A random transformers model, saved; its biases and norms are random, too."""
    architecture, values = MODELS[name]
    config = getattr(transformers, f"{architecture}Config")(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).to(getattr(torch, dtype))
    model.save_pretrained(directory, **saving)
    split = None
    if architecture == "Qwen2":
        split = hub.tokenizers.pre_tokenizers.Split(hub.tokenizers.Regex(tokenizer_files.SPLIT_OF_QWEN), "isolated")
    hub.write_tokenizer(directory, split=split)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def load(directory, mesh, dtype="float32", **changes):
    """(model, parameters) of a Hub directory, as training reads them."""
    saved = checkpoint.Saved.find(f"hf:{directory}")
    model = dataclasses.replace(saved.model, **{"dtype": "float32"} | changes)
    return model, saved.load(mesh, dtype, model)


def export(directory, model, params, source, **more):
    directory.mkdir()
    tokenizer = tokenizer_lib.load(source)
    origin = {"source": reader.read_manifest(source)["source"]} if (source / "config.json").exists() else {}
    manifest = {"model": vars(model), "data": {"tokenizer": tokenizer.fingerprint}} | origin
    return writer.export(directory, model, params, manifest, tokenizer, **more)


def tensors(directory):
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    """Imported logits are equal, and the export is the same tensors, which transformers loads to equal logits."""
    theirs = make(name, tmp_path / "hub")
    model, params = load(tmp_path / "hub", hub.one_device())
    expected = torch_logits(theirs, TOKENS)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(hub.logits(model, params, TOKENS), expected, atol=1e-4)
    export(tmp_path / "out", model, params, tmp_path / "hub")
    assert_same_tensors(tensors(tmp_path / "hub"), tensors(tmp_path / "out"))
    again, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again) is type(theirs) and not any(notes.values())
    np.testing.assert_allclose(torch_logits(again.eval(), TOKENS), expected, atol=1e-5)
    assert config_json.read(tmp_path / "out").model == dataclasses.replace(model, dtype="float32")
    text = "for line in lines:\n    return 1"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False).input_ids
    assert ids == tokenizer_lib.load(tmp_path / "hub").encode(text).tolist()


@pytest.mark.parametrize("name", (*FAMILIES, "phi3", "gemma3"))
def test_on_eight_devices_and_in_small_blocks_it_is_the_same(name, tmp_path, monkeypatch):
    """Heads, widths and padded vocabulary spread over the mesh; blocks of a few rows."""
    make(name, tmp_path)
    model, expected = load(tmp_path, hub.one_device())
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1500)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        padded, params = load(tmp_path, mesh, vocab_multiple=64)
    assert params["embed"]["embedding"].shape == (320, 32)
    assert len(params["layers"]["attn"]["q"]["kernel"].sharding.device_set) == 8
    rows = hub.VOCAB
    cut = jax.tree.map(np.asarray, params)
    cut["embed"]["embedding"], padding = np.split(cut["embed"]["embedding"], [rows])
    assert not padding.any()
    if "head" in cut:
        cut["head"] = cut["head"][:, :rows]
    jax.tree.map(np.testing.assert_array_equal, cut, jax.tree.map(np.asarray, expected))
    np.testing.assert_allclose(
        hub.logits(padded, params, TOKENS), hub.logits(model, expected, TOKENS), atol=1e-4
    )  # fmt: skip
    export(tmp_path / "out", padded, params, tmp_path)
    assert_same_tensors(tensors(tmp_path), tensors(tmp_path / "out"))


@pytest.mark.parametrize("name", (*FAMILIES, "phi4", "gemma3"))
def test_of_any_length(name, tmp_path):
    theirs = make(name, tmp_path)
    model, params = load(tmp_path, hub.one_device())
    for length in (1, 2, 17, 64):
        tokens = np.random.default_rng(1).integers(0, hub.VOCAB, (2, length)).astype(np.int32)
        np.testing.assert_allclose(hub.logits(model, params, tokens), torch_logits(theirs, tokens), atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_and_shards(dtype, tmp_path):
    """Read exactly; bfloat16 is written again with the same bits, whatever the files are cut into."""
    theirs = make("llama", tmp_path / "hub", dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 2
    model, params = load(tmp_path / "hub", hub.one_device())
    assert config_json.read(tmp_path / "hub").model.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    np.testing.assert_allclose(hub.logits(model, params, TOKENS), torch_logits(theirs, TOKENS), atol=1e-4)
    export(tmp_path / "out", model, params, tmp_path / "hub", dtype="bfloat16", max_shard_bytes=30_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2 and again.dtype == torch.bfloat16
    if dtype == "bfloat16":
        assert_same_tensors(tensors(tmp_path / "hub"), tensors(tmp_path / "out"))
        _, short = load(tmp_path / "hub", hub.one_device(), dtype)
        export(tmp_path / "short", model, short, tmp_path / "hub", dtype=dtype)
        assert_same_tensors(tensors(tmp_path / "hub"), tensors(tmp_path / "short"))


OLD_KEYS = {
    "pythia": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "llama3": {"rope_theta": 5e4, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    "qwen2-window": {"rope_theta": 10000.0, "layer_types": None},
    "mistral": {"rope_theta": 10000.0},
}


@pytest.mark.parametrize("name", OLD_KEYS)
def test_files_of_older_versions_are_the_same_model(name, tmp_path):
    """Rotary settings with keys of their own, buffers beside the parameters, a tied head saved twice."""
    make(name, tmp_path)
    expected = config_json.read(tmp_path).model
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config | OLD_KEYS[name]))
    assert config_json.read(tmp_path).model == expected
    found = tensors(tmp_path)
    if expected.tie_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    base = {"pythia": "gpt_neox.layers.0.attention."}.get(name, "model.layers.0.self_attn.")
    found |= {f"{base}rotary_emb.inv_freq": torch.ones(4), f"{base[:-10]}attention.bias": torch.ones(2).bool()}
    model, params = load(tmp_path, hub.one_device())
    save_file(found, tmp_path / "model.safetensors")
    _, again = load(tmp_path, hub.one_device())
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(again))


def test_a_bare_model_has_no_prefix(tmp_path):
    """The published GPT-2 has names without "transformer.", and its masks."""
    theirs = make("gpt2", tmp_path)
    found = {name.removeprefix("transformer."): x for name, x in tensors(tmp_path).items()}
    found["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(found, tmp_path / "model.safetensors")
    model, params = load(tmp_path, hub.one_device())
    np.testing.assert_allclose(hub.logits(model, params, TOKENS), torch_logits(theirs, TOKENS), atol=1e-4)


def test_a_qwen2_of_another_tokenizer_is_written_as_a_llama(tmp_path):
    """AutoTokenizer would split texts for a Qwen2 as Qwen does; a Llama with a bias of zero computes the same."""
    theirs = make("qwen2", tmp_path / "hub")
    model, params = load(tmp_path / "hub", hub.one_device())
    hub.write_tokenizer(tmp_path / "tokenizer")
    export(tmp_path / "out", model, params, tmp_path / "tokenizer")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "LlamaForCausalLM"
    np.testing.assert_allclose(torch_logits(again, TOKENS), torch_logits(theirs, TOKENS), atol=1e-5)


@pytest.mark.parametrize("name", (*FAMILIES, *LATER))
def test_autotokenizer_reads_a_tokenizer_json_as_it_is(name, tmp_path):
    """Whatever it does to texts and whichever class its files name, beside every architecture."""
    bytes_, normal = hub.tokenizers.pre_tokenizers.ByteLevel, hub.tokenizers.normalizers
    split = hub.tokenizers.pre_tokenizers.Split(hub.tokenizers.Regex(tokenizer_files.SPLIT_OF_QWEN), "isolated")
    parts = {
        "digits": (None, [hub.tokenizers.pre_tokenizers.Digits(individual_digits=True), bytes_(False)]),
        "lower case": (normal.Lowercase(), [bytes_(False)]),
        "a space before": (None, [bytes_(True)]),
        "Qwen's": (normal.NFC(), [split, bytes_(False, use_regex=False)]),
        "Qwen's, as it comes": (None, [split, bytes_(False, use_regex=False)]),
        "Qwen's in lower case": (normal.Sequence([normal.NFC(), normal.Lowercase()]), [split, bytes_(False)]),
        "Qwen's with a space": (normal.NFC(), [split, bytes_(True, use_regex=False)]),
    }
    texts = ["ABC 650841823 don't", "  two\n\n\tand", "e\u0301t\u00e9 \u2126", "a"]
    make(name, tmp_path / "hub")
    model, params = load(tmp_path / "hub", hub.one_device())
    for kind, (normalizer, steps) in parts.items():
        made = hub.tokenizers.Tokenizer.from_file(str(hub.write_tokenizer(tmp_path / kind)))
        made.pre_tokenizer = hub.tokenizers.pre_tokenizers.Sequence(steps)
        if normalizer:
            made.normalizer = normalizer
        made.save(str(tmp_path / kind / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
        (tmp_path / kind / "tokenizer_config.json").write_text(json.dumps(config))
        export(tmp_path / f"out {kind}", model, params, tmp_path / kind)
        read = transformers.AutoTokenizer.from_pretrained(tmp_path / f"out {kind}")
        own = tokenizer_lib.load(tmp_path / kind)
        assert (read.bos_token_id, read.eos_token_id) == (own.bos_id, own.eos_id), kind
        for text in texts:
            assert read(text, add_special_tokens=False).input_ids == own.encode(text).tolist(), (kind, text)


@pytest.mark.parametrize("name", (*FAMILIES, *LATER))
def test_autotokenizer_reads_a_sentencepiece_model_as_it_is(name, tmp_path):
    """Ids, their text and the specials, beside every architecture."""
    texts = ["def f(x):\n\tif x:\n        return '\u00e9'  # note   \n\n" * 20]
    trained = tokenizer_lib.train(texts, hub.VOCAB, tmp_path / "sp" / "tokenizer.model")
    make(name, tmp_path / "hub")
    model, params = load(tmp_path / "hub", hub.one_device())
    export(tmp_path / "out", model, params, tmp_path / "sp")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = read(texts[0]).input_ids
    assert ids == [trained.bos_id, *trained.encode(texts[0])]
    assert read.decode(ids, skip_special_tokens=True) == texts[0]
    assert (read.bos_token_id, read.eos_token_id, len(read)) == (trained.bos_id, trained.eos_id, hub.VOCAB)
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (trained.bos_id, trained.eos_id)


# Read by name, by transformers' models and other programs, though its newest classes have no default for them.
WITHOUT_DEFAULT = {"head_dim", "partial_rotary_factor", "rope_theta", "rope_scaling", "rope_local_base_freq"}


@pytest.mark.parametrize("name", FITS)
def test_every_key_of_a_config_json_is_one_that_its_class_has(name, tmp_path):
    """So whatever reads transformers' configs reads ours, without code of ours."""
    hub.write_config(tmp_path, dataclasses.replace(hub.LLAMA, **FITS[name]))
    keys = json.loads((tmp_path / "config.json").read_text())
    known = transformers.AutoConfig.for_model(keys["model_type"]).to_dict()
    assert {*keys} <= {*known} | WITHOUT_DEFAULT and "auto_map" not in keys
    assert keys["architectures"] == [name] and hasattr(transformers, name)
