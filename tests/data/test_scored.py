"""What helpers have said of rows: as it was written, beside the rows that it was said of, or one clear error."""

import dataclasses
import json
import os
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmboost.data import loader, records, scored
from lmboost.data.rows import Rows
from lmboost.data.scored import Parts, Reach, Scored, Selection, SoftLabels, State
from lmboost.data.scoring import Unfinished, opened
from lmboost.errors import UserError

T = 64
DRAWS = Parts(T, SoftLabels("draws", 7, 1.0, 320, 7), True, Selection(10, "drop"), (State(2, 9, 4), State(3, 9, 9)))


@st.composite
def parts_and_row(draw):
    """Parts of any kind, and a row of them."""
    length, kind = draw(st.integers(1, 5)), draw(st.sampled_from([None, *scored.KINDS]))
    slots, vocab = draw(st.integers(1, 6)), draw(st.sampled_from([300, 100_000]))
    labels = kind and SoftLabels(kind, 9, 1.0, vocab, slots)
    states = tuple(State(layer, 8, kept) for layer, kept in enumerate(draw(st.lists(st.integers(1, 8), max_size=2))))
    selection = Selection(3, "zero") if draw(st.booleans()) else None
    parts = Parts(length, labels, draw(st.booleans()), selection, states)
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    row = {
        name: (rng.normal(size=x.shape[1:]) * 50).astype(x.dtype) if x.dtype.kind == "f"
        else rng.integers(0, 100, x.shape[1:]).astype(x.dtype)
        for name, x in parts.like(1).items()
    }  # fmt: skip
    if kind == "draws":  # what was not drawn comes last
        there = np.sort(rng.random((length, slots)) < 0.5, axis=-1)[:, ::-1]
        row["soft_values"] = np.where(there, rng.integers(1, 99, (length, slots)), 0).astype(np.uint8)
        row["soft_ids"] = np.where(there, row["soft_ids"], 0)
    return parts, row


@hypothesis.given(parts_and_row())
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_row_is_read_as_it_was_written(drawn):
    parts, row = drawn
    for group in parts.groups():
        found = scored.unpack(parts, group, scored.pack(parts, group, row))
        assert found.keys() == parts.like(1, [group]).keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, row[name], name)
            assert value.dtype == row[name].dtype


@hypothesis.given(parts_and_row(), st.binary(max_size=300), st.booleans())
@hypothesis.settings(deadline=None, max_examples=200)
def test_bytes_that_are_no_row_are_an_error(drawn, raw, shorter):
    parts, row = drawn
    for group in parts.groups():
        packed = scored.pack(parts, group, row)
        for wrong in (packed[:-1] if shorter else packed + b"x", raw):
            try:
                found = scored.unpack(parts, group, wrong)
            except ValueError:
                continue
            assert wrong == raw
            assert {n: x.shape for n, x in found.items()} == {n: x.shape[1:] for n, x in parts.like(1, [group]).items()}


def said_of(row: int, seed: int) -> dict[str, np.ndarray]:
    """What a helper might have said of a row: numbers that tell which one it is."""
    found = {name: np.full(x.shape[1:], (row + seed) % 100, x.dtype) for name, x in DRAWS.like(1).items()}
    found["soft_values"][..., 1 + row % 5 :] = 0
    return found


def write(out, spec, reach=None, parts=DRAWS, asked=None, until=None):
    """Writes `out` of the rows of `spec`; breaks off after `until` shards."""
    with opened(str(out), asked or {"spec": str(spec)}, parts) as unfinished:
        return write_shards(unfinished, loader.Loader(str(spec), "train", T, 5), reach, parts, until)


def write_shards(unfinished, source, reach, parts, until):
    fingerprints = source.info.fingerprints
    first = reach and dict(zip(fingerprints, source.first_rows(reach.rows), strict=True))
    written = 0
    for number, (fingerprint, windows) in enumerate(zip(fingerprints, source.sources, strict=True)):
        for shard, span in enumerate(windows.shards()):
            if unfinished.is_done(fingerprint, shard):
                continue
            if written == until:
                return None
            every = np.arange(*span, dtype=np.uint32)
            states = every if reach is None else np.intersect1d(first[fingerprint], every)
            wanted = {"labels": every, "states": states}
            unfinished.write(fingerprint, shard, wanted, ((row, said_of(int(row), number)) for row in every))
            written += 1
    for state in parts.states:
        if state.kept < state.width:
            unfinished.write_basis(state.layer, np.eye(state.width, state.kept, dtype=np.float32))
    counts = {f: len(w.shards()) for f, w in zip(fingerprints, source.sources, strict=True)}
    about = {"tokenizer": source.info.tokenizer_fingerprint, "teacher": None, "scorer": None}
    rows, within = {"labels": None, "states": first}, {"labels": None, "states": reach}
    return unfinished.finish(counts, rows, within, about, 2.0)


@pytest.mark.slow
def test_answers_come_with_the_rows_that_they_are_of(tmp_path, prepared, second):
    """A mixture, several epochs of it, three shards a batch, in threads and in processes."""
    spec = f"{prepared}=0.75,{second}=0.25"
    write(tmp_path / "said", spec)
    known, plain = Scored.find(str(tmp_path / "said")), loader.Loader(spec, "train", T, 5)
    assert known.parts.labels.slots == 5  # that were needed, of 7
    place = {}
    for number, source in enumerate(plain.sources):
        place |= {source[row].tokens.tobytes(): (number, row) for row in range(len(source))}
    rows = Rows(12, candidates=1, selecting=())
    steps = 2 * sum(map(len, plain.sources)) // 12
    for workers in (0, 2):
        found = loader.Loader(spec, "train", T, 5, (1,), 3, workers=workers).batches(
            rows, 0, steps, known, scored.GROUPS
        )
        for batch, step in zip(found, range(steps), strict=True):
            assert batch.keys() == {*known.parts.like(1), "tokens", "targets", "segment_ids", "positions", "weights"}
            for i in range(4):
                number, row = place[plain.rows[12 * step + 4 + i].tokens.tobytes()]
                expected = said_of(row, number)
                for name, value in known.parts.like(1).items():
                    want = expected[name][..., :5] if name.startswith("soft") and value.ndim == 3 else expected[name]
                    want = np.where(expected["soft_values"][..., :5] > 0, want, 0) if name == "soft_ids" else want
                    np.testing.assert_array_equal(batch[name][i], want, name)


def test_only_some_rows(tmp_path, prepared):
    """States of the first rows of an order alone, and of none beyond."""
    info = loader.info(str(prepared))
    manifest = write(tmp_path / "said", prepared, Reach(info.fingerprint, 5, 24))
    known = Scored.find(str(tmp_path / "said"))
    assert manifest["tokens"] == T * len(loader.Loader(str(prepared), "train", T).sources[0])
    assert known.reach["states"] == Reach(info.fingerprint, 5, 24) and known.reach["labels"] is None
    data, rows = loader.Loader(str(prepared), "train", T, 5), Rows(8, candidates=1, selecting=())
    for groups, steps in ((["labels"], 6), (["labels", "states"], 3)):
        assert len(list(data.batches(rows, 0, steps, known, groups))) == steps
    with pytest.raises(UserError, match=r"has no states of row \d+: it was made for fewer rows .* larger --until"):
        list(data.batches(rows, 0, 6, known, ["states"]))


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def stop(*_):
    raise KeyboardInterrupt


def test_what_was_broken_off_goes_on_and_is_the_same(tmp_path, prepared, monkeypatch):
    asked = {"spec": "x"}
    write(tmp_path / "whole", prepared, asked=asked)
    for until in (0, 1, 1):
        assert write(tmp_path / "parts", prepared, asked=asked, until=until) is None
    with pytest.raises(UserError, match=r"parts.partial was made with other arguments \(spec differ\): repeat those"):
        write(tmp_path / "parts", prepared, asked={"spec": "y"})
    with pytest.raises(UserError, match=r"Scoring has not finished: .*parts.partial exists, run its command again"):
        Scored.find(str(tmp_path / "parts"))
    write(tmp_path / "parts", prepared, asked=asked)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert not (tmp_path / "parts.partial").exists()
    with opened(str(tmp_path / "parts"), asked, DRAWS) as found:
        assert found.is_finished
    for at in ("rename", "clear"):  # killed before the result is in its place, and before it is cleared up
        with monkeypatch.context() as patch:
            patch.setattr(*((os, "rename", stop) if at == "rename" else (Unfinished, "clear", stop)))
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / at, prepared, asked=asked)
        if at == "rename":
            write(tmp_path / at, prepared, asked=asked)
        else:
            with opened(str(tmp_path / at), asked, DRAWS) as found:
                assert found.is_finished
        assert contents(tmp_path / at) == contents(tmp_path / "whole")
    with pytest.raises(UserError, match=r"parts was made with other arguments \(spec differ\)"):
        write(tmp_path / "parts", prepared, asked={"spec": "y"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"full exists and is not empty"):
        write(tmp_path / "full", prepared)
    with opened(str(tmp_path / "held"), asked, DRAWS):
        with pytest.raises(UserError, match=r"held.partial is in use by another run of score"):
            write(tmp_path / "held", prepared, asked=asked)
    (tmp_path / "held.partial" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"held.partial holds 'mine.txt', which is not score's"):
        write(tmp_path / "held", prepared, asked=asked)


@pytest.fixture(scope="module")
def said(tmp_path_factory, prepared):
    out = tmp_path_factory.mktemp("said") / "said"
    write(out, prepared)
    return out


def test_what_is_not_of_these_data_is_refused(said, prepared, second):
    known, info, other = Scored.find(str(said)), loader.info(str(prepared)), loader.info(str(second))
    known.check_data(info.fingerprints, info.tokenizer_fingerprint, T)
    where = r"teacher.targets='.*said'"
    with pytest.raises(UserError, match=rf"{where} was made with another tokenizer \(fingerprint"):
        known.check_data(info.fingerprints, "0123", T)
    with pytest.raises(UserError, match=rf"{where} is of rows of 64 tokens, but seq_len=128"):
        known.check_data(info.fingerprints, info.tokenizer_fingerprint, 128)
    with pytest.raises(UserError, match=rf"{where} is of other data \(fingerprints .*\) than those of data.train"):
        known.check_data(other.fingerprints, info.tokenizer_fingerprint, T)
    with pytest.raises(UserError, match=r"teacher.targets='.*' was not made by lmboost.score: there is no .*manifest"):
        Scored.find(str(prepared.parent))
    with pytest.raises(UserError, match=r"teacher.targets='gs://bucket/said': expected a directory; mount the bucket"):
        Scored.find("gs://bucket/said")
    with pytest.raises(UserError, match=r"--out='gs://bucket/said': expected a directory"):
        write("gs://bucket/said", prepared)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda d: next(d.glob("*/labels-00001*")).unlink(), r"labels-00001.array_record is missing: copy"),
        (lambda d: cut(next(d.glob("*/labels-00001*"))), r"labels-00001.array_record has \d+ bytes, expected \d+"),
        (lambda d: change(d, parts={"seq_len": 64, "labels": {"kind": "drawn"}}), r"manifest.json: parts: labels: "),
        (lambda d: change(d, format=2), r"has format 2, this version reads 1: score again"),
        (lambda d: change(d, data=3), r"manifest.json: data is 3, expected an object"),
        (lambda d: garble(next(d.glob("*/states-00000*"))), r"what is known of row \d+ is damaged \(.*copy it again"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, said, prepared, harm, message):
    shutil.copytree(said, tmp_path / "said")
    harm(tmp_path / "said")
    with pytest.raises(UserError, match=message):
        known = Scored.find(str(tmp_path / "said"))
        answers = known.answers(loader.info(str(prepared)).fingerprints[0], scored.GROUPS)
        for row in range(len(loader.Loader(str(prepared), "train", T).sources[0])):
            answers[row]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def garble(path):
    raw = bytearray(path.read_bytes())
    raw[200:60_000] = bytes(len(raw[200:60_000]))
    path.write_bytes(raw)


def change(directory, **fields):
    path = directory / scored.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("parts", [DRAWS, Parts(8, loss=True)])
def test_parts_are_read_as_they_were_written(tmp_path, parts):
    records.write_json(tmp_path / "parts.json", dataclasses.asdict(parts))
    assert Parts.of_json(json.loads((tmp_path / "parts.json").read_text()), "x") == parts
