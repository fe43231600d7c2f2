"""Tokenizers: text round-trips, fingerprints identify the vocabulary, bad files are named."""

import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError

CODE = "def f(x):\n\tif x:\n        return '\u00e9'  # note   \n\n\nclass A:\n    y = {1: [2, 3]}\n" * 50


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tokenizer_lib.train([CODE], 320, tmp_path_factory.mktemp("tok") / "tokenizer.model")


def hf_file(directory, specials=("<s>", "</s>"), name="tokenizer.json"):
    directory.mkdir(parents=True, exist_ok=True)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([CODE], trainer)
    model.save(str(directory / name))
    return directory / name


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.example("\u2581a \u2581\u2581  b")
@hypothesis.example(" leading and trailing \n\t \r\n\0 \ufeff\U0001f600 <s></s><unk> <0x0A>")
@hypothesis.settings(deadline=None, max_examples=200)
def test_text_round_trips(trained, text):
    ids = trained.encode(text)
    assert ids.dtype == np.int32 and trained.decode(ids) == text
    assert trained.bos_id not in ids and trained.eos_id not in ids


def test_trained_layout_and_batch(trained):
    assert (trained.bos_id, trained.eos_id, trained.vocab_size, trained.kind) == (1, 2, 320, "sentencepiece")
    texts = ["a b", "", "def f(x):\n        return"]
    for text, ids in zip(texts, trained.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, trained.encode(text))
    assert (
        len(trained.encode(" " * 8 + "return")) < 7 and len(trained.encode(":\n")) == 1
    )  # indentation and line breaks are learnt


def test_training_is_deterministic_and_bounded(tmp_path, trained):
    again = tokenizer_lib.train([CODE], 320, tmp_path / "again.model")
    assert again.path.read_bytes() == trained.path.read_bytes() and again.fingerprint == trained.fingerprint

    def endless():
        while True:
            yield CODE

    assert tokenizer_lib.train(endless(), 310, tmp_path / "endless.model", sample_bytes=20_000).vocab_size == 310


def test_one_very_long_line_is_trained_on(tmp_path):
    long = tokenizer_lib.train(["wonder " * 20_000 + " ".join(CODE.split())], 310, tmp_path / "long.model")
    assert len(long.encode("wonder wonder ")) < 8


def test_fingerprint_is_stable_and_tells_tokenizers_apart(tmp_path, trained):
    program = "import sys; from lmboost.data import tokenizer as t; print(t.load(sys.argv[1]).fingerprint)"
    seen = subprocess.run(
        [sys.executable, "-c", program, str(trained.path)], capture_output=True, text=True, check=True
    )
    assert seen.stdout.strip() == trained.fingerprint
    other = tokenizer_lib.train([CODE], 321, tmp_path / "other.model")
    assert other.fingerprint != trained.fingerprint
    path = hf_file(tmp_path / "hf")
    first = tokenizer_lib.load(path)
    path.write_text(json.dumps(json.loads(path.read_text())))  # same content, other layout of the file
    assert tokenizer_lib.load(path).fingerprint == first.fingerprint != trained.fingerprint


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_save_and_load_directory(tmp_path, trained, kind):
    source = trained if kind == "sentencepiece" else tokenizer_lib.load(hf_file(tmp_path / "hf"))
    assert source.save(tmp_path / "copy").name == tokenizer_lib.FILE_NAMES[kind]
    copy = tokenizer_lib.load(tmp_path / "copy")
    assert (copy.kind, copy.fingerprint) == (kind, source.fingerprint)
    np.testing.assert_array_equal(copy.encode(CODE), source.encode(CODE))


def test_hugging_face_round_trip_and_specials_in_text(tmp_path):
    tokenizer = tokenizer_lib.load(hf_file(tmp_path))
    text = CODE + "</s> is text\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id not in tokenizer.encode(text)


@pytest.mark.parametrize(
    "specials, config, expected",
    [
        (("<s>", "</s>"), None, ("<s>", "</s>")),
        (("<|endoftext|>",), None, ("<|endoftext|>", "<|endoftext|>")),
        (("<|begin_of_text|>", "<|end_of_text|>"), None, ("<|begin_of_text|>", "<|end_of_text|>")),
        (("<x>",), None, (None, None)),
        (("<s>", "<q>"), {"bos_token": None, "eos_token": {"content": "<q>"}}, (None, "<q>")),
    ],
)
def test_hugging_face_specials(tmp_path, specials, config, expected):
    path = hf_file(tmp_path, specials)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_lib.load(path)
    pieces = tokenizer.pieces()
    assert tuple(None if i is None else pieces[i] for i in (tokenizer.bos_id, tokenizer.eos_id)) == expected


def test_bad_files_are_named(tmp_path, trained):
    with pytest.raises(UserError, match=r"nowhere.model: no such file"):
        tokenizer_lib.load(tmp_path / "nowhere.model")
    with pytest.raises(UserError, match=r"holds neither tokenizer.json nor tokenizer.model"):
        tokenizer_lib.load(tmp_path)
    for name in ("bad.model", "bad.json"):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(UserError, match=f"{name} is not a readable"):
            tokenizer_lib.load(tmp_path / name)
    path = hf_file(tmp_path / "hf")
    (path.parent / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(UserError, match=r"eos_token='<gone>' is not in the vocabulary"):
        tokenizer_lib.load(path)
    with pytest.raises(UserError, match=r"id 320 is outside the vocabulary"):
        trained.decode([5, 320])


def test_bad_training_input(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size=100 is too small"):
        tokenizer_lib.train([CODE], 100, tmp_path / "x.model")
    with pytest.raises(UserError, match=r"no text"):
        tokenizer_lib.train([""], 400, tmp_path / "x.model")
    with pytest.raises(UserError, match=r"vocab_size=5000"):
        tokenizer_lib.train(["a b c"], 5000, tmp_path / "x.model")
