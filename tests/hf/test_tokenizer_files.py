"""A SentencePiece model and the tokenizer.json made of it give every text the same ids."""

import io
import json
import pathlib
import sysconfig

import pytest
import sentencepiece
import tokenizers

from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError
from lmboost.hf import tokenizer_files
from tests import hub

SOURCES = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
TEXTS = [path.read_text(encoding="utf-8") for path in SOURCES[::4]]
ODD = [
    "",
    "  leading",
    "\ttab\t",
    "trailing  ",
    "a  b   c",
    "\u00e9 \u6f22\u5b57 \U0001f600",
    "a\n\n b",
    "\u00a0x",
    " \n ",
]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
SETTINGS = {
    "as Llama's": PLAIN | {"byte_fallback": True},
    "without a dummy prefix": PLAIN | {"add_dummy_prefix": False, "byte_fallback": True},
    "with a symbol": PLAIN | {"byte_fallback": True, "user_defined_symbols": ["\t", "="]},
    "with unknown characters": PLAIN | {"character_coverage": 0.98},
    "as SentencePiece's own defaults": {"minloglevel": 2},
}


def train(directory, **settings):
    model = io.BytesIO()
    lines = [line for text in TEXTS[:15] for line in text.splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, **{"vocab_size": 800} | settings
    )
    path = directory / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return tokenizer_lib.load(path)


def converted(tokenizer) -> tokenizers.Tokenizer:
    out = tokenizer_files.from_sentencepiece(tokenizer.path)
    out.encode_special_tokens = True  # as HuggingFaceTokenizer reads it: "<s>" in a text is text
    assert [out.id_to_token(i) for i in range(out.get_vocab_size())] == tokenizer.pieces()
    return out


def test_one_of_ours_is_the_same_on_source_text(tmp_path):
    tokenizer = tokenizer_lib.train(TEXTS, 2048, tmp_path / "tokenizer.model")
    fast = converted(tokenizer)
    for text in [*TEXTS, *ODD, "<s></s><unk><0x0A>"]:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text).tolist()
        assert fast.decode(ids, skip_special_tokens=False) == text
    assert fast.encode("a").ids == [tokenizer.bos_id, *tokenizer.encode("a")]


@pytest.mark.parametrize("name", SETTINGS)
def test_so_is_any_bpe(name, tmp_path):
    tokenizer = train(tmp_path, model_type="bpe", **SETTINGS[name])
    fast, unknown = converted(tokenizer), tokenizer.pieces().index("<unk>")
    for text in [*TEXTS[:20], *ODD]:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text).tolist(), text[:80]
        if unknown not in ids:  # which the two libraries write each in its own way
            assert fast.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["as Llama's", "as SentencePiece's own defaults", "with unknown characters"])
def test_so_is_unigram_but_for_ties(name, tmp_path):
    """Of 999 = 99 + 9 = 9 + 99 rounding chooses; nothing else differs, and seldom."""
    tokenizer = train(tmp_path, model_type="unigram", **SETTINGS[name])
    fast = converted(tokenizer)
    lines = [line for text in TEXTS for line in text.splitlines()] + ODD
    pairs = [
        (fast.encode(line, add_special_tokens=False).ids, ids.tolist())
        for line, ids in zip(lines, tokenizer.encode_batch(lines), strict=True)
    ]
    different = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(different) < 1e-3 * len(pairs) and all(sorted(a) == sorted(b) for a, b in different)


def test_what_has_no_equal_is_named(tmp_path):
    tokenizer = train(tmp_path, model_type="bpe", user_defined_symbols=["def "], minloglevel=2)
    with pytest.raises(UserError, match=r"user-defined symbols of several characters .*--tokenizer"):
        tokenizer_files.from_sentencepiece(tokenizer.path)
    tokenizer = train(tmp_path, model_type="word", vocab_size=300, hard_vocab_limit=False, minloglevel=2)
    with pytest.raises(UserError, match="neither BPE nor unigram"):
        tokenizer_files.from_sentencepiece(tokenizer.path)


def test_a_tokenizer_json_of_more_tokens_beside_a_model_is_not_written_for_it(tmp_path):
    tokenizer = train(tmp_path, model_type="bpe", **SETTINGS["as Llama's"])
    fast = tokenizer_files.from_sentencepiece(tokenizer.path)
    for more in ([], ["<|im_end|>"]):
        fast.add_special_tokens(more)
        fast.save(str(tmp_path / "tokenizer.json"))
        out = tmp_path / f"out{len(more)}"
        tokenizer_files.write(tokenizer_lib.load(tokenizer.path), out, 77)
        assert tokenizer_lib.load(out).fingerprint == tokenizer.fingerprint


def test_what_does_all_to_texts_that_qwen_s_does_is_one_of_its_kind(tmp_path):
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokenizer_files.SPLIT_OF_QWEN), "isolated")
    path = hub.write_tokenizer(tmp_path, split=split)
    assert tokenizer_files.is_qwen(tokenizer_lib.load(path))
    for at, other in ((("normalizer",), None), (("pre_tokenizer", "pretokenizers", 1, "add_prefix_space"), True)):
        content = json.loads(path.read_text())
        inner = content
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = other
        (tmp_path / "other.json").write_text(json.dumps(content))
        assert not tokenizer_files.is_qwen(tokenizer_lib.load(tmp_path / "other.json"))


def test_a_tokenizer_json_is_copied_with_what_is_beside_it(tmp_path):
    source = hub.write_tokenizer(tmp_path / "from").rename(tmp_path / "from" / "other.json")
    (tmp_path / "from" / "special_tokens_map.json").write_text("{}")
    tokenizer = tokenizer_lib.load(source)
    tokenizer_files.write(tokenizer, tmp_path / "to", 77)
    assert (tmp_path / "to" / "tokenizer.json").read_bytes() == source.read_bytes()
    assert (tmp_path / "to" / "special_tokens_map.json").exists()
    config = json.loads((tmp_path / "to" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["model_max_length"]) == ("<s>", "</s>", 77)
    (tmp_path / "from" / "tokenizer_config.json").write_text('{"eos_token": "<s>", "tokenizer_class": "GPT2Tokenizer"}')
    again = tokenizer_lib.load(source)
    tokenizer_files.write(again, tmp_path / "again", 77)
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<s>" and "bos_token" not in config
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
