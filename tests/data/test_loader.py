"""Rows and batches: every target once, documents kept apart, and nothing but data, seed and step decides a batch."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lmboost.data import loader as loader_lib
from lmboost.data import records
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.data import windows as windows_lib
from lmboost.errors import UserError
from tests import runs

KEYS = {"tokens", "targets", "segment_ids", "positions", "weights"}


def growing(step):
    """A schedule whose batches grow at step 3."""
    return (4 * step, 4) if step < 3 else (12 + 8 * (step - 3), 8)


def constant(step):
    return 8 * step, 8


def rows_of(batch):
    """Hashable rows."""
    return [tuple(batch["tokens"][i].tolist()) for i in range(len(batch["tokens"]))]


def row_of(loader, i):
    """The training row with global number i."""
    return rows_of(windows_lib.batch_of([loader.rows[i]], 1, loader.seq_len))[0]


def assert_equal(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        assert one.keys() == two.keys() == KEYS
        for name in KEYS:
            assert one[name].dtype == two[name].dtype
            np.testing.assert_array_equal(one[name], two[name], name)


def test_records_are_examples_of_tfds():
    from tensorflow_datasets.proto import tf_example_pb2

    for starts in ([], [0, 4]):
        record = records.Record(np.arange(9, dtype=np.int32), np.array(starts, np.int32), 9)
        example = tf_example_pb2.Example.FromString(records.serialize(record))
        feature = example.features.feature
        assert np.frombuffer(feature["tokens"].bytes_list.value[0], "<i4").tolist() == list(range(9))
        assert (list(feature["doc_starts"].int64_list.value), feature["length"].int64_list.value[0]) == (starts, 9)
        assert example.SerializeToString(deterministic=True) == records.serialize(record)


@hypothesis.given(
    st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 9), st.integers(0, 5)
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_every_target_once_and_segments_within_documents(lengths, rows_per_record, seq_len, extra):
    """The token with id n is the n-th of the stream, so a batch tells where each of its cells came from."""
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(a, b, dtype=np.int32) + 1 for a, b in itertools.pairwise(starts)]
    made = list(records.cut(documents, rows_per_record * seq_len))
    for record in made:
        again = records.parse(records.serialize(record))
        np.testing.assert_array_equal(again.tokens, record.tokens)
        np.testing.assert_array_equal(again.doc_starts, record.doc_starts)
        assert again.length == record.length
    windows = [windows_lib.window(record, i * seq_len, seq_len) for record in made for i in range(rows_per_record)]
    batch = windows_lib.batch_of(windows, len(windows) + extra, seq_len)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    predicted = []
    for row in range(len(windows) + extra):
        tokens, targets, segments, positions, weights = (
            batch[name][row] for name in ("tokens", "targets", "segment_ids", "positions", "weights")
        )
        real = tokens > 0
        assert (segments > 0).tolist() == real.tolist()
        own = document_of[tokens[real] - 1]
        changes = np.flatnonzero(np.diff(own)) + 1
        np.testing.assert_array_equal(segments[real], 1 + np.cumsum(np.isin(np.arange(len(own)), changes)))
        expected = np.concatenate([np.arange(len(part)) for part in np.split(own, changes)] or [[]])
        np.testing.assert_array_equal(positions[real], expected)
        assert not positions[~real].any() and not weights[~real].any()
        for token, target, weight in zip(tokens, targets, weights, strict=True):
            same = token > 0 and target > 0 and document_of[token - 1] == document_of[target - 1]
            assert weight == float(same)
            assert not target or target == token + 1
        predicted += targets[weights > 0].tolist()
    firsts = set((starts[:-1] + 1).tolist())
    assert sorted(predicted) == [n for n in range(1, starts[-1] + 1) if n not in firsts]


def test_batch_is_what_the_step_reads(prepared):
    (batch,) = loader_lib.Loader(prepared_spec := str(prepared), "train", 64).batches(constant, 0, 1)
    assert batch.keys() == KEYS and all(value.shape == (8, 64) for value in batch.values())
    assert batch["weights"].dtype == np.float32
    assert all(batch[name].dtype == np.int32 for name in KEYS - {"weights"})
    assert loader_lib.info(prepared_spec).vocab_size > batch["tokens"].max()


@pytest.mark.parametrize("split", records.SPLITS)
@pytest.mark.parametrize("seq_len", [256, 32])
def test_evaluation_predicts_every_token_once(prepared, split, seq_len):
    loader = loader_lib.Loader(str(prepared), split, seq_len)
    batches = list(loader.eval_batches(8))
    assert sum(batch["weights"].sum() for batch in batches) == loader.info.tokens
    assert all(batch["tokens"].shape == (8, seq_len) for batch in batches)
    assert_equal(batches, loader_lib.Loader(str(prepared), split, seq_len, seed=9).eval_batches(8))
    assert_equal(batches[:2], loader.eval_batches(8, num_batches=2))
    assert_equal(batches, loader.eval_batches(8, num_batches=10**6))


def test_text_comes_back(prepared, texts):
    """A document that lies within one row reads as its text."""
    tokenizer = tokenizer_lib.load(loader_lib.info(str(prepared)).tokenizer_path)
    whole = 0
    for batch in loader_lib.Loader(str(prepared), "train", 256).eval_batches(4):
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                ids = tokens[segments == segment]
                if ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id:
                    assert tokenizer.decode(ids[1:-1]) in texts
                    whole += 1
    assert whole > 5


@pytest.mark.parametrize("hosts", [[(0,), (1,)], [(0, 1), (2, 3)], [(0, 3), (1, 2)], [(2,), (0,), (1,), (3,)]])
def test_hosts_share_the_global_batch(prepared, second, hosts):
    """Each reads its runs of rows, which need not be neighbours."""
    count = sum(map(len, hosts))

    def assemble(parts):
        for part in parts:
            pieces = {
                shard: {name: np.split(p[name], len(shards))[i] for name in KEYS}
                for p, shards in zip(part, hosts, strict=True)
                for i, shard in enumerate(shards)
            }
            yield {name: np.concatenate([pieces[shard][name] for shard in range(count)]) for name in KEYS}

    for spec in (str(prepared), f"{prepared}=0.7,{second}=0.3"):
        whole = list(loader_lib.Loader(spec, "train", 64, seed=3).batches(growing, 0, 6))
        shares = [loader_lib.Loader(spec, "train", 64, 3, shards, count) for shards in hosts]
        assert_equal(whole, assemble(zip(*(share.batches(growing, 0, 6) for share in shares), strict=True)))
        whole = loader_lib.Loader(spec, "train", 64).eval_batches(8)
        assert_equal(whole, assemble(zip(*(share.eval_batches(8) for share in shares), strict=True)))


def test_workers_and_threads_change_nothing(prepared):
    want = list(loader_lib.Loader(str(prepared), "train", 64, threads=0).batches(growing, 2, 12))
    for settings in ({"threads": 1}, {"threads": 16}, {"workers": 2, "threads": 3}):
        loader = loader_lib.Loader(str(prepared), "train", 64, **settings)
        assert_equal(want, loader.batches(growing, 2, 12))
    want = loader_lib.Loader(str(prepared), "validation", 64, threads=0).eval_batches(4)
    assert_equal(want, loader_lib.Loader(str(prepared), "validation", 64, workers=2, threads=0).eval_batches(4))


READ_ALL = """
import sys, time
from lmboost.data.loader import Loader
print(sum(len(batch["tokens"]) for batch in Loader(sys.argv[1], "train", 64, workers=1).eval_batches(4, 5)))
time.sleep(2)  # grain gives memory back in a thread
"""


def test_the_workers_memory_is_given_back(prepared):
    command = [sys.executable, "-c", READ_ALL, str(prepared)]
    found = subprocess.run(command, capture_output=True, text=True, env=runs.environment(1), timeout=120)
    assert (found.returncode, found.stdout.strip()) == (0, "20"), found.stderr
    assert "leaked" not in found.stderr, found.stderr


def test_a_restart_at_any_step_goes_on_as_if_nothing_had_been(prepared, second):
    loader = loader_lib.Loader(f"{prepared}=2,{second}=1", "train", 64, seed=7)
    whole = list(loader.batches(growing, 0, 8))
    for start in range(8):
        assert_equal(whole[start:], loader.batches(growing, start, 8))
    endless = loader.batches(growing, 5)
    assert_equal(whole[5:], itertools.islice(endless, 3))
    endless.close()
    rows = [row for batch in whole for row in rows_of(batch)]
    assert rows == [row_of(loader, i) for i in range(len(rows))]


def test_epochs_are_permutations_and_differ(prepared):
    loader = loader_lib.Loader(str(prepared), "train", 64, seed=0)
    count = len(loader.rows_in_order)
    stored = [rows_of(batch)[0] for batch in loader.eval_batches(1)]
    assert len(stored) == count
    epochs = [[row_of(loader, i) for i in range(epoch * count, (epoch + 1) * count)] for epoch in range(3)]
    neighbour = loader_lib.Loader(str(prepared), "train", 64, seed=1)
    other = [row_of(neighbour, i) for i in range(2 * count)]
    orders = [stored, *epochs, other[:count], other[count:]]
    assert all(sorted(order) == sorted(stored) for order in orders)
    assert all(one != two for one, two in itertools.combinations(orders, 2))  # nor does seed 1 follow a step behind


def test_mixture_draws_by_weight(prepared, second):
    both = loader_lib.Loader(f"{prepared}=0.75,{second}=0.25", "train", 64, seed=0)
    alone = [loader_lib.Loader(str(directory), "train", 64, seed=0) for directory in (prepared, second)]
    rows = [row_of(both, i) for i in range(400)]
    own = [{rows_of(batch)[0] for batch in each.eval_batches(1)} for each in alone]
    assert not own[0] & own[1]
    for stop in (40, 100, 400):
        assert abs(sum(row in own[0] for row in rows[:stop]) - 0.75 * stop) <= 1
    for each, mine in zip(alone, own, strict=True):  # within the mixture each data set keeps its own order
        drawn = [row for row in rows if row in mine]
        assert drawn == [row_of(each, i) for i in range(len(drawn))]
    rows = [row for batch in both.eval_batches(8) for row in rows_of(batch) if any(row)]
    assert len(rows) == len(set(rows))


def test_info(prepared, second):
    one, two = loader_lib.info(str(prepared)), loader_lib.info(str(second))
    manifest = records.read_manifest(prepared)
    assert one.fingerprint == manifest["fingerprint"] and one.directories == (str(prepared),)
    assert one.bytes_per_token == one.bytes / one.tokens
    assert one.tokenizer_fingerprint == tokenizer_lib.load(one.tokenizer_path).fingerprint == two.tokenizer_fingerprint
    assert (one.vocab_size, one.bos_id, one.eos_id, one.record_tokens) == (320, 1, 2, 256)
    mixed = loader_lib.info(f"{prepared}=3, {second}=1")
    assert mixed.weights == (0.75, 0.25) and mixed.record_tokens == 128 and mixed.tokens == one.tokens + two.tokens
    assert mixed.bytes_per_token == pytest.approx(0.75 * one.bytes_per_token + 0.25 * two.bytes_per_token)
    assert len({mixed.fingerprint, one.fingerprint, loader_lib.info(f"{prepared}=1,{second}=1").fingerprint}) == 3
    assert loader_lib.info(str(prepared), "validation").tokens == manifest["splits"]["validation"]["tokens"]
    assert json.dumps(dataclasses.asdict(mixed))


def test_bad_specs_and_arguments(tmp_path, prepared, second):
    for spec, message in [
        ("", "data is empty"),
        (str(tmp_path), "is not a prepared data set: no .*manifest.json"),
        (f"{prepared}=x,{second}=1", "is not DIR=WEIGHT with a weight above 0"),
        (f"{prepared},{second}", "is not DIR=WEIGHT"),
        (f"{prepared}=0,{second}=1", "with a weight above 0"),
    ]:
        with pytest.raises(UserError, match=message):
            loader_lib.info(spec)
    with pytest.raises(UserError, match=r"split='valid' is not known .did you mean 'validation'"):
        loader_lib.info(str(prepared), "valid")
    for arguments, message in [
        ({"seq_len": 100}, f"seq_len=100 does not divide the 256 tokens of a record of {prepared}"),
        (
            {"shards": (2,), "shard_count": 2},
            r"shards=\(2,\): expected ascending numbers from 0 to shard_count - 1 = 1",
        ),
        ({"shards": (1, 0), "shard_count": 2}, r"shards=\(1, 0\): expected ascending"),
        ({"workers": -1}, "workers=-1"),
    ]:
        with pytest.raises(UserError, match=message):
            loader_lib.Loader(str(prepared), "train", **{"seq_len": 64} | arguments)
    loader = loader_lib.Loader(str(prepared), "train", 64, shard_count=3)
    with pytest.raises(UserError, match=r"step 0 asks for rows 0 to 8 in 3 shards"):
        next(loader.batches(constant))
    with pytest.raises(UserError, match=r"batch_size=8: expected a positive multiple of the 3 shards"):
        next(loader.eval_batches(8))
    with pytest.raises(UserError, match=r"start_step=3, stop_step=2"):
        loader.batches(constant, 3, 2)


def test_unequal_tokenizers_do_not_mix(tmp_path, prepared, second):
    shutil.copytree(second, tmp_path / "other")
    manifest = json.loads((tmp_path / "other/manifest.json").read_text())
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest | {"tokenizer_fingerprint": "0"}))
    with pytest.raises(UserError, match=r"mixes tokenizers: .*other .320 pieces. was prepared with another one than"):
        loader_lib.info(f"{prepared}=1,{tmp_path / 'other'}=1")


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_shards_are_named(tmp_path, prepared, workers):
    shutil.copytree(prepared, tmp_path / "data")
    shard = tmp_path / "data" / records.shard_name("train", 1, 3)
    raw = bytearray(shard.read_bytes())
    shard.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=f"{shard.name} has {len(raw) // 2} bytes, expected {len(raw)}"):
        loader_lib.Loader(str(tmp_path / "data"), "train", 64, workers=workers)
    raw[2000:8000] = bytes(6000)
    shard.write_bytes(raw)
    loader = loader_lib.Loader(str(tmp_path / "data"), "train", 64, workers=workers)
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        list(loader.eval_batches(8))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        loader_lib.Loader(str(tmp_path / "data"), "train", 64, workers=workers)
    (tmp_path / "data/manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is not readable JSON"):
        loader_lib.info(str(tmp_path / "data"))
