"""The passes on Apache Beam: the bytes of the local ones, whatever the runner does and whenever it is killed."""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from lmboost.data import buckets, records, sources
from lmboost.data import prepare as prepare_lib
from lmboost.errors import UserError
from tests import gcs
from tests.compare import content

ROOT = pathlib.Path(__file__).parents[2]
TWO = "--direct_num_workers=2 --direct_running_mode=multi_processing"
beam = pytest.mark.skipif(not prepare_lib.has_beam(), reason='needs pip install -e ".[beam]"')


def on_beam(out, source, **arguments):
    lines = []
    prepare_lib.prepare(out, [source], **arguments, runner="DirectRunner", report=lines.append)
    return lines


def test_tallies_are_the_same_in_any_order_and_grouping():
    tallies = []
    for unit in range(6):
        tallies.append(buckets.tally())
        tallies[-1]["counts"]["train"] = unit
        tallies[-1]["named"]["empty"] = [[unit, f"{unit}.{i}"] for i in range(unit % 3)]
    whole = buckets.merged(tallies)
    assert whole["named"]["empty"] == [[1, "1.0"], [2, "2.0"], [2, "2.1"]] and whole["counts"]["train"] == 15
    for order in itertools.permutations(range(6)):
        halves = [buckets.merged(tallies[i] for i in order[:4]), buckets.merged(tallies[i] for i in order[4:])]
        assert buckets.merged(halves) == whole


@beam
def test_it_makes_what_the_local_passes_make(tmp_path, prepared, corpus, arguments):
    on_beam(tmp_path / "data", corpus, **arguments)
    assert content(tmp_path / "data") == content(prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


class Crash(Exception):
    pass


def crashing(function, number):
    """`function`, that dies instead of being called for the so-manieth time."""
    calls = iter(range(1, 1000))

    def call(*arguments):
        if next(calls) == number:
            raise Crash
        return function(*arguments)

    return call


@beam
def test_after_a_crash_in_either_pass_it_goes_on(tmp_path, prepared, corpus, arguments, monkeypatch):
    for module, name in ((records, "write_run"), (buckets, "make")):
        with monkeypatch.context() as patch, contextlib.suppress(Crash, RuntimeError):
            patch.setattr(module, name, crashing(getattr(module, name), 3))
            on_beam(tmp_path / "data", corpus, **arguments)
            pytest.fail("it has not crashed")
    assert len(list((tmp_path / "data.partial" / "shards").glob("*.json"))) == 2
    monkeypatch.setattr(sources, "read", lambda *_: pytest.fail("the first pass was done"))
    lines = on_beam(tmp_path / "data", corpus, **arguments)
    assert lines[0].startswith("continuing") and not any("read all parts" in line for line in lines)
    assert content(tmp_path / "data") == content(prepared)


@beam
@pytest.mark.slow
def test_two_worker_processes_that_are_killed_with_the_command(tmp_path, prepared, corpus):
    """What they have left, others go on with."""
    flags = ["--tokenizer=train:320", "--validation_fraction=0.1", "--record_tokens=256", "--shards=3"]
    command = [sys.executable, "-m", "lmboost.prepare", f"--source={corpus}", f"--out={tmp_path / 'data'}", *flags]
    command += ["--runner=DirectRunner", f"--beam_options={TWO}"]
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, start_new_session=True)
    until, done = time.monotonic() + 120, tmp_path / "data.partial" / "spread" / "done.json"
    while not done.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, **quiet, check=True)
    assert content(tmp_path / "data") == content(prepared)


@beam
def test_what_was_wrong_is_told_by_one_error(tmp_path, corpus, texts, write, arguments, capfd):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:30]) + "{")
    with pytest.raises(UserError, match=r"x.jsonl:31: not valid JSON"):
        on_beam(tmp_path / "data", str(tmp_path / "x.jsonl"), **arguments)
    assert "Traceback" not in "".join(capfd.readouterr())
    for flags, message in (
        ("--direct_num_workrs=2", r"--direct_num_workrs \(did you mean 'direct_num_workers'\?\) is no flag of"),
        ("--direct_num_workers=x", "can't be read: argument --direct_num_workers: invalid int value: 'x'"),
        ("'", "can't be read: No closing quotation"),
        ("x", "'x' is no flag of DirectRunner"),
        ("--runner=FlinkRunner", "names another runner than --runner=DirectRunner: leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            on_beam(tmp_path / "flags", corpus, **arguments, beam_options=flags)
    assert not (tmp_path / "flags.partial").exists()


@beam
def test_a_pipeline_that_is_ended_from_outside_is_not_taken_for_done(tmp_path, corpus, arguments, monkeypatch):
    from apache_beam.runners.portability.fn_api_runner import fn_runner

    monkeypatch.setattr(fn_runner.RunnerResult, "wait_until_finish", lambda _: "CANCELLED")
    with pytest.raises(UserError, match="DirectRunner has ended the pipeline as CANCELLED: run the same command again"):
        on_beam(tmp_path / "data", corpus, **arguments)
    assert not (tmp_path / "data.partial" / "spread" / "done.json").exists()


@beam
def test_what_was_begun_by_others_is_begun_anew(tmp_path, prepared, corpus, arguments, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib, "_assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_lib.prepare(tmp_path / "data", [corpus], **arguments, report=lambda _: None)
    assert any("the runner have changed" in line for line in on_beam(tmp_path / "data", corpus, **arguments))
    assert content(tmp_path / "data") == content(prepared)


@beam
@pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason='needs pip install -e ".[gcs]"')
def test_it_is_written_to_a_bucket(tmp_path, prepared, corpus, arguments, monkeypatch):
    with gcs.serve() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "gcs", json.loads(server.environment["FSSPEC_GCS"]))
        with monkeypatch.context() as patch:  # dies when the shards are there, but not all that belongs to them
            patch.setattr(records, "write_tfds_metadata", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                on_beam("gs://bucket/sets/data", corpus, **arguments)
        with pytest.raises(UserError, match="not a prepared data set.*gs://bucket/sets/data.partial exists"):
            records.read_manifest("gs://bucket/sets/data")
        on_beam("gs://bucket/sets/data", corpus, **arguments)
        found = {name.removeprefix("sets/data/"): raw for name, (raw, _) in server.objects.items()}
        for path in pathlib.Path(corpus).parent.iterdir():  # and sources are read from it
            server.put(f"texts/{path.name}", path.read_bytes(), {})
        again = prepare_lib.prepare(tmp_path / "x", ["gs://bucket/texts/*.txt"], **arguments, report=lambda _: None)
    assert again["fingerprint"] == records.read_manifest(prepared)["fingerprint"]
    assert {name: raw for name, raw in found.items() if raw} == content(prepared)


def test_places_and_flags_that_do_not_go_together(tmp_path, corpus, arguments, monkeypatch):
    def refused(message, out=tmp_path / "data", **flags):
        with pytest.raises(UserError, match=message):
            prepare_lib.prepare(out, [corpus], **arguments, **flags)

    refused(r"runner='FlinkRuner' is not known \(did you mean 'FlinkRunner'", runner="FlinkRuner")
    refused("DataflowRunner's workers do not see this machine's disk: give a gs:// name", runner="DataflowRunner")
    refused("beam_options='--a' are a --runner's, and none is given", beam_options="--a")
    refused(r"out='gs://bucket/x': expected a local directory", "gs://bucket/x")
    monkeypatch.setattr(prepare_lib, "has_beam", lambda: False)
    refused(r'needs the package apache-beam: pip install "lmboost\[beam\]"', runner="SparkRunner")
    command = [sys.executable, "-m", "lmboost.prepare", "--source=x", "--tokenizer=train:320", "--out=x"]
    ended = subprocess.run([*command, "--runner=SparkRunner", "--workers=2"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "workers=2 are of this machine: leave it out" in ended.stderr
    assert not list(tmp_path.iterdir())
