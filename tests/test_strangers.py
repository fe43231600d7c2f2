"""Files that others wrote or damaged: whatever is in them, they are read or refused by one error, in bounded memory."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmboost import checkpoint, config, going_on
from lmboost.data import loader, records, windows
from lmboost.errors import UserError
from lmboost.hf import config_json, files, reader
from lmboost.models.model_config import ModelConfig
from lmboost.report.curves import load_run
from lmboost.run import goodput
from lmboost.search import log as search_log
from tests import harmed, hub

MEGABYTES = 64  # that a refusal may take; deep nesting is a megabyte long by itself
MODEL = dataclasses.asdict(ModelConfig(vocab_size=320, num_layers=2, d_model=32, num_heads=2, num_kv_heads=1))
CONFIG = json.loads(config.base().to_json())
ABOUT = {"model": MODEL, "data": {"tokenizer": "ab", "train": "cd"}, "config": CONFIG, "teacher": None}
POSITION = {"step": 2, "first_row": 16, "seq_len": 32, "seed": 0, "fingerprint": "ab", "fingerprints": {"params": "c"}}
SEARCH = {"config": {"search.params": "1K", "seed": 0}, "parent": {"directory": "x", "tokenizer": "a"}, "data": "cd"}
LINE = {"step": 4, "tokens": 40.0, "flops": 4e9, "loss": 3.0, "val_loss": 2.5, "val_perplexity": 9.0}
TIME = {"attempt": 1.5, "step": 4, "start_step": 0, "time": 9.0, "seconds": dict.fromkeys(goodput.KINDS, 1.0)}

fuzz = harmed.fuzz


@contextlib.contextmanager
def read_or_refused():
    """What is inside succeeds or raises a UserError, and takes little memory."""
    tracemalloc.start()
    try:
        yield
    except UserError as error:
        assert len(str(error)) < 3000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MEGABYTES << 20


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.slow
@fuzz
@given(harmed.files(ABOUT))
def test_the_manifest_of_a_checkpoint(tmp_path, content):
    (tmp_path / "params").mkdir(exist_ok=True)
    write(tmp_path / "manifest" / "metadata", content)
    with read_or_refused():
        saved = checkpoint.Saved.find(str(tmp_path))
        saved.model.num_params(), saved.data_or_own("x"), saved.tokenizer_fingerprint


@pytest.mark.slow
@fuzz
@given(harmed.files(ABOUT))
def test_the_manifest_of_a_run(tmp_path, content):
    write(tmp_path / "manifest.json", content)
    with read_or_refused():
        going_on.check_workdir(config.base(), str(tmp_path), {"train": "cd", "fingerprint": "ef"})


@fuzz
@given(harmed.files(POSITION))
def test_the_position_of_a_checkpoint(tmp_path, content):
    write(tmp_path / "position" / "metadata", content)
    with read_or_refused():
        checkpoint.read_json(tmp_path, "position")


@pytest.mark.slow
@fuzz
@given(harmed.files(SEARCH), st.booleans())
def test_the_files_of_a_search(tmp_path, content, lines_too):
    line = {"candidate": 0, "loss": 1.0, "params": 5, "cut": {"width": "0-3", "layers": []}}
    shutil.rmtree(tmp_path / "search", ignore_errors=True)
    write(tmp_path / "search" / "search.json", json.dumps(SEARCH).encode() if lines_too else content)
    write(tmp_path / "search" / "candidates.jsonl", (content if lines_too else json.dumps(line).encode()) + b"\n")
    with read_or_refused():
        search_log.Log(tmp_path / "search", SEARCH, 2)


@fuzz
@given(harmed.files(LINE), harmed.files(TIME))
def test_what_a_run_says_of_itself(tmp_path, line, time):
    write(tmp_path / "metrics.jsonl", json.dumps(LINE).encode() + b"\n" + line + b"\n")
    write(tmp_path / "goodput.jsonl", json.dumps(TIME).encode() + b"\n" + time + b"\n")
    with read_or_refused():
        load_run(str(tmp_path))


@pytest.fixture(scope="module")
def prepared(data):
    return pathlib.Path(data.partition("=")[2])


@pytest.mark.slow
@fuzz
@given(st.data())
def test_the_manifest_of_a_data_set(tmp_path, prepared, data):
    content = json.loads((prepared / "manifest.json").read_bytes())
    write(tmp_path / "data" / "manifest.json", data.draw(harmed.files(content)))
    for name in content["shards"].values():
        for shard in name:
            with contextlib.suppress(FileExistsError):
                (tmp_path / "data" / shard["file"]).symlink_to(prepared / shard["file"])
    with read_or_refused():
        loader.info(str(tmp_path / "data"), "train")
        rows = windows.Windows(str(tmp_path / "data"), "train", 32)
        rows[0], rows[len(rows) - 1]


RECORD = records.serialize(records.Record(np.arange(33, dtype=np.int32), np.array([0, 7, 20], np.int32), 33))


@fuzz
@given(st.integers(0, len(RECORD) - 1), st.integers(0, 255), st.integers(0, len(RECORD)))
def test_a_record(at, byte, end):
    raw = harmed.changed(RECORD, at, byte)
    try:
        record = records.parse(raw[:end] if end % 4 == 0 else raw)
    except Exception as error:  # the loader names the file, whatever it is
        assert not isinstance(error, MemoryError | RecursionError)
    else:
        assert 0 <= record.length <= record.tokens.size
        batch = windows.batch_of([windows.window(record, 0, 8)], 1, 8)
        assert set(batch) and batch["tokens"].shape == (1, 8)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub")
    hub.write(directory)
    return directory


@fuzz
@given(st.data())
def test_the_config_of_a_hub_directory(tmp_path, published, data):
    with contextlib.suppress(FileExistsError):
        (tmp_path / files.WEIGHTS).symlink_to(published / files.WEIGHTS)
    content = json.loads((published / "config.json").read_bytes())
    write(tmp_path / "config.json", data.draw(harmed.files(content)))
    with read_or_refused():
        config_json.read(tmp_path)
        reader.read_manifest(tmp_path)


@fuzz
@given(st.data())
def test_the_header_of_a_safetensors_file(tmp_path, published, data):
    raw = (published / files.WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = data.draw(harmed.files(json.loads(raw[8 : 8 + length])))
    told = data.draw(st.sampled_from([len(header), len(header), len(header), 2**63, 0, max(len(header) - 1, 0)]))
    write(tmp_path / "x.safetensors", told.to_bytes(8, "little") + header + raw[8 + length :])
    with read_or_refused():
        files.read_header(tmp_path / "x.safetensors")
