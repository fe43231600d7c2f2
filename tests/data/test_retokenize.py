"""Rows of another tokenizer: the same bytes, and which tokens end where, against a slow search by bytes."""

import dataclasses
import itertools
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers

from lmboost.data import bytes_of, loader, records, retokenize, windows
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.data.retokenize import Retokenizer
from lmboost.errors import UserError
from tests import hub

TEXT = pathlib.Path(__file__).read_text(encoding="utf-8") + "caf\u00e9 e\u0301 \u65e5\u672c \U0001f600\n" * 20
# Of every plane, and with what is written in two ways, and in one and in two bytes of a kind.
ODD = "ab  \n\t(e\u0301\u00e9\u2581\ufffdA"
TEXTS = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ODD)))


def llama(directory):
    """SentencePiece with a space before every text, and compatible characters made one."""
    directory.mkdir()
    lines = directory / "lines.txt"
    lines.write_text(TEXT, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(directory / "tokenizer"), vocab_size=400, byte_fallback=True,
        model_type="unigram", character_coverage=0.99, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return directory / "tokenizer.model"


def changing(directory, normalizer):
    """A byte-level tokenizer that changes a text first."""
    path = hub.write_tokenizer(directory)
    model = tokenizers.Tokenizer.from_file(str(path))
    model.normalizer = normalizer
    model.save(str(path))
    return path


def with_holes(directory):
    """A byte-level tokenizer without tokens for some bytes, as SmolLM2's: it leaves them out of a text."""
    path = hub.write_tokenizer(directory)
    file = json.loads(path.read_text())
    merged = {letter for pair in file["model"]["merges"] for letter in "".join(pair)}
    for byte in (*b"\x04\t(A", *range(0xC3, 0xF5)):
        letter = next(letter for letter, value in bytes_of._LETTERS.items() if value == byte)
        if letter not in merged:
            file["model"]["vocab"].pop(letter)
    path.write_text(json.dumps(file))
    return path


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Tokenizer files by what they are."""
    home = tmp_path_factory.mktemp("tokenizers")
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+|\s+"), "isolated")
    return {
        "ours": tokenizer_lib.train([TEXT], 380, home / "ours" / "tokenizer.model").path,
        "bytes": hub.write_tokenizer(home / "bytes"),
        "nfc": hub.write_tokenizer(home / "nfc", split=split),
        "lower": changing(home / "lower", tokenizers.normalizers.Lowercase()),
        "longer": changing(home / "longer", tokenizers.normalizers.Replace("(", "(a(b")),
        "shorter": changing(home / "shorter", tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " ")),
        "llama": llama(home / "llama"),
        "holes": with_holes(home / "holes"),
    }


@pytest.mark.parametrize("kind", ["ours", "bytes", "nfc", "lower", "llama"])
@hypothesis.given(TEXTS)
@hypothesis.example("\u2581a  \u2581\ufffd\U0010ffff\0</s><0x0A>")
@hypothesis.settings(deadline=None, max_examples=50)
def test_the_bytes_of_tokens_are_those_of_their_text(kinds, kind, text):
    pieces = bytes_of.load(str(kinds[kind]))
    raw, decoded = pieces.join(pieces.tokenizer.encode(text)), pieces.tokenizer.decode(pieces.tokenizer.encode(text))
    assert raw.removeprefix(b" " * pieces.puts_space).decode() == decoded
    if kind in ("ours", "bytes"):
        assert raw == text.encode()
    assert pieces.puts_space == (kind == "llama")
    assert pieces.keeps == (kind == "bytes") and (
        not pieces.keeps or raw == text.encode() or len(raw) < len(text.encode())
    )
    specials = {pieces.tokenizer.bos_id, pieces.tokenizer.eos_id}
    assert all(pieces.table[i] == b"" for i in specials) and b"" not in (
        pieces.table[i] for i in pieces.tokenizer.in_texts()
    )


def slow(documents, first, stop, data, other):
    """By brute force, of the tokens first to stop of a stream: (the row's own tokens, the other row's, their ids).

    A token is (document, bytes of it up to the token's end or None, spans of these that the other tokenizer changed).
    """
    own = [(number, place) for number, ids in enumerate(documents) for place in range(len(ids))][first:stop]
    own_of, other_of, theirs = [], [], []
    if own and own[-1][1] == 0 and stop - first > 1:
        own = own[:-1]
    for number, group in itertools.groupby(own, key=lambda token: token[0]):
        ids = [documents[number][place] for _, place in group]
        begin, end = int(ids[0] == data.tokenizer.bos_id), int(ids[-1] == data.tokenizer.eos_id)
        raw = b"".join(data.table[i] for i in ids)
        if begin and data.puts_space and raw[:1] == b" ":
            raw, cut = raw[1:], 1
        else:
            cut = 0
        end_of = lambda n: max(len(b"".join(data.table[i] for i in ids[:n])) - cut, 0)  # noqa: B023, E731
        mine = [(number, end_of(n + 1) + end * (n + 1 == len(ids))) for n in range(len(ids))]
        low = 0
        while low < len(raw) and raw[low] & 0xC0 == 0x80:
            low += 1
        high = next(h for h in range(len(raw), low - 1, -1) if _is_text(raw[low:h]))
        tokens = other.tokenizer.encode(raw[low:high].decode()).tolist()
        said = b"".join(other.table[i] for i in tokens)
        skip = int(other.puts_space and said != raw[low:high] and said[:1] == b" ")
        said, spans = said[skip:], []
        if said != raw[low:high]:
            text = raw[low:high]
            left = max(n for n in range(min(len(text), len(said)) + 1) if text[:n] == said[:n])
            most = min(len(text), len(said)) - left
            right = max(n for n in range(most + 1) if n == 0 or text[-n:] == said[-n:])
            spans = [(left, len(text) - right, len(said) - right)]
        ends = []
        for n in range(len(tokens)):
            at = max(len(b"".join(other.table[i] for i in tokens[: n + 1])) - skip, 0)
            for left, right, right_said in spans:
                at = at if at <= left else at - right_said + right if at >= right_said else None
            ends.append(None if at is None else low + at)
        bad = [(low + left, low + right) for left, right, _ in spans]
        whole = int(own[-1][0] > number) or end
        its = [(number, 0)] * begin * (other.tokenizer.bos_id is not None)
        its += [(number, at) for at in ends] + [(number, len(raw) + 1)] * whole
        theirs += [other.tokenizer.bos_id] * begin + tokens + [other.tokenizer.eos_id] * whole
        own_of += [(*token, bad) for token in mine]
        other_of += [(*token, bad) for token in its]
    return own_of, other_of, theirs


def _is_text(raw):
    try:
        return raw.decode() is not None
    except UnicodeDecodeError:
        return False


def brute_index(token, others):
    number, at, bad = token
    if any(low < at < high for low, high in bad):
        return -1
    best = -1
    for n, (of, end, spans) in enumerate(others):
        end = spans[0][1] if end is None else end
        if of == number and end <= at:
            best = n
    return best


def brute_chunks(own, others):
    """{(own tokens, other tokens)}, each a tuple of places in the rows."""
    chunks = set()
    for number in {token[0] for token in own}:
        ends = sorted({t[1] for t in own if t[0] == number} & {t[1] for t in others if t[0] == number} - {None})
        bad = next((t[2] for t in others if t[0] == number), [])
        for low, high in itertools.pairwise(ends):
            if any(low < max(b, a + 1) and high > min(a, b - 1) for a, b in bad):
                continue
            at = lambda t: t[2][0][1] if t[1] is None else t[1]  # noqa: E731
            inside = lambda row: tuple(i for i, t in enumerate(row) if t[0] == number and low < at(t) <= high)  # noqa: B023, E731
            chunks.add((inside(own), inside(others)))
    return chunks


def chunks_of(batch, row):
    """The same of a batch; targets are the tokens after the inputs."""
    own, other = batch["teacher_chunks"][row], batch["teacher_own_chunks"][row]
    return {
        (tuple(np.flatnonzero(own == n) + 1), tuple(np.flatnonzero(other == n) + 1)) for n in set(own.tolist()) - {0}
    }


@pytest.mark.parametrize(
    "data, other",
    [
        ("ours", "bytes"), ("bytes", "ours"), ("ours", "nfc"), ("ours", "llama"), ("llama", "bytes"),
        ("bytes", "lower"), ("bytes", "longer"), ("ours", "shorter"), ("ours", "holes"),
    ],
)  # fmt: skip
@hypothesis.given(texts=st.lists(TEXTS.filter(bool), min_size=1, max_size=4), draw=st.data())
@hypothesis.settings(deadline=None, max_examples=60)
def test_rows_are_those_of_a_slow_search_by_bytes(kinds, data, other, texts, draw):
    left, right = bytes_of.load(str(kinds[data])), bytes_of.load(str(kinds[other]))
    coder, seq_len = left.tokenizer, draw.draw(st.sampled_from([4, 16, 64]))
    documents = [
        np.concatenate([[coder.bos_id], ids, [coder.eos_id]]).astype(np.int32)
        for ids in map(coder.encode, texts)
        if len(ids)
    ]
    hypothesis.assume(documents)
    made = list(records.cut(documents, seq_len))
    rows = [windows.window(record, 0, seq_len) for record in made]
    longest = draw.draw(st.sampled_from([512, 9]))
    batch = Retokenizer("teacher", str(kinds[data]), str(kinds[other]), longest).rows(rows, len(rows) + 1, seq_len)
    for row, window in enumerate(rows):
        own, others, tokens = slow(documents, row * seq_len, row * seq_len + window.length, left, right)
        kept = min(len(tokens), longest)
        real = batch["teacher_segment_ids"][row] > 0
        assert batch["teacher_tokens"][row][real].tolist() == tokens[:kept] and real.sum() == kept
        labels = batch["teacher_weights"][row] > 0
        follows = [n for n in range(min(len(tokens) - 1, longest)) if others[n][0] == others[n + 1][0]]
        assert np.flatnonzero(labels).tolist() == follows
        assert batch["teacher_targets"][row][labels].tolist() == [tokens[n + 1] for n in follows]
        expected = [brute_index(token, others) for token in own[:seq_len]]
        found = batch["teacher_index"][row].tolist()
        assert found[: len(expected)] == [n if n < longest else -1 for n in expected]
        assert set(found[len(expected) :]) <= {-1}
        want = {(a, b) for a, b in brute_chunks(own, others) if b[-1] <= longest}
        assert chunks_of(batch, row) == want
        for mine, its in want:
            text, said = left.join(window.tokens[list(mine)]), right.join(np.array(tokens)[list(its)])
            assert (
                text.removeprefix(b" " * left.puts_space) == said.removeprefix(b" " * right.puts_space) or text == said
            )
    assert not batch["teacher_segment_ids"][-1].any() and (batch["teacher_index"][-1] == -1).all()


def assert_equal(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right) > 0
    for one, two in zip(left, right, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert one[name].dtype == two[name].dtype
            np.testing.assert_array_equal(one[name], two[name], name)


def schedule(step):
    return 8 * step, 8


@pytest.fixture(scope="module")
def teacher_rows(prepared, kinds):
    return Retokenizer("teacher", str(prepared / "tokenizer"), str(kinds["bytes"]), 256)


def test_batches_are_the_same_for_any_hosts_workers_and_restarts(prepared, second, teacher_rows):
    spec, each = f"{prepared}=0.7,{second}=0.3", {"retokenizers": [teacher_rows]}
    whole = list(loader.Loader(spec, "train", 64, seed=3).batches(schedule, 0, 5, **each))
    for hosts in ([(0,), (1,)], [(1, 2), (0, 3)]):
        count = sum(map(len, hosts))
        loaders = [loader.Loader(spec, "train", 64, 3, shards, count) for shards in hosts]
        shares = [one.batches(schedule, 0, 5, **each) for one in loaders]
        for want, *parts in zip(whole, *shares, strict=True):
            for name, rows in want.items():
                pieces = np.split(rows, count)
                for shards, part in zip(hosts, parts, strict=True):
                    np.testing.assert_array_equal(part[name], np.concatenate([pieces[i] for i in shards]), name)
    for settings in ({"threads": 0}, {"workers": 2}):
        one = loader.Loader(spec, "train", 64, seed=3, **settings)
        assert_equal(whole[2:], one.batches(schedule, 2, 5, **each))
    plain = loader.Loader(spec, "train", 64, seed=3).batches(schedule, 0, 5)
    assert_equal([{name: x for name, x in batch.items() if "teacher" not in name} for batch in whole], plain)


def test_nearly_all_tokens_have_a_place_and_a_chunk_in_a_plain_text(prepared, teacher_rows):
    (batch,) = loader.Loader(str(prepared), "train", 64).batches(schedule, 0, 1, retokenizers=[teacher_rows])
    there, targets = batch["segment_ids"] > 0, batch["weights"] > 0
    assert (batch["teacher_index"][there] >= 0).mean() > 0.95
    assert ((batch["teacher_chunks"] > 0) & targets).sum() > 0.9 * targets.sum()
    assert not batch["teacher_chunks"][~targets].any()
    both = zip(batch["segment_ids"], batch["teacher_segment_ids"], batch["teacher_index"], strict=True)
    for own, other, index in both:
        np.testing.assert_array_equal(own[index >= 0], other[index[index >= 0]], "documents stay apart")


@pytest.mark.parametrize(
    "asks, more",
    [
        ((), ""), (("index",), "index"), (("chunks",), "targets weights chunks own_chunks"),
        (("bytes",), "targets weights bytes"),
    ],
)  # fmt: skip
def test_no_more_is_made_than_is_asked_for(prepared, teacher_rows, asks, more):
    source = windows.Windows(str(prepared), "train", 64)
    rows = [source[i] for i in range(3)]
    whole = teacher_rows.rows(rows, 4, 64)
    part = dataclasses.replace(teacher_rows, asks=frozenset(asks)).rows(rows, 4, 64)
    assert part.keys() == {f"teacher_{name}" for name in f"tokens segment_ids positions {more}".split()}
    for name, value in part.items():
        np.testing.assert_array_equal(value, whole[name], name)
    text = bytes_of.load(teacher_rows.path).join(whole["teacher_targets"][whole["teacher_weights"] > 0])
    assert whole["teacher_bytes"].sum() == len(text) > 0


def test_what_is_measured_is_what_rows_are(prepared, kinds):
    source = windows.Windows(str(prepared), "train", 64)
    rows = [source[i] for i in range(8)]
    data = str(prepared / "tokenizer")
    found = retokenize.measure(rows, data, str(kinds["bytes"]))
    batch = Retokenizer("teacher", data, str(kinds["bytes"]), 999).rows(rows, 8, 64)
    counts = (batch["teacher_segment_ids"] > 0).sum(1)
    assert (found.longest, found.same, found.unknown) == (max(counts), 1.0, 0) and found.ratio > 0.5
    assert retokenize.measure(rows, data, str(kinds["lower"])).same < 1, "None and N are changed"


def test_tokens_that_are_no_bytes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json does not say which bytes its tokens are .it has WordPiece"):
        bytes_of.load(str(hub.write_words(tmp_path)))


def test_unknown_characters_and_added_tokens(tmp_path):
    vocab = {"[UNK]": 0, "\u2581": 1, "a": 2, "\u2581a": 3}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("\u2581", "a")], unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="never")
    model.add_tokens([tokenizers.AddedToken("<\u2581x>", normalized=False)])
    model.save(str(tmp_path / "tokenizer.json"))
    pieces = bytes_of.load(str(tmp_path))
    ids = pieces.tokenizer.encode("a a\u00e9<\u2581x>a")
    assert pieces.join(ids).decode() == "a a\ufffd<\u2581x>a" and pieces.unknown == 0 and not pieces.puts_space
    (record,) = records.cut([ids], len(ids))
    found = retokenize.measure([windows.window(record, 0, len(ids))], str(tmp_path), str(tmp_path))
    assert found.unknown == 1 and found.ratio == 1 and found.same == 1, "U+FFFD has no token either"
