"""Readers: what was written is what is read, and what can't be read is named."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import pickle
import tarfile
import tracemalloc
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import zstandard
from array_record.python import array_record_module

from lmboost.data import sources
from lmboost.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def read_all(*names, text_field="text"):
    units = sources.find([str(name) for name in names], text_field)
    return [document for unit in units for document in sources.read(unit, text_field)]


def write_jsonl(path, entries):
    raw = "".join(json.dumps(entry, ensure_ascii=len(entries) % 2 == 0) + "\n" for entry in entries).encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    if path.suffix == ".zst":
        half = len(raw) // 2
        raw = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])  # two frames, as parallel writers leave
    path.write_bytes(raw)


@hypothesis.given(
    st.lists(TEXT, min_size=1, max_size=8), st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_text_comes_back_from_any_format(tmp_path_factory, texts, suffix):
    path = tmp_path_factory.mktemp("any") / f"x.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "body": texts}), path, row_group_size=3)
    else:
        write_jsonl(path, [{"id": i, "body": text} for i, text in enumerate(texts)])
    documents = read_all(path, text_field="body")
    assert [document.text for document in documents] == texts and all(document.valid for document in documents)


@hypothesis.given(st.binary())
@hypothesis.settings(deadline=None, max_examples=60)
def test_any_bytes_are_a_document_or_no_text(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("bytes") / "x.py"
    path.write_bytes(raw)
    try:
        (document,) = read_all(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    document.text.encode()
    assert document.valid == (document.text.encode() == raw)


def test_large_zst_and_text_in_gz(tmp_path):
    texts = [str(i) * 1000 for i in range(1000)]
    write_jsonl(tmp_path / "x.jsonl.zst", [{"text": text} for text in texts])
    assert [document.text for document in read_all(tmp_path / "x.jsonl.zst")] == texts
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress(b"one\r\n\ttwo"))
    assert [document.text for document in read_all(tmp_path / "y.txt.gz")] == ["one\r\n\ttwo"]


def test_parquet_types_and_units(tmp_path, monkeypatch):
    texts = ["a", None, "b\u00e9", "b\u00e9", ""]
    for name, kind in (("s", pyarrow.string()), ("l", pyarrow.large_string()), ("b", pyarrow.binary())):
        column = pyarrow.array([None if t is None else t.encode() for t in texts] if name == "b" else texts, kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet", row_group_size=2)
        assert [d.text for d in read_all(tmp_path / f"{name}.parquet")] == ["a", "", "b\u00e9", "b\u00e9", ""]
    dictionary = pyarrow.array(["u", "v", "u"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": dictionary}), tmp_path / "d.parquet")
    assert [d.text for d in read_all(tmp_path / "d.parquet")] == ["u", "v", "u"]
    monkeypatch.setattr(sources, "_UNIT_BYTES", 1)
    assert len(sources.find([str(tmp_path / "s.parquet")])) == 3
    assert [d.origin[-5:] for d in read_all(tmp_path / "s.parquet")] == [f"row {i}" for i in range(5)]


def test_globs_are_sorted_and_each_file_is_read_once(tmp_path):
    for name in ("b/deep/x.md", "a.txt", "b/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    documents = read_all(f"{tmp_path}/**/*", f"{tmp_path}/a.txt")
    assert [document.text for document in documents] == ["a.txt", "b/c.py", "b/deep/x.md"]


def test_standard_library():
    units = sources.find(["stdlib"])
    paths = [pathlib.Path(path) for unit in units for path in unit.paths]
    names = {path.name for path in paths}
    assert {"json", "asyncio"} <= {path.parent.name for path in paths} and "argparse.py" in names
    assert not any({"test", "site-packages", "lib2to3"} & set(path.parts[-3:]) for path in paths)
    assert paths == [pathlib.Path(path) for unit in sources.find(["stdlib"]) for path in unit.paths]


def make_tfds(directory, texts, split="train"):
    """A TFDS data set of texts, made without TensorFlow."""
    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int64})
    name = f"named-{split}.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(directory / name), "group_size:1")
    for text in texts:
        writer.write(features.serialize_example({"text": text, "label": 1}))
    writer.close()
    template = tfds.core.ShardedFileTemplate(data_dir=directory, dataset_name="named", filetype_suffix="array_record")
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(name=split, shard_lengths=[len(texts)], num_bytes=1000, filename_template=template)
        ],
        check_data=False,
    )


def test_tfds_directory_and_uri(tmp_path, monkeypatch):
    texts = ["one", "two\u00e9\n", "three"]
    make_tfds(tmp_path / "train_only", texts)
    make_tfds(tmp_path / "other", texts, "validation")
    assert [d.text for d in read_all(f"tfds:{tmp_path / 'train_only'}")] == texts
    assert [d.text for d in read_all(f"tfds:{tmp_path / 'other'}?split=validation")] == texts
    make_tfds(tmp_path / "named/1.0.0", texts)
    for name in ("named", "named:1.0.0"):
        assert [d.text for d in read_all(f"tfds:{name}?data_dir={tmp_path}")] == texts
    monkeypatch.setattr(sources, "_UNIT_BYTES", 1)
    assert len(sources.find([f"tfds:{tmp_path / 'train_only'}"])) == 3
    assert [d.text for d in read_all(f"tfds:{tmp_path / 'train_only'}")] == texts
    with pytest.raises(UserError, match=r"is a directory: give tfds:/.*train_only"):
        sources.find([str(tmp_path / "train_only")])


def test_bad_tfds(tmp_path):
    make_tfds(tmp_path / "made", ["x"])
    for source, message in [
        (f"tfds:{tmp_path / 'made'}?split=test", "no split 'test', it has train"),
        (f"tfds:{tmp_path / 'made'}?sprit=test", "option 'sprit' is not known"),
        ("tfds:no_such_dataset_anywhere", "no_such_dataset_anywhere.*TFDS can't open it"),
    ]:
        with pytest.raises(UserError, match=message):
            sources.find([source])
    with pytest.raises(UserError, match=r"no feature 'body', it has: .*text"):
        sources.find([f"tfds:{tmp_path / 'made'}"], "body")
    os.remove(tmp_path / "made/named-train.array_record-00000-of-00001")
    with pytest.raises(UserError, match=r"named-train.array_record-00000-of-00001 does not exist"):
        sources.find([f"tfds:{tmp_path / 'made'}"])


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "x"', r"x.jsonl:3: not valid JSON"),
        ('["x"]', r"x.jsonl:3: expected a JSON object, found list"),
        ('{"body": "x", "id": 1}', r"x.jsonl:3: no field 'text'; the line has: body, id"),
        ('{"text": 7}', r"x.jsonl:3: the text field holds int, expected a string"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_all(tmp_path / "x.jsonl")


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n{"text": "a\xffb"}\n')
    documents = read_all(tmp_path / "x.jsonl")
    assert [(d.text, d.valid) for d in documents] == [("a\ufffdb", False), ("\U0001f600", True), ("a\ufffdb", False)]


def test_unreadable_files_are_named(tmp_path):
    raw = b"".join(b'{"text": "%d"}\n' % i for i in range(9999))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(raw)[:-100])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(raw)[:-100])
    (tmp_path / "bad.jsonl.zst").write_bytes(b"nonsense" * 10)
    (tmp_path / "bad.txt.gz").write_bytes(b"nonsense" * 10)
    (tmp_path / "bad.parquet").write_bytes(b"nonsense" * 10)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=f"{path.name} can't be read: .+ Mend, remove or exclude"):
            read_all(path)
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet: no column 'text'; it has: body"):
        read_all(tmp_path / "x.parquet")


def test_no_match_and_directory(tmp_path):
    with pytest.raises(UserError, match=r"\*\.txt' matches no file"):
        sources.find([f"{tmp_path}/*.txt"])
    with pytest.raises(UserError, match=r"is a directory: give a glob"):
        sources.find([str(tmp_path)])


LINES = b"".join(b'{"text": "number %d"}\n' % i for i in range(20))
PACK = {
    "": bytes, "gz": gzip.compress, "GZ": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress,
    "bz2": bz2.compress, "lz4": lambda raw: pyarrow.compress(raw, "lz4", asbytes=True),
}  # fmt: skip


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["json", "jsonl", "JSONL", "jl", "ndjson", "txt", "part-00000"])
def test_lines_of_json_are_read_as_such_under_any_name(tmp_path, name, packed):
    path = tmp_path / f"x.{name}{packed and '.'}{packed}"
    path.write_bytes(PACK[packed](LINES))
    assert [document.text for document in read_all(path)] == [f"number {i}" for i in range(20)]


def test_what_is_compressed_is_read_without_a_name_that_says_so_and_refused_with_a_wrong_one(tmp_path):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"one"))
    assert [document.text for document in read_all(tmp_path / "a.txt")] == ["one"]
    (tmp_path / "b.txt.gz").write_bytes(bz2.compress(b"one"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(gzip.compress(b"one")))
    for name, message in (("b.txt.gz", "not in the format gz that its name says"), ("c.txt.gz", "is compressed twice")):
        with pytest.raises(UserError, match=f"{name} .*{message}"):
            read_all(tmp_path / name)


def test_documents_of_json_that_are_no_lines_are_refused(tmp_path):
    (tmp_path / "pretty.json").write_text(json.dumps({"text": "one"}, indent=1))
    (tmp_path / "list.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    for name in ("pretty", "list"):
        with pytest.raises(UserError, match=rf"{name}.json:1: .*(not valid|expected a) JSON"):
            read_all(tmp_path / f"{name}.json")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    assert len(read_all(tmp_path / "bom.jsonl")) == 20


def archive(path, kind):
    (path.parent / "inside.txt").write_bytes(LINES)
    with zipfile.ZipFile(path, "w") if kind == "zip" else tarfile.open(path, kind) as file:
        (file.write if kind == "zip" else file.add)(path.parent / "inside.txt")


BINARIES = {
    "zip archive": lambda path: archive(path, "zip"),
    "tar archive": lambda path: archive(path, "w"),
    "a tar archive": lambda path: archive(path, "w:gz"),
    "a Parquet file": lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), path),
    "an Arrow file": lambda path: pyarrow.feather.write_feather(pyarrow.table({"text": ["x"]}), path),
    "an image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(99))),
    "binary": lambda path: path.write_bytes(pickle.dumps({"text": ["x"] * 9})),
    "binary ": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "UTF-16": lambda path: path.write_text("a book", encoding="utf-16"),
    "not UTF-8": lambda path: path.write_text("\u043a\u043d\u0438\u0433\u0430 " * 99, encoding="koi8-r"),
}


@pytest.mark.parametrize("what", BINARIES)
def test_what_is_no_text_is_refused_by_its_bytes(tmp_path, what):
    BINARIES[what](tmp_path / "x.txt")
    with pytest.raises(UserError, match=f"x.txt is .*{what.strip()}.* only text is trained on"):
        read_all(tmp_path / "x.txt")


@pytest.mark.parametrize("name", ["x.csv", "x.TSV", "x.csv.gz"])
def test_tables_are_refused_by_their_names(tmp_path, name):
    (tmp_path / name).write_text("text,id\nfine,1\n")
    with pytest.raises(UserError, match=f"{name} is a table"):
        read_all(tmp_path / name)


def test_a_file_with_many_names_is_read_once_and_links_are_not_followed_round(tmp_path, monkeypatch):
    for name in ("a.txt", "deep/b.txt", "deep/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.txt").symlink_to("a.txt")
    (tmp_path / "d.txt").hardlink_to(tmp_path / "a.txt")
    for name in ("round", "again", "deep/up"):
        (tmp_path / name).symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.txt", "./**/*.txt", f"{tmp_path}/**", "**/deep/**/*.txt", "*/*.txt"):
        found = {document.text for document in read_all(pattern, pattern)}
        assert found == ({"deep/b.txt"} if "deep" in pattern else {"a.txt", "deep/b.txt"})
        assert len(read_all(pattern, "./a.txt", "a.txt")) == 2
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone.txt is a link to what is not there"):
        read_all("*.txt")


def test_a_long_window_of_zstandard_and_what_is_cut_off(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    raw = packer.compress(LINES) + packer.flush()
    (tmp_path / "x.jsonl.zst").write_bytes(raw)
    assert len(read_all(tmp_path / "x.jsonl.zst")) == 20


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.txt.gz", "x.jsonl.zst", "x.parquet"])
def test_a_document_beyond_the_limit_is_named_before_it_fills_the_memory(tmp_path, name):
    text = "a" * 30_000_000
    raw = text.encode() if "txt" in name else json.dumps({"text": text}).encode()
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(PACK[name.split(".")[2] if name.count(".") > 1 else ""](raw))
    (unit,) = sources.find([str(tmp_path / name)])
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{name}.* has a document of more than 100,000 bytes \(--max_document_bytes"):
        list(sources.read(unit, most=100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 or name.endswith(("zst", "parquet"))


def test_a_file_that_memory_does_not_hold_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("one")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(sources, "_document", full)
    with pytest.raises(UserError, match=r"not enough memory for .*x.txt"):
        read_all(tmp_path / "x.txt")


def test_only_classes_of_tfds_are_imported(tmp_path, monkeypatch):
    make_tfds(tmp_path / "made", ["x"])
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "made" / "features.json"
    path.write_text(path.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", "evil.Text"))
    assert "evil" in path.read_text()
    with pytest.raises(UserError, match=r"features.json names the class 'evil.Text'"):
        read_all(f"tfds:{tmp_path / 'made'}")
    with pytest.raises(UserError, match="is of a namespace, whose code TFDS would run"):
        read_all("tfds:somebody:named")


def test_lines_of_json_without_the_text_field_are_not_taken_for_text(tmp_path):
    (tmp_path / "part-0").write_bytes(LINES.replace(b'"text"', b'"content"'))
    with pytest.raises(UserError, match=r"part-0:1: no field 'text'; the line has: content. Choose one with"):
        read_all(tmp_path / "part-0")
    assert len(read_all(tmp_path / "part-0", text_field="content")) == 20
    (tmp_path / "code.py").write_text('{"a": 1}\nprint(3)\n')
    assert [document.text for document in read_all(tmp_path / "code.py")] == ['{"a": 1}\nprint(3)\n']
