"""Which tokens begin and end a text: what the files beside a tokenizer say, alone and against each other."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError
from lmboost.hf import tokenizer_files
from tests import harmed, hub

SPECIALS = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<a>", "<b>"]
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MODEL, GENERATION = "config.json", "generation_config.json"
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
# name: (files beside, (bos, eos)); ids are places in SPECIALS
FILES = {
    "GPT-2's own": ({CONFIG: {"model_max_length": 1024}, MODEL: GPT2}, ("<|endoftext|>", "<|endoftext|>")),
    "a class alone": ({CONFIG: {"tokenizer_class": "GPT2TokenizerFast"}}, ("<|endoftext|>", "<|endoftext|>")),
    "a Qwen": ({CONFIG: {"tokenizer_class": "Qwen2Tokenizer"}}, (None, "<|endoftext|>")),
    "a class that has none": ({CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}}, (None, None)),
    "null is none": ({CONFIG: {"tokenizer_class": "GPT2Tokenizer", "bos_token": None}}, (None, "<|endoftext|>")),
    "named in two ways": (
        {CONFIG: {"bos_token": "<a>", "eos_token": {"__type": "AddedToken", "content": "<b>"}}},
        ("<a>", "<b>"),
    ),
    "a map alone": (
        {CONFIG: {"tokenizer_class": "PreTrainedTokenizerFast"}, MAP: {"bos_token": "<a>", "eos_token": "<b>"}},
        ("<a>", "<b>"),
    ),
    "a map goes before": (
        {CONFIG: {"bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}, MAP: {"bos_token": "<a>"}},
        ("<a>", None),
    ),
    "but not before added_tokens_decoder": (
        {
            CONFIG: {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {"0": {"content": "<s>"}},
                     "tokenizer_class": "PreTrainedTokenizerFast"},
            MAP: {"bos_token": "<a>"},
        },
        ("<s>", "</s>"),
    ),
}  # fmt: skip
OURS = {  # where transformers finds none, and files that it does not read
    "ids of the model": (
        {CONFIG: {"tokenizer_class": "X"}, MODEL: {"bos_token_id": 5, "eos_token_id": 6}},
        ("<a>", "<b>"),
    ),
    "ids of generation": (
        {CONFIG: {}, MODEL: {"eos_token_id": 5}, GENERATION: {"eos_token_id": [6, 5]}},
        (None, "<b>"),
    ),
    "ids do not go before a name": ({CONFIG: {"eos_token": "</s>"}, GENERATION: {"eos_token_id": 6}}, (None, "</s>")),
    "an id of the end alone": ({MODEL: {"eos_token_id": 6}}, (None, "<b>")),
    "ids of no token": ({MODEL: {"bos_token_id": 50256, "eos_token_id": -1}}, ("<s>", "</s>")),
    "a tokenizer.json alone": ({}, ("<s>", "</s>")),
    "files that say nothing of it": ({CONFIG: {"model_max_length": 9}, MAP: {"pad_token": "<a>"}}, ("<s>", "</s>")),
    "a Llama": ({CONFIG: {"tokenizer_class": "LlamaTokenizer"}}, ("<s>", "</s>")),  # as transformers 4
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer.json with SPECIALS as its first tokens."""
    directory = tmp_path_factory.mktemp("made")
    return write(directory, SPECIALS)


def write(directory, specials):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(["a text of some words " * 9], trainer)
    directory.mkdir(exist_ok=True, parents=True)
    model.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def beside(made, directory, files):
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "tokenizer.json").write_bytes(made.read_bytes())
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return tokenizer_lib.load(directory)


def names(tokenizer):
    pieces = tokenizer.pieces()
    return tuple(None if i is None else pieces[i] for i in (tokenizer.bos_id, tokenizer.eos_id))


@pytest.mark.parametrize("name", FILES | OURS)
def test_the_tokens_that_the_files_say(tmp_path, made, name):
    files, expected = (FILES | OURS)[name]
    found = beside(made, tmp_path, files)
    assert names(found) == expected
    for piece in filter(None, expected):
        assert repr(piece) in found.borders
    found.save(tmp_path / "copy")
    assert names(tokenizer_lib.load(tmp_path / "copy")) == expected
    assert tokenizer_lib.load(tmp_path / "copy").special.stop_ids == found.special.stop_ids


@pytest.mark.peers
@pytest.mark.parametrize("name", FILES)
def test_so_does_transformers(tmp_path, made, name):
    transformers = pytest.importorskip("transformers")
    files, expected = FILES[name]
    beside(made, tmp_path, {MODEL: {"model_type": "llama"}} | files)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (read.bos_token, read.eos_token) == expected


@pytest.mark.parametrize(
    "files, message",
    [
        (
            {CONFIG: {"eos_token": "<q>"}},
            r"tokenizer_config.json: eos_token='<q>' is not in the vocabulary .* Name one",
        ),
        ({MAP: {"bos_token": {"content": "<q>"}}}, r"special_tokens_map.json: bos_token='<q>' is not in the vocab"),
        ({CONFIG: {"eos_token": {"lstrip": True}}}, r"tokenizer_config.json: eos_token: the field content is missing"),
        ({CONFIG: {"eos_token": 5}}, r"tokenizer_config.json: eos_token is 5, expected a text"),
        ({MODEL: {"eos_token_id": "5"}}, r"config.json: eos_token_id is '5', expected a whole number"),
        ({GENERATION: {"eos_token_id": [5, [6]]}}, r"generation_config.json: eos_token_id\[1\] is a list"),
    ],
)
def test_what_is_no_token_is_named(tmp_path, made, files, message):
    with pytest.raises(UserError, match=message):
        beside(made, tmp_path, files)


@pytest.mark.parametrize("where", ["tokenizer.json", ADDED])
def test_no_text_has_the_end_whatever_the_files_call_it(tmp_path, made, where):
    content = json.loads(made.read_bytes())
    count = len(content["model"]["vocab"])
    token = content["added_tokens"][0] | {"id": count, "content": "<end>", "special": False}
    files = {CONFIG: {"eos_token": "<end>"}, ADDED: {"<end>": count}}
    if where != ADDED:
        files[where] = content | {"added_tokens": [*content["added_tokens"], token]}
    found = beside(made, tmp_path, files)
    found.save(tmp_path / "copy")
    for tokenizer in (found, tokenizer_lib.load(tmp_path / "copy")):
        assert tokenizer.eos_id == count and count not in tokenizer.in_texts()
        assert count not in tokenizer.encode("a <end> of it")


@pytest.mark.parametrize("specials", [["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|im_start|>", "<|im_end|>"]])
def test_the_begin_of_a_turn_never_begins_a_document(tmp_path, specials):
    found = names(tokenizer_lib.load(write(tmp_path, specials)))
    assert found == (("<|endoftext|>",) * 2 if len(specials) == 3 else (None, None))


def test_all_ends_of_a_generation_are_found(tmp_path, made):
    files = {CONFIG: {"eos_token": "</s>"}, MODEL: {"eos_token_id": 4}, GENERATION: {"eos_token_id": [1, 6]}}
    assert beside(made, tmp_path, files).special.stop_ids == (1, 6)
    (tmp_path / GENERATION).unlink()
    assert tokenizer_lib.load(tmp_path).special.stop_ids == (1, 4)


@pytest.mark.parametrize("where", [CONFIG, ADDED])
def test_tokens_that_only_the_files_beside_have_are_added_with_their_ids(tmp_path, made, where):
    count = tokenizer_lib.load(made).vocab_size
    added = {str(count): {"content": "<end>", "special": True}}
    files = {CONFIG: {"eos_token": "<end>"} | ({"added_tokens_decoder": added} if where == CONFIG else {})}
    files |= {ADDED: {"<end>": count}} if where == ADDED else {}
    found = beside(made, tmp_path, files)
    assert (found.vocab_size, found.eos_id) == (count + 1, count)
    found.save(tmp_path / "copy")
    again = tokenizer_lib.load(tmp_path / "copy")
    assert (again.fingerprint, again.eos_id) == (found.fingerprint, count)
    (tmp_path / where).write_text((tmp_path / where).read_text().replace(str(count), str(count + 7)))
    with pytest.raises(UserError, match=rf"'<end>' is to be token {count + 7} .* but comes to be {count}"):
        tokenizer_lib.load(tmp_path)


def test_a_tokenizer_json_goes_before_a_model_beside_it(tmp_path, made):
    (tmp_path / "tokenizer.model").write_bytes(b"no SentencePiece at all")  # as Llama 3's
    assert beside(made, tmp_path, {}).kind == "huggingface"
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("gone")
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        tokenizer_lib.load(tmp_path)


def test_a_copy_of_a_model_keeps_what_is_said_beside_it(tmp_path):
    model = tokenizer_lib.train(["a text of some words " * 9], 300, tmp_path / "own" / "tokenizer.model")
    (model.path.parent / MAP).write_text(json.dumps({"bos_token": None, "eos_token": "<0x00>"}))
    found = tokenizer_lib.load(model.path)
    found.save(tmp_path / "copy")
    assert names(found) == names(tokenizer_lib.load(tmp_path / "copy")) == (None, "<0x00>")


def test_tokens_that_no_text_has_make_no_difference(tmp_path, made):
    data = tokenizer_lib.load(made)
    more = tokenizer_lib.load(write(tmp_path / "renamed", [*SPECIALS[:5], "<c>", "<d>"]))
    assert data.fingerprint != more.fingerprint and data.disagreement(more) is None
    ends = tokenizer_lib.load(write(tmp_path / "ends", ["<s>", "<q>", *SPECIALS[2:]]))
    assert f"id 1 is '</s>' in {made}, but '<q>' in" in data.disagreement(ends)
    fewer = tokenizer_lib.load(write(tmp_path / "fewer", SPECIALS[:5]))
    assert "id 7 is" in data.disagreement(fewer)


fuzz = harmed.fuzz
WHOLE = {
    CONFIG: {"bos_token": "<a>", "eos_token": {"content": "<b>"}, "added_tokens_decoder": {"5": {"content": "<a>"}}},
    MAP: {"bos_token": "<a>", "eos_token": {"content": "<b>"}},
    ADDED: {"<new>": 300},
    MODEL: GPT2 | {"bos_token_id": 5, "eos_token_id": [5, 6]},
    GENERATION: {"eos_token_id": [5, 6]},
}


@fuzz
@given(st.sampled_from(sorted(WHOLE)).flatmap(lambda name: st.tuples(st.just(name), harmed.files(WHOLE[name]))))
def test_whatever_lies_beside_it_is_read_or_refused(tmp_path, made, harm):
    name, content = harm
    for other in WHOLE:
        (tmp_path / other).unlink(missing_ok=True)
    (tmp_path / "tokenizer.json").write_bytes(made.read_bytes())
    (tmp_path / name).write_bytes(content)
    try:
        found = tokenizer_lib.load(tmp_path)
        assert found.borders
    except UserError as error:
        assert len(str(error)) < 3000


@fuzz
@given(st.data())
def test_whatever_is_in_a_tokenizer_json_is_read_or_refused(tmp_path, made, data):
    content = json.loads(made.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(data.draw(harmed.files(content)))
    try:
        found = tokenizer_lib.load(tmp_path)
        found.decode(found.encode("<s> a text"))
    except UserError as error:
        assert "tokenizer.json" in str(error) and len(str(error)) < 3000


def test_an_id_beyond_all_vocabularies_is_refused_before_a_table_is_made(tmp_path, made):
    content = json.loads(made.read_bytes())
    content["model"]["vocab"]["zz"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has an id 4000000000, which no vocabulary has"):
        tokenizer_lib.load(tmp_path)


def test_two_pieces_of_one_id_are_refused(tmp_path, made):
    content = json.loads(made.read_bytes())
    content["model"]["vocab"]["zz"] = content["model"]["vocab"]["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer.json: both '(a|zz)' and '(a|zz)' have the id"):
        tokenizer_lib.load(tmp_path)


def test_a_text_that_has_no_tokens_is_refused(tmp_path):
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1})).save(str(tmp_path / "tokenizer.json"))
    found = tokenizer_lib.load(tmp_path)
    assert found.encode("a").tolist() == [0]
    with pytest.raises(UserError, match="tokenizer.json cannot encode a text; .*Missing"):
        found.encode("b")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    return tokenizer_lib.train(["a text of some words " * 9], 300, path).path.read_bytes()


@fuzz
@given(st.data())
def test_whatever_is_in_a_model_file_is_read_or_refused(tmp_path, model, data):
    raw = model if data.draw(st.booleans()) else model[: data.draw(st.integers(0, len(model)))]
    for _ in range(data.draw(st.integers(0, 3))):
        if raw:
            raw = harmed.changed(raw, data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 255)))
    (tmp_path / "tokenizer.model").write_bytes(raw)
    try:
        found = tokenizer_lib.load(tmp_path)
        assert found.encode("a text \u2581").size and found.borders and found.fingerprint
        tokenizer_files.from_sentencepiece(found.path)
    except UserError as error:
        assert "tokenizer.model" in str(error) and len(str(error)) < 3000


def test_a_model_file_that_is_none_is_named(tmp_path):
    for raw in (b"", b"\0" * 99, hub.__file__.encode() * 9):
        (tmp_path / "tokenizer.model").write_bytes(raw)
        with pytest.raises(UserError, match="tokenizer.model is not a readable SentencePiece model"):
            tokenizer_lib.load(tmp_path)
