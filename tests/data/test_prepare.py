"""Preparation: nothing lost, nothing twice, the same content whatever happens on the way."""

import errno
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers

from lmboost.data import buckets, local, records, unfinished
from lmboost.data import prepare as prepare_lib
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError
from tests.compare import content
from tests.runs import is_alive

ROOT = pathlib.Path(__file__).parents[2]


def quiet(out, *sources, **arguments):
    return prepare_lib.prepare(out, list(sources), **arguments, report=lambda line: None)


def streams(directory, split):
    """The token stream and the document starts of each shard, put together from its records."""
    from array_record.python import array_record_module

    manifest = records.read_manifest(directory)
    for shard in manifest["shards"][split]:
        reader = array_record_module.ArrayRecordReader(str(directory / shard.file))
        parts = [records.parse(raw) for raw in reader.read_all()]
        assert len(parts) == shard.records
        size = manifest["record_tokens"]
        for part, following in itertools.pairwise(parts):
            assert part.length == size + 1 and part.tokens[-1] == following.tokens[0]
        tokens = [part.tokens[: part.length] for part in parts]
        stream = np.concatenate([tokens[0], *(each[1:] for each in tokens[1:])])
        starts = sorted({i * size + start for i, part in enumerate(parts) for start in part.doc_starts.tolist()})
        yield stream, starts


def documents(directory, split):
    return [np.split(stream, starts[1:]) for stream, starts in streams(directory, split)]


def test_every_document_is_there_once_and_whole(prepared, texts):
    tokenizer = tokenizer_lib.load(prepared / "tokenizer")
    manifest = records.read_manifest(prepared)
    found = {}
    for split in records.SPLITS:
        tokens = [document for shard in documents(prepared, split) for document in shard]
        assert all(each[0] == tokenizer.bos_id and each[-1] == tokenizer.eos_id for each in tokens)
        found[split] = [tokenizer.decode(each[1:-1]) for each in tokens]
        assert manifest["splits"][split] == {
            "documents": len(tokens),
            "tokens": sum(len(each) - 1 for each in tokens),
            "bytes": sum(len(text.encode()) for text in found[split]),
            "records": sum(shard.records for shard in manifest["shards"][split]),
        }
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert not set(found["train"]) & set(found["validation"])
    assert 2 <= len(found["validation"]) <= 30  # a tenth of 120
    assert found["train"] != sorted(found["train"])


def test_content_depends_on_documents_and_arguments_only(tmp_path, prepared, corpus, texts, write, arguments):
    want = records.read_manifest(prepared)["fingerprint"]
    assert quiet(tmp_path / "workers", corpus, **arguments, workers=2)["fingerprint"] == want
    assert content(tmp_path / "workers") == content(prepared)
    names = random.Random(1).sample(range(len(texts)), len(texts))
    renamed = write(tmp_path / "renamed", texts, names)
    assert quiet(tmp_path / "order", renamed, **arguments)["fingerprint"] == want
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert quiet(tmp_path / "format", str(tmp_path / "x.jsonl"), **arguments)["fingerprint"] == want
    assert quiet(tmp_path / "seed", corpus, **arguments | {"seed": 1})["fingerprint"] != want
    assert len(texts) == sum(counts["documents"] for counts in records.read_manifest(prepared)["splits"].values())


def test_memory_bound_changes_nothing(tmp_path, prepared, corpus, arguments, monkeypatch):
    monkeypatch.setattr(local, "_RUN_BYTES", 5_000)
    monkeypatch.setattr(buckets, "_BATCH_BYTES", 3_000)
    monkeypatch.setattr(prepare_lib.sources, "_UNIT_FILES", 17)
    quiet(tmp_path / "data", corpus, **arguments)
    assert content(tmp_path / "data") == content(prepared)


class Crash(BaseException):
    pass


def test_a_stop_at_any_commit_continues_to_the_same_content(tmp_path, prepared, corpus, arguments, monkeypatch):
    """Dies before, then after, each rename in turn; every rename is a place where state is kept."""
    out, survived = tmp_path / "data", 0
    for when in ("before", "after"):
        for number in range(1, 1000):
            calls = 0

            def crashing(rename, when=when, number=number):
                def call(*paths):
                    nonlocal calls
                    calls += 1
                    if calls == number and when == "before":
                        raise Crash
                    rename(*paths)
                    if calls == number:
                        raise Crash

                return call

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", crashing(os.replace))
                patch.setattr(os, "rename", crashing(os.rename))
                try:
                    quiet(out, corpus, **arguments)
                except Crash:
                    pass
                else:
                    break
            assert not out.exists() or content(out) == content(prepared)  # whole or not there
            quiet(out, corpus, **arguments)
            assert content(out) == content(prepared) and not (tmp_path / "data.partial").exists()
            shutil.rmtree(out)
            survived += 1
        shutil.rmtree(out)
    assert survived > 20


def command(out, source, *flags):
    return [sys.executable, "-m", "lmboost.prepare", f"--source={source}", f"--out={out}", *flags]


def verb(out, source, *flags):
    return subprocess.run(command(out, source, *flags), cwd=ROOT, capture_output=True, text=True, check=False)


FLAGS = ["--tokenizer=train:320", "--validation_fraction=0.1", "--record_tokens=256", "--shards=3"]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, prepared, corpus):
    draw = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            command(tmp_path / "data", corpus, *FLAGS, "--workers=2"),
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draw.uniform(0.6, 2.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last = verb(tmp_path / "data", corpus, *FLAGS, "--workers=2")
    assert last.returncode == 0, last.stderr
    assert content(tmp_path / "data") == content(prepared)


def test_verb_says_what_it_did_and_what_is_wrong(tmp_path, prepared, corpus):
    again = verb(prepared, corpus, *FLAGS)
    assert again.returncode == 0 and "already prepared with these arguments" in again.stdout
    assert "train:" in again.stdout and "per token" in again.stdout
    wrong = verb(tmp_path / "x", "nothing/*.txt", *FLAGS)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: source='nothing/*.txt' matches no file")
    assert "Traceback" not in wrong.stderr and not list(tmp_path.iterdir())


def test_tfds_opens_it_without_tensorflow(prepared):
    program = """
import sys
import numpy as np
import tensorflow_datasets as tfds
splits = tfds.builder_from_directory(sys.argv[1]).as_data_source()
for split in ("train", "validation"):
    for record in splits[split]:
        assert record["tokens"].dtype == np.int32 and record["tokens"].shape == (257,)
        assert record["doc_starts"].dtype == np.int32 and 2 <= record["length"] <= 257
    print(split, len(splits[split]))
assert "tensorflow" not in sys.modules
"""
    seen = subprocess.run([sys.executable, "-c", program, str(prepared)], capture_output=True, text=True, check=True)
    counts = records.read_manifest(prepared)["splits"]
    assert seen.stdout.split() == [
        "train", str(counts["train"]["records"]), "validation", str(counts["validation"]["records"])
    ]  # fmt: skip


def test_equal_documents_fall_in_one_split_and_the_split_stands(tmp_path, texts, write, arguments, prepared):
    twice = quiet(tmp_path / "data", write(tmp_path / "twice", texts + texts), **arguments | {"seed": 5, "shards": 1})
    once = records.read_manifest(prepared)
    for split in records.SPLITS:
        assert twice["splits"][split]["documents"] == 2 * once["splits"][split]["documents"]


def test_tokenizers_with_one_special_or_none(tmp_path, corpus, arguments):
    for specials, first, last in ((["</s>"], False, True), (["<s>"], True, False), (["<|endoftext|>"], True, True)):
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, specials[0]: 1}, unk_token="?"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        path = tmp_path / specials[0].strip("</|>") / str(len(specials[0])) / "tokenizer.json"
        path.parent.mkdir(parents=True)
        model.save(str(path))
        out = path.parent / "data"
        manifest = quiet(out, corpus, **arguments | {"tokenizer": str(path)})
        assert manifest["vocab_size"] == 2
        for shard in documents(out, "train"):
            for document in shard:
                assert (document[0] == 1, document[-1] == 1) == (first, last) and not document[1:-1].any()
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"neither a begin nor an end token"):
        quiet(tmp_path / "none", corpus, **arguments | {"tokenizer": str(tmp_path)})


def test_finished_and_unfinished_work_with_other_arguments(tmp_path, prepared, corpus, arguments, monkeypatch):
    before = content(prepared)
    with pytest.raises(UserError, match=r"made with other arguments \(record_tokens=256, now 512\): choose another"):
        quiet(prepared, corpus, **arguments | {"record_tokens": 512})
    assert content(prepared) == before

    def full(*args):
        raise RuntimeError("write() failed: No space left on device; writing x")

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_shard", full)
        with pytest.raises(UserError, match=r"no space left for .*data.partial: free some and run the same command"):
            quiet(tmp_path / "data", corpus, **arguments)
    with pytest.raises(UserError, match=r"data.partial was made with other arguments \(seed=0, now 1\): repeat those"):
        quiet(tmp_path / "data", corpus, **arguments | {"seed": 1})
    with pytest.raises(UserError, match=r"not a prepared data set.* Preparation has not finished"):
        records.read_manifest(tmp_path / "data")
    quiet(tmp_path / "data", corpus, **arguments)
    assert content(tmp_path / "data") == before


def test_a_changed_source_starts_over(tmp_path, texts, write, arguments, monkeypatch):
    source = write(tmp_path / "texts", texts[:60])
    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib, "_assemble", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quiet(tmp_path / "data", source, **arguments)
    write(tmp_path / "texts", texts)
    lines = []
    manifest = prepare_lib.prepare(tmp_path / "data", [source], **arguments, report=lines.append)
    assert any("starting over" in line for line in lines)
    assert sum(counts["documents"] for counts in manifest["splits"].values()) == len(texts)


def test_a_place_is_made_anew_with_another_tokenizer(tmp_path, corpus, arguments, prepared):
    quiet(tmp_path / "data", corpus, **arguments | {"tokenizer": "train:330"})
    shutil.rmtree(tmp_path / "data")
    quiet(tmp_path / "data", corpus, **arguments)
    assert content(tmp_path / "data") == content(prepared)


def test_two_runs_at_once(tmp_path, corpus, arguments):
    with unfinished.locked(tmp_path / "data.partial"), pytest.raises(UserError, match=r"data.partial is in use"):
        quiet(tmp_path / "data", corpus, **arguments)


def test_invalid_and_empty_documents_are_counted_and_named(tmp_path, texts, write, arguments):
    source = write(tmp_path / "texts", texts[:60])
    (tmp_path / "texts/zz_invalid.txt").write_bytes(b"caf\xe9 " * 40)
    (tmp_path / "texts/zz_empty.txt").write_bytes(b"")
    problems = quiet(tmp_path / "data", source, **arguments)["problems"]
    assert problems["invalid"] == {"documents": 1, "first": [str(tmp_path / "texts/zz_invalid.txt")]}
    assert problems["empty"] == {"documents": 1, "first": [str(tmp_path / "texts/zz_empty.txt")]}
    with pytest.raises(UserError, match=r"zz_invalid.txt: not valid UTF-8. Mend or exclude it, or leave out --strict"):
        quiet(tmp_path / "strict", source, **arguments, strict=True)


def test_errors_in_worker_processes_arrive(tmp_path, texts, arguments):
    for i in range(2):
        (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:30]) + "{")
    with pytest.raises(UserError, match=r"[01].jsonl:31: not valid JSON"):
        quiet(tmp_path / "data", f"{tmp_path}/*.jsonl", **arguments, workers=2)


def test_bad_arguments(tmp_path, corpus, write, arguments):
    for change, message in [
        ({"tokenizer": "train:many"}, "tokenizer='train:many': expected train:SIZE"),
        ({"tokenizer": "no/such.model"}, "tokenizer=no/such.model: no such file"),
        ({"validation_fraction": 1.5}, "validation_fraction=1.5: expected a number between 0 and 1"),
        ({"validation_fraction": 1e-9}, "none of the 120 documents falls in the validation split. Raise"),
        ({"validation_fraction": 1 - 1e-9}, "none of the 120 documents falls in the train split. Lower"),
        ({"record_tokens": 1}, "record_tokens=1: expected at least 2"),
        ({"workers": 0}, "workers=0: expected at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            quiet(tmp_path / "data", corpus, **arguments | change)
        assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"every document is empty"):
        quiet(tmp_path / "data", write(tmp_path / "empty", ["", ""]), **arguments)
    with pytest.raises(UserError, match=r"gs://bucket/data.*expected a local directory"):
        quiet("gs://bucket/data", corpus, **arguments)
    with pytest.raises(UserError, match=r"empty/00000.txt/data.partial can't be written: Not a directory"):
        quiet(tmp_path / "empty/00000.txt/data", corpus, **arguments)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is not a prepared data set"):
        quiet(tmp_path / "other", corpus, **arguments)


def test_a_full_disk_is_told_by_its_error(tmp_path):
    for error in (OSError(28, "No space left on device"), RuntimeError("x: Disk quota exceeded")):
        with pytest.raises(UserError, match="no space left"), records.disk_errors(tmp_path):
            raise error
    with pytest.raises(RuntimeError, match="^another$"), records.disk_errors(tmp_path):
        raise RuntimeError("another")


def texts_of(directory, split):
    tokenizer = tokenizer_lib.load(directory / "tokenizer")
    return [tokenizer.decode(each[1:-1]) for shard in documents(directory, split) for each in shard]


def test_of_one_text_the_end_is_the_validation_split(tmp_path, texts):
    (tmp_path / "book.txt").write_text("\n".join(texts))
    said = []
    prepare_lib.prepare(
        tmp_path / "data", [str(tmp_path / "book.txt")], "train:320", validation_fraction=0.2, record_tokens=64,
        report=said.append,
    )  # fmt: skip
    assert any("book.txt is one text: its last 20.0% are the validation split" in line for line in said)
    (begin,), (end,) = texts_of(tmp_path / "data", "train"), texts_of(tmp_path / "data", "validation")
    assert begin + end == "\n".join(texts) and begin.endswith("\n")
    assert len(end) / len(begin + end) == pytest.approx(0.2, abs=0.03)


def test_the_validation_split_can_have_a_source_of_its_own(tmp_path, texts):
    for name, part in (("train", texts[:40]), ("valid", texts[40:60])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    flags = {"tokenizer": "train:320", "record_tokens": 64, "validation_source": [str(tmp_path / "valid.jsonl")]}
    quiet(tmp_path / "data", str(tmp_path / "train.jsonl"), **flags)
    assert sorted(texts_of(tmp_path / "data", "train")) == sorted(texts[:40])
    assert sorted(texts_of(tmp_path / "data", "validation")) == sorted(texts[40:60])
    with pytest.raises(UserError, match="made with other arguments .validation_source="):
        quiet(tmp_path / "data", str(tmp_path / "train.jsonl"), **flags | {"validation_source": ["other"]})


def test_a_link_to_an_empty_directory_is_filled_and_a_mount_refused_before_the_work(
    tmp_path, corpus, arguments, prepared, monkeypatch
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    quiet(tmp_path / "link", corpus, **arguments)
    assert content(tmp_path / "real") == content(prepared) and (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}
    (tmp_path / "mount").mkdir()
    rename = os.rename

    def busy(old, new):
        if pathlib.Path(old).name == "mount":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), old)
        rename(old, new)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(prepare_lib.sources, "find", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=r"mount' is a mount point: name a directory inside it"):
        quiet(tmp_path / "mount", corpus, **arguments)


@pytest.mark.parametrize("name", ["notes.txt", "out/notes.txt", "spread/notes.txt"])
def test_what_the_user_has_in_the_place_of_unfinished_work_stays(tmp_path, corpus, arguments, name):
    mine = tmp_path / "data.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=rf"data.partial holds '{name.split('/')[0]}', which is not prepare's"):
        quiet(tmp_path / "data", corpus, **arguments)
    assert mine.read_text() == "mine"


def test_unfinished_work_whose_files_are_no_json_is_named(tmp_path, corpus, arguments):
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "plan.json").write_text("")
    with pytest.raises(UserError, match=r"plan.json is not readable JSON.*Remove .*data.partial to start over"):
        quiet(tmp_path / "data", corpus, **arguments)


def wait_for_ever():
    time.sleep(600)


def begin_and_wait(connection):
    """A parent that has a worker as `prepare` has, and tells its process id."""
    worker = multiprocessing.get_context("spawn").Process(target=_worker)
    worker.start()
    connection.send(worker.pid)
    worker.join()


def _worker():
    local._begin_worker()
    wait_for_ever()


def test_workers_end_with_a_parent_that_is_killed():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    parent = context.Process(target=begin_and_wait, args=(there,))
    parent.start()
    worker = here.recv()
    parent.kill()
    parent.join()
    until = time.monotonic() + 30
    while is_alive(worker):
        assert time.monotonic() < until, "the worker has outlived its parent"
        time.sleep(0.1)
