"""GGUF files: what the gguf package reads out of them, and what llama.cpp has no equal of."""

import dataclasses
import json
import pathlib
import urllib.request

import jax
import numpy as np
import pytest
import sentencepiece

from lmboost import convert
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError
from lmboost.hf import llama_cpp, llama_cpp_vocab
from tests import hub

gguf = pytest.importorskip("gguf")

MODELS = {
    "llama": hub.LLAMA,
    "llama-tied": dataclasses.replace(hub.LLAMA, tie_embeddings=True, rope_theta=500.0),
    "llama-unequal": dataclasses.replace(hub.LLAMA, layer_sizes="1*4/2/8/48,1*2/1/8/32"),
    "qwen2": dataclasses.replace(hub.LLAMA, qkv_bias=True),
    "qwen3": dataclasses.replace(hub.LLAMA, qk_norm="head"),
}
SCALED = {"rope_scaling_factor": 8.0, "rope_theta": 100.0}
SCALED = {
    "llama3": dataclasses.replace(hub.LLAMA, **SCALED, rope_scaling="llama3", rope_original_seq_len=16),
    "qwen3": dataclasses.replace(MODELS["qwen3"], **SCALED, rope_scaling="linear"),
}


@pytest.fixture
def tokenizer(tmp_path):
    return tokenizer_lib.load(hub.write_tokenizer(tmp_path))


def read(path):
    """(the keys, the tensors as float32) of a file."""
    file = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(np.asarray(t.data), t.tensor_type) for t in file.tensors}
    return {name: field.contents() for name, field in file.fields.items()}, tensors, file.tensors


@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_the_model(name, tmp_path, tokenizer):
    """Every parameter is in it, once; a query's pairs of features are neighbours in Llama's alone."""
    model = MODELS[name]
    params = hub.random_params(model)
    llama_cpp.export(tmp_path / "m.gguf", model, params, tokenizer, name="m", license="mit")
    keys, tensors, _ = read(tmp_path / "m.gguf")
    kind = name.partition("-")[0]
    assert keys["general.architecture"] == kind and keys["general.license"] == "mit"
    assert keys[f"{kind}.block_count"] == 2 and keys[f"{kind}.rope.freq_base"] == model.rope_theta
    assert keys[f"{kind}.attention.head_count"] == 4 and keys[f"{kind}.attention.head_count_kv"] == 2
    assert ("output.weight" in tensors) == (not model.tie_embeddings)
    if name != "llama-unequal":
        assert sum(x.size for x in tensors.values()) == sum(x.size for x in jax.tree.leaves(params))
        kernel = np.asarray(params["layers"]["attn"]["q"]["kernel"])[1]  # [D, H, N]
        found = tensors["blk.1.attn_q.weight"].reshape(4, 8, 32)
        order = [0, 4, 1, 5, 2, 6, 3, 7] if kind == "llama" else range(8)
        np.testing.assert_array_equal(found, kernel.transpose(1, 2, 0)[:, list(order)])
        np.testing.assert_array_equal(tensors["token_embd.weight"], params["embed"]["embedding"])
        np.testing.assert_array_equal(
            tensors["blk.0.ffn_down.weight"], np.asarray(params["layers"]["mlp"]["down"]["kernel"])[0].T
        )


def test_bfloat16_is_for_matrices(tmp_path, tokenizer):
    params = hub.random_params(hub.LLAMA)
    llama_cpp.export(tmp_path / "m.gguf", hub.LLAMA, params, tokenizer, "bfloat16")
    _, tensors, entries = read(tmp_path / "m.gguf")
    assert {(t.tensor_type.name, len(t.shape)) for t in entries} == {("BF16", 2), ("F32", 1)}
    np.testing.assert_array_equal(
        tensors["token_embd.weight"], np.asarray(params["embed"]["embedding"].astype("bfloat16"), np.float32)
    )


def test_a_byte_level_tokenizer(tmp_path, tokenizer):
    """Tokens, merges, the name of the splitting; rows without a token are unused."""
    found = llama_cpp_vocab.of(tokenizer, hub.VOCAB)
    assert (found.model, found.pre, len(found.tokens)) == ("gpt2", "gpt-2", hub.VOCAB)
    assert found.tokens[:280] == tokenizer.pieces() and found.tokens[280] == "[PAD280]"
    special = {tokenizer.bos_id, tokenizer.eos_id} - {None}
    assert {i for i, kind in enumerate(found.kinds) if kind == llama_cpp_vocab.CONTROL} == {0, 1} | special
    assert found.kinds[280:] == [llama_cpp_vocab.UNUSED] * 21
    written = json.loads(tokenizer.path.read_text())["model"]["merges"]
    assert [merge.split(" ") for merge in found.merges] == [list(pair) for pair in written]


def test_a_sentencepiece_tokenizer(tmp_path):
    tokenizer = tokenizer_lib.train([pathlib.Path(__file__).read_text()], 400, tmp_path / "t.model")
    found = llama_cpp_vocab.of(tokenizer, 410)
    assert (found.model, found.space_prefix, found.bos, found.ends) == ("llama", False, 1, (2,))
    assert found.kinds[:3] == [llama_cpp_vocab.UNKNOWN, llama_cpp_vocab.CONTROL, llama_cpp_vocab.CONTROL]
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert found.scores[:400] == [raw.get_score(i) for i in range(400)] and found.tokens[405] == "[PAD405]"
    assert found.kinds[found.tokens.index("<0x00>")] == gguf.TokenType.BYTE
    assert found.kinds[found.tokens.index("\t")] == gguf.TokenType.USER_DEFINED


PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": True}
SPLITS = {"qwen2": llama_cpp_vocab.SPLIT_OF_QWEN, "llama-bpe": llama_cpp_vocab._SPLIT_OF_LLAMA3}


def edited(path, **changes):
    content = json.loads(path.read_text())
    content["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(content | changes))
    return tokenizer_lib.load(path)


@pytest.mark.parametrize("name", SPLITS)
def test_splittings_that_llama_cpp_has_a_name_for(name, tmp_path):
    from tokenizers import Regex, pre_tokenizers

    path = hub.write_tokenizer(tmp_path, split=pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"))
    changes = {"normalizer": None, "model": {"ignore_merges": True}} if name == "llama-bpe" else {}
    assert llama_cpp_vocab.of(edited(path, **changes), 280).pre == name


def test_the_splitting_of_smollm(tmp_path):
    path = hub.write_tokenizer(tmp_path)
    bytes_ = json.loads(path.read_text())["pre_tokenizer"]
    steps = [{"type": "Digits", "individual_digits": True}, bytes_]
    changed = edited(path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert llama_cpp_vocab.of(changed, 280).pre == "smollm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": PREFIXED}, "splits text by a pre-tokenizer"),
        ({"normalizer": {"type": "NFC"}}, r"normalises text \(NFC\)"),
        ({"model": {"ignore_merges": True}}, "has ignore_merges=true"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_equal_of(changes, message, tmp_path):
    changed = edited(hub.write_tokenizer(tmp_path), **changes)
    with pytest.raises(UserError, match=f"tokenizer .*{message}.*give the model as hf:DIR instead"):
        llama_cpp_vocab.of(changed, 280)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_placement": "post", "qk_norm": "full"}, "no architecture of llama.cpp .*norm_placement='post'"),
        ({"qkv_bias": True, "attn_out_bias": True}, r"attn_out_bias=True \(expected False\)"),
        ({"sliding_window": 8, "qk_norm": "head"}, r"Qwen3ForCausalLM would, but for sliding_window=8 \(expected 0\)"),
        ({"rope_scaling": "yarn", "rope_scaling_factor": 4.0}, r"rope_scaling='yarn' \(expected 'linear or llama3'\)"),
    ],
)
def test_a_model_that_llama_cpp_has_no_architecture_for(changes, message):
    with pytest.raises(UserError, match=message):
        llama_cpp.family_of(dataclasses.replace(hub.LLAMA, **changes))


def test_the_verb_writes_a_whole_file_or_none(tmp_path):
    hub.write(tmp_path / "hub")
    out = tmp_path / "m.gguf"
    convert.convert(f"hf:{tmp_path / 'hub'}", f"gguf:{out}", "bfloat16", report=lambda _: None)
    assert read(out)[0]["general.name"] == "m"
    for place, message in (
        (out, "exists: choose another"), (tmp_path / "no" / "m", "no directory .*/no"), (tmp_path, "expected the name"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            convert.convert(f"hf:{tmp_path / 'hub'}", f"gguf:{place}")
    (tmp_path / "hub" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer was found"):
        convert.convert(f"hf:{tmp_path / 'hub'}", f"gguf:{tmp_path / 'other.gguf'}")
    assert [path.name for path in tmp_path.glob("*gguf*")] == ["m.gguf"]


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_it_and_computes_the_same(name, tmp_path, tokenizer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = MODELS[name]
    params = hub.random_params(model)
    llama_cpp.export(tmp_path / "m.gguf", model, params, tokenizer)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, hub.VOCAB, (2, 20))
    with torch.no_grad():
        theirs = peer(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(hub.logits(model, params, tokens), theirs, atol=2e-5, rtol=1e-4)


def ask(server, path, **body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llama3", "qwen3", "sentencepiece"])
def test_llama_cpp_reads_the_same_tokens_and_predicts_the_same(name, tmp_path, tokenizer):
    """Also where positions are scaled. Its keys and values are of 16 bits."""
    xllamacpp = pytest.importorskip("xllamacpp")
    text = pathlib.Path(__file__).read_text()
    if name == "sentencepiece":
        tokenizer = tokenizer_lib.train([text], 400, tmp_path / "t.model")
    model = dataclasses.replace(SCALED.get(name, hub.LLAMA), vocab_size=410, max_seq_len=256)
    params = hub.random_params(model)
    llama_cpp.export(tmp_path / "m.gguf", model, params, tokenizer)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.port, settings.warmup = str(tmp_path / "m.gguf"), 256, 0, False
    settings.cpuparams.n_threads = 1
    server = xllamacpp.Server(settings)
    sample = 'print("a  b")\n\tif x is None: 12345 “naïve”'
    ours = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(sample).tolist()]
    assert ask(server, "/tokenize", content=sample, add_special=True)["tokens"] == ours
    told = ask(server, "/completion", prompt=ours, n_predict=1, n_probs=20, temperature=0)
    logits = hub.logits(model, params, np.array([ours]))[0, -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    best = told["completion_probabilities"][0]["top_logprobs"]
    np.testing.assert_allclose([token["logprob"] for token in best], [expected[t["id"]] for t in best], atol=5e-3)
    assert len(best) == 20 and best[0]["id"] == expected.argmax()
