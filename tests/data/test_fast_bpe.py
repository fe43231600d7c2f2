"""fastokens stands in for Hugging Face's library only where it gives the same ids, and what differs is an error."""

import string

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from lmboost.data import fast_bpe
from lmboost.errors import UserError

pytest.importorskip("fastokens")

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = ["It's 1234 words,  words and\tmore wörds: 漢字漢字\n\n", string.printable, "the end of the texts 🤦🏽 \r\n"]
ATOMS = [
    " ", "\n", "\r\n", "\t", "\u3000", "\u2581", "\u200d", "e\u0301", "\u0130", "12345", "\u0664", "<|end|>",
    "<tool>", "</s>", "'s", "'LL", "🤦🏽\u200d♀️", "漢字", "한국", "word", "words", "!!", "\0", "\x85", "\u2028",
    "\ufeff", "<0x41>", " " * 40,
]  # fmt: skip
texts = strategies.lists(strategies.sampled_from(ATOMS) | strategies.text(max_size=8), max_size=40).map("".join)


def byte_level(kind: str) -> tokenizers.Tokenizer:
    """Byte-level BPE that splits texts as GPT-2, SmolLM2, Llama 3 or Qwen does."""
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(tokenizers.Regex(WORDS.replace("{1,3}", "" * (kind == "qwen"))), "isolated")
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = {
        "gpt2": gpt2,
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
    }.get(kind, pre_tokenizers.Sequence([split, plain]))
    if kind == "qwen":
        model.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(model, ["<|end|>"], alphabet)
    return model


def sentencepiece_like() -> tokenizers.Tokenizer:
    """As transformers writes Llama 2's: spaces are marked by a normalizer, and bytes stand for what has no piece."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    _train(model, ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], [])
    return model


def _train(model: tokenizers.Tokenizer, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    model.train_from_iterator(TEXT * 3, trainer)
    model.add_tokens([AddedToken("<tool>", normalized=False)])
    model.encode_special_tokens = True


KINDS = {kind: byte_level(kind) for kind in ("gpt2", "smollm2", "llama3", "qwen")} | {"llama2": sentencepiece_like()}


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=200)
@hypothesis.given(batch=strategies.lists(texts, max_size=4))
def test_ids_are_those_of_hugging_faces_library(kind, batch):
    model = KINDS[kind]
    found = fast_bpe.FastBpe(model)._encode(batch)
    expected = [encoding.ids for encoding in model.encode_batch_fast(batch, add_special_tokens=False)]
    assert [ids.tolist() for ids in found] == expected
    assert all(ids.dtype == np.int32 for ids in found)


def test_a_text_with_a_byte_that_has_no_token_is_encoded_all_the_same():
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train(model, ["<|end|>"], list("abcdefghijklmnopqrstuvwxyz\u0120"))
    fast = fast_bpe.make(model)
    batch = ["a word", "an \u00e9 and \x04", "words", "\U000f0000"]
    expected = [encoding.ids for encoding in model.encode_batch_fast(batch, add_special_tokens=False)]
    assert [ids.tolist() for ids in fast.encode_batch(batch)] == expected and expected[3] == []


def test_it_stands_in_where_it_is_exact():
    for model in KINDS.values():
        assert fast_bpe.make(model)


def test_a_kind_that_it_does_not_have_is_left_to_hugging_faces_library():
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    _train(model, [], [])
    assert fast_bpe.make(model) is None


def test_other_ids_are_found_at_the_start_and_on_the_way():
    fast = fast_bpe.FastBpe(KINDS["gpt2"])
    fast.model = KINDS["smollm2"]  # which splits digits otherwise
    assert not fast.is_exact()
    with pytest.raises(UserError, match=r"other ids than the tokenizers library for the text 'words 1234'"):
        fast.encode_batch(["words 1234"])
    fast = fast_bpe.FastBpe(KINDS["gpt2"])
    fast.encode_batch(["words"] * 1000)
    fast.model = KINDS["smollm2"]
    fast.encode_batch(["words 1234"] * 24)
    with pytest.raises(UserError, match="uninstall fastokens"):
        fast.encode_batch(["words 1234"])
