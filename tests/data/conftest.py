"""A small corpus, prepared once."""

import random

import pytest

from lmboost.data import prepare as prepare_lib

WORDS = [
    "def",
    "return",
    "class",
    "self",
    "for",
    "if",
    "None",
    "x",
    "value",
    "items()",
    "[0]",
    "{}",
    "'text'",
    "+",
    "=",
]


def make_texts(count, seed=0, words=400):
    """Distinct pseudo-code documents of very unequal length."""
    draw = random.Random(seed)
    texts = []
    for i in range(count):
        tokens = [draw.choice(WORDS) + draw.choice([" ", " ", "\n    ", "\n"]) for _ in range(draw.randint(3, words))]
        texts.append(f"# {seed} {i} caf\u00e9\n" + "".join(tokens))
    return texts


def write_texts(directory, texts, names=None):
    directory.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (directory / f"{names[i] if names else i:05d}.txt").write_text(text, encoding="utf-8", newline="")
    return f"{directory}/*.txt"


@pytest.fixture(scope="session")
def arguments():
    """The arguments of `prepared`; tests run in no package, so what they share comes as fixtures."""
    return dict(ARGUMENTS)


@pytest.fixture(scope="session")
def write():
    return write_texts


@pytest.fixture(scope="session")
def texts():
    return make_texts(120)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts):
    """Glob of the corpus's files."""
    return write_texts(tmp_path_factory.mktemp("corpus"), texts)


ARGUMENTS = {"tokenizer": "train:320", "validation_fraction": 0.1, "record_tokens": 256, "shards": 3}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, corpus):
    """A data set of 3 train shards with records of 256 tokens."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare_lib.prepare(out, [corpus], **ARGUMENTS, report=lambda line: None)
    return out


@pytest.fixture(scope="session")
def second(tmp_path_factory, prepared):
    """Another data set with the tokenizer of `prepared`."""
    directory = tmp_path_factory.mktemp("second")
    source = write_texts(directory / "texts", make_texts(60, seed=1))
    arguments = ARGUMENTS | {"tokenizer": str(prepared / "tokenizer"), "shards": 1, "record_tokens": 128}
    prepare_lib.prepare(directory / "data", [source], **arguments, report=lambda line: None)
    return directory / "data"
