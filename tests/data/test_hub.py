"""Corpora by name: the files of one commit, their licence in the manifest, one error for what is not there."""

import gzip
import json
import os
import pathlib
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lmboost.data import hub, records
from lmboost.data import prepare as prepare_lib
from lmboost.errors import UserError
from tests import datasets_hub

ROOT = pathlib.Path(__file__).parents[2]
CARD = """---
license: odc-by
configs:
- config_name: en
  default: true
  data_files: [{split: train, path: en/*.json.gz}, {split: validation, path: valid.json}]
- config_name: rows
  data_files: en/*.parquet
- config_name: odd
  data_files: other/*.csv
---
"""
# What the Hub's libraries read of their environment they read once, so another process asks.
PROGRAM = """
import json, sys
from lmboost.data import prepare
from lmboost.errors import UserError

def ask(out, sources, flags):
    try:
        prepare.prepare(out, sources, **flags, report=lambda line: None)
    except UserError as error:
        return str(error)

print(json.dumps([ask(*arguments) for arguments in json.load(sys.stdin)]))
"""


def ask(environment, *arguments):
    """What `prepare` says of each of these arguments."""
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(arguments), env=os.environ | environment, cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def write_repository(directory, texts):
    """Half of the texts in each of two files of lines, ten of them in another one, and all in Parquet."""
    (directory / "en").mkdir(parents=True)
    (directory / "other").mkdir()
    (directory / "README.md").write_text(CARD)
    (directory / "other" / "x.csv").write_text("text\nx\n")
    for i in range(2):
        lines = "".join(json.dumps({"url": "x", "text": text}) + "\n" for text in texts[i::2])
        (directory / "en" / f"{i}.json.gz").write_bytes(gzip.compress(lines.encode()))
    (directory / "valid.json").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:10]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / "en" / "0.parquet")


def test_they_are_read_from_the_hub(tmp_path, prepared, corpus, texts, arguments):
    pytest.importorskip("datasets")
    write_repository(tmp_path / "hub" / "allenai" / "c4", texts)
    script = tmp_path / "hub" / "some" / "script"
    script.mkdir(parents=True)
    (script / "README.md").write_text("a card")
    (script / "script.py").write_text("raise SystemExit('it ran')")
    out = lambda name: str(tmp_path / name)  # noqa: E731
    with datasets_hub.serve(tmp_path / "hub", tmp_path / "home") as environment:
        said = ask(
            environment,
            (out("named"), ["hub:c4"], arguments),
            (out("pair"), ["hub:c4"], arguments | {"validation_source": ["hub:allenai/c4@main?split=validation"]}),
            (out("rows"), ["hub:allenai/c4?config=rows"], arguments),
            (out("x"), ["hub:c4?split=test"], arguments),
            (out("x"), ["hub:c4@v2"], arguments),
            (out("x"), ["hub:c4?config=fr"], arguments),
            (out("x"), ["hub:some/body"], arguments),
            (out("x"), ["hub:some/script"], arguments),
            (out("x"), ["hub:c4?config=odd"], arguments),
            (out("x"), ["hub:c4?config=rows"], arguments | {"text_field": "content"}),
        )
    assert said[:3] == [None, None, None]
    named, pair = records.read_manifest(out("named")), records.read_manifest(out("pair"))
    assert records.read_manifest(out("rows"))["fingerprint"] == named["fingerprint"]
    assert named["fingerprint"] == records.read_manifest(prepared)["fingerprint"]
    origin = {"repository": "allenai/c4", "commit": datasets_hub.COMMIT, "config": "en", "licence": "odc-by"}
    assert named["origins"] == [{"source": "hub:c4", "split": "train"} | origin]
    assert [each["split"] for each in pair["origins"]] == ["train", "validation"]
    assert pair["splits"]["train"]["documents"] == len(texts) and pair["splits"]["validation"]["documents"] == 10
    for error, message in zip(
        said[3:],
        (
            r"source='hub:c4\?split=test': config 'en' has no split 'test', it has train, validation\.",
            r"source='hub:c4@v2': the Hub does not give allenai/c4 \(RevisionNotFound",
            r"source='hub:c4\?config=fr': the Hub does not give allenai/c4 \(ValueError: BuilderConfig 'fr' not found",
            r"source='hub:some/body': the Hub does not give some/body \(RepositoryNotFound",
            r"source='hub:some/script': the Hub does not give some/script .* scripts are no longer supported",
            r"x.csv is a table",
            r"0.parquet: no column 'content'; it has: text. Choose one with --text_field",
        ),
        strict=True,
    ):
        assert re.search(message, error), error
    assert not (tmp_path / "x").exists()


def test_names_that_are_not_known(tmp_path, arguments, monkeypatch):
    for source, message in (
        (
            "hub:finweb",
            r"source='hub:finweb' is not known \(did you mean 'fineweb'\?\): expected hub:USER/NAME",
        ),
        ("hub:c4?spilt=x", r"option 'spilt' is not known \(did you mean 'split'\?\), expected config or split"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_lib.prepare(tmp_path / "data", [source], **arguments)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'needs the package datasets: pip install "lmboost\[datasets\]"'):
        prepare_lib.prepare(tmp_path / "data", ["hub:fineweb"], **arguments)
    assert not list(tmp_path.iterdir())
