"""Saved models and tokenizers: which belong together, and which tokens end what a model writes."""

import dataclasses
import json

import pytest

from lmboost import checkpoint
from lmboost.data import loader, prepare
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError
from tests import hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """hub/, a model with a tokenizer, and data/, prepared with that."""
    home = tmp_path_factory.mktemp("home")
    hub.write(home / "hub")
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i} of some"}) + "\n" for i in range(200)))
    prepare.prepare(home / "data", [str(home / "texts.jsonl")], str(home / "hub"), validation_fraction=0.1)
    return home


def copied(home, directory, change):
    """hub/ with another tokenizer.json."""
    for path in (home / "hub").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    content = json.loads((directory / "tokenizer.json").read_text())
    change(content)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return checkpoint.Saved.find(f"hf:{directory}", field="--config.teacher.path")


def add(file, **token):
    file["added_tokens"].append(file["added_tokens"][0] | {"id": 280, "content": "<pad>"} | token)


def rename(content):
    vocab = content["model"]["vocab"]
    vocab["Zz"] = vocab.pop("Z")


def test_a_model_of_other_tokens_than_the_data_s_is_refused(home, tmp_path):
    data = loader.info(str(home / "data"))
    checkpoint.Saved.find(f"hf:{home / 'hub'}").check_tokenizer(data)
    with pytest.raises(UserError, match=r"--config.teacher.path: .* another tokenizer .* id \d+ is 'Z' in .* but 'Zz'"):
        copied(home, tmp_path, rename).check_tokenizer(data)


def test_a_pad_that_no_text_has_makes_no_other_tokenizer(home, tmp_path):
    """Neither where the model's tokenizer has one, nor where the data's does."""
    padded = copied(home, tmp_path, add)
    assert padded.tokenizer_fingerprint != checkpoint.Saved.find(f"hf:{home / 'hub'}").tokenizer_fingerprint
    padded.check_tokenizer(loader.info(str(home / "data")))
    prepare.prepare(tmp_path / "data", [str(home / "texts.jsonl")], str(tmp_path), validation_fraction=0.1)
    data, plain = loader.info(str(tmp_path / "data")), checkpoint.Saved.find(f"hf:{home / 'hub'}")
    for rows in (301, 280):
        dataclasses.replace(plain, model=dataclasses.replace(plain.model, vocab_size=rows)).check_tokenizer(data)
    with pytest.raises(UserError, match="has a vocabulary of 279, fewer than the 280 pieces"):
        dataclasses.replace(plain, model=dataclasses.replace(plain.model, vocab_size=279)).check_tokenizer(data)


def test_of_a_token_that_no_text_has_a_model_needs_no_row(home, tmp_path):
    def add_many(file):
        for i in range(280, 302):
            add(file, id=i, content=f"<pad {i}>")

    saved = copied(home, tmp_path, add_many)
    assert saved.tokenizer().vocab_size == 302 > saved.model.vocab_size
    (tmp_path / "more").mkdir()
    with pytest.raises(UserError, match="has 281 pieces, more than the model's vocab_size=280"):
        in_texts = copied(home, tmp_path / "more", lambda file: add(file, special=False))
        dataclasses.replace(in_texts, model=dataclasses.replace(in_texts.model, vocab_size=280)).tokenizer()


def test_a_model_s_own_ends_hold_for_a_tokenizer_that_lies_elsewhere(home, tmp_path):
    saved = copied(home, tmp_path, lambda content: None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7, 10**6]}))
    assert tokenizer_lib.load(home / "hub").special.stop_ids == (1,)
    assert saved.tokenizer(str(home / "hub")).special.stop_ids == (1, 7)
