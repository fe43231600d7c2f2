"""Tokenizers: SentencePiece `.model` and Hugging Face `tokenizer.json` behind one small interface.

Both read and write plain text exactly: `decode(encode(text)) == text` for a tokenizer made by `train`.
"""

import abc
import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from lmboost import places, strict_json
from lmboost.data import fast_bpe, special_tokens
from lmboost.errors import UserError

# Of these a directory's first is taken: where both are there, tokenizer.json is what transformers reads, and may have
# tokens that the other has not.
FILE_NAMES = {"huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
# SentencePiece writes a space as this character, so the character itself needs its own way through.
_SPACE_MARK = "\u2581"
# BPE sees text in chunks of whole lines: long enough that line breaks join with what stands around them.
_CHUNK_CHARS = 2000
_SAMPLE_BYTES = 8_000_000


class Tokenizer(abc.ABC):
    """A tokenizer and the facts about it that the rest of the code needs.

    Attributes:
      kind: "sentencepiece" or "huggingface".
      encoder: the library that makes ids of texts.
      path: the model file.
      vocab_size: number of ids; every id is in [0, vocab_size).
      special: the ids of the begin and end of a document, where they were found, and those that end generation.
      bos_id, eos_id: of these, None where the tokenizer has none.
      adds_bos: whether the tokenizer's makers put bos before every text (`encode` here never does).
    """

    kind: str
    encoder: str
    path: pathlib.Path
    vocab_size: int
    special: special_tokens.Special
    adds_bos: bool

    @property
    def bos_id(self) -> int | None:
        return self.special.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.special.eos_id

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32 [tokens], without bos or eos."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; ids outside the vocabulary are a UserError."""

    @abc.abstractmethod
    def pieces(self) -> list[str | None]:
        """The piece of each id; None where an id is unused."""

    @abc.abstractmethod
    def in_texts(self) -> set[int]:
        """The ids that `encode` may give."""

    def disagreement(self, other: "Tokenizer") -> str | None:
        """The first id, of those that documents encoded by this one can have, that is another piece in `other`."""
        here, there = self.pieces(), other.pieces()
        for i in sorted(self.in_texts() | {i for i in (self.bos_id, self.eos_id) if i is not None}):
            piece = there[i] if i < len(there) else None
            if here[i] != piece:
                return f"id {i} is {here[i]!r} in {self.path}, but {piece!r} in {other.path}"
        return None

    @property
    def text_vocab_size(self) -> int:
        """One more than the largest id of a document: of tokens that none has, a model may have no rows."""
        return max(self.in_texts() | {i for i in (self.bos_id, self.eos_id) if i is not None}, default=-1) + 1

    def end_also(self, ids: Iterable[int]) -> None:
        """Generation ends with these ids, too, as far as there are such."""
        there = {i for i in ids if 0 <= i < self.vocab_size}
        self.special = self.special._replace(stop_ids=tuple(sorted(there.union(self.special.stop_ids))))

    @property
    def borders(self) -> str:
        """With which tokens documents begin and end, in words."""
        pieces, s = self.pieces(), self.special
        begin = "no token" if s.bos_id is None else f"{pieces[s.bos_id]!r}, {s.bos_id} ({s.bos_from})"
        end = "no token" if s.eos_id is None else f"{pieces[s.eos_id]!r}, {s.eos_id} ({s.eos_from})"
        return f"documents begin with {begin} and end with {end}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the table from id to piece: equal for two files that give every id the same piece."""
        return hashlib.sha256(json.dumps(self.pieces()).encode()).hexdigest()

    def save(self, directory: str | os.PathLike) -> pathlib.Path:
        """Copies the model file into `directory`, and what the files beside it say; returns the copy."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / FILE_NAMES[self.kind]
        self._copy(target)
        pieces, beside = self.pieces(), self.path.with_name(special_tokens.CONFIG)
        config = strict_json.read(beside, {}, "Mend or remove it.") if beside.is_file() else {}
        if config or {self.special.bos_from, self.special.eos_from} != {self.path.name}:
            named = {"bos_token": self.bos_id, "eos_token": self.eos_id}
            config |= {name: None if i is None else pieces[i] for name, i in named.items()}
            _write_json(directory / special_tokens.CONFIG, config)
        if len(self.special.stop_ids) > 1:
            _write_json(directory / special_tokens.GENERATION, {"eos_token_id": list(self.special.stop_ids)})
        return target

    def _copy(self, target: pathlib.Path) -> None:
        shutil.copyfile(self.path, target)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            wrong = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
            raise UserError(
                f"id {wrong} is outside the vocabulary of {self.path}: expected 0 to {self.vocab_size - 1}."
            )
        return ids.tolist()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file."""

    kind = encoder = "sentencepiece"

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self.path.read_bytes())
            self.vocab_size = self._model.vocab_size()
            pieces = self.pieces()
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"tokenizer {self.path} is not a readable SentencePiece model ({places.brief(error)}): download "
                "it again, or give a tokenizer.json."
            ) from error
        bos, eos = (None if i < 0 else pieces[i] for i in (self._model.bos_id(), self._model.eos_id()))
        vocab = {piece: i for i, piece in enumerate(pieces)}
        self.special = special_tokens.Beside(self.path).special(vocab, (bos, eos))
        self.adds_bos = self.bos_id is not None
        mark_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = mark_bytes if all(self._model.is_byte(i) for i in mark_bytes) else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._mark_ids is None or not any(_SPACE_MARK in text for text in texts):
            return self._model.encode(list(texts), num_threads=1, return_type="numpy")
        return [self._encode_marked(text) for text in texts]

    def _encode_marked(self, text: str) -> np.ndarray:
        """Text with the space mark in it: the mark goes through as its bytes."""
        first, *rest = self._model.encode(text.split(_SPACE_MARK), num_threads=1)
        return np.asarray(first + [i for ids in rest for i in self._mark_ids + ids], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(self._checked(ids))

    def pieces(self) -> list[str | None]:
        return [self._model.id_to_piece(i) for i in range(self.vocab_size)]

    def in_texts(self) -> set[int]:
        return {i for i in range(self.vocab_size) if not self._model.is_control(i) and not self._model.is_unused(i)}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` file, with the files beside it."""

    kind = "huggingface"

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        with refusing(self.path, "is not a readable tokenizer.json"):
            self._model = tokenizers.Tokenizer.from_file(str(self.path))
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not an end
        beside = special_tokens.Beside(self.path)
        self._added = self._add(beside.added())
        self._vocab = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        if self.vocab_size > special_tokens.LARGEST_ID:
            raise UserError(f"tokenizer {self.path} has an id {self.vocab_size - 1}, which no vocabulary has: mend it.")
        table = self.pieces()
        if twice := next((piece for piece, i in self._vocab.items() if table[i] != piece), None):
            i = self._vocab[twice]
            raise UserError(f"tokenizer {self.path}: both {twice!r} and {table[i]!r} have the id {i}: mend it.")
        self.special = beside.special(self._vocab)
        self._keep_out_of_texts()
        with refusing(self.path, "cannot encode a text"):
            self.adds_bos = self.bos_id is not None and self._model.encode("").ids[:1] == [self.bos_id]

    def _add(self, tokens: Mapping[int, dict[str, Any]]) -> bool:
        """Adds the tokens that only the files beside have; whether there are such."""
        new = {i: token for i, token in sorted(tokens.items()) if self._model.token_to_id(token["content"]) is None}
        for i, token in new.items():
            flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
            special = bool(token.get("special", False))
            try:
                self._model.add_tokens([tokenizers.AddedToken(token["content"], special=special, **flags)])
            except TypeError as error:
                raise UserError(f"tokenizer {self.path}: the added token {i} is damaged ({error}): mend it.") from error
            if (found := self._model.token_to_id(token["content"])) != i:
                raise UserError(
                    f"tokenizer {self.path}: {token['content']!r} is to be token {i} by the files beside it, but comes "
                    f"to be {found}. Save the tokenizer again with transformers, which writes all of it to one file."
                )
        return bool(new)

    def _keep_out_of_texts(self) -> None:
        """Makes the begin and the end special, as transformers does, where the file has them as tokens of texts."""
        added = self._model.get_added_tokens_decoder()
        for i in {self.bos_id, self.eos_id} & set(added):
            if not added[i].special:
                self._model.add_special_tokens([tokenizers.AddedToken(added[i].content, special=True)])

    def _copy(self, target: pathlib.Path) -> None:
        if self._added:
            self._model.encode_special_tokens = False  # as in the file
            self._model.save(str(target))
            self._model.encode_special_tokens = True
        else:
            super()._copy(target)

    @property
    def encoder(self) -> str:
        return "fastokens" if self._fast else "tokenizers"

    @functools.cached_property
    def _fast(self) -> fast_bpe.FastBpe | None:
        return fast_bpe.make(self._model)

    def in_texts(self) -> set[int]:
        special = {i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        return set(self._vocab.values()) - special

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with refusing(self.path, "cannot encode a text; give one that has a token for every character"):
            if self._fast:
                return self._fast.encode_batch(texts)
            encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        ids = self._checked(ids)
        with refusing(self.path, "cannot decode its tokens"):
            return self._model.decode(ids, skip_special_tokens=False)

    def pieces(self) -> list[str | None]:
        table: list[str | None] = [None] * self.vocab_size
        for piece, i in self._vocab.items():
            table[i] = piece
        return table


@contextlib.contextmanager
def refusing(path: pathlib.Path, what: str) -> Iterator[None]:
    """Of a malformed tokenizer the libraries raise plain Exception, or panic: here a UserError, with its path."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"tokenizer {path} {what}: {str(error)[:300]}") from error


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in `path`: a `.model` file, a `tokenizer.json`, or a directory that holds one of them."""
    path = pathlib.Path(os.path.expanduser(path))
    if path.is_dir():
        found = [path / name for name in FILE_NAMES.values() if os.path.lexists(path / name)]
        if not found:
            raise UserError(f"tokenizer={path}: the directory holds neither {' nor '.join(FILE_NAMES.values())}.")
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"tokenizer={path}: no such file. Give a SentencePiece .model, a Hugging Face tokenizer.json, "
            f"or a directory that holds one of them."
        )
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _write_json(path: pathlib.Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(
    texts: Iterable[str], vocab_size: int, out_path: str | os.PathLike, sample_bytes: int = _SAMPLE_BYTES
) -> Tokenizer:
    """Trains a SentencePiece BPE model on the first `sample_bytes` of `texts` and writes it to `out_path`.

    BPE, because on source code it needed fewer tokens per byte than unigram (2.94 against 2.84 bytes per token,
    2,048 pieces, the Python standard library) and a tenth of its training time. Every text round-trips: characters
    that are not in the vocabulary become bytes, nothing is normalised, and spaces and line breaks stay as they are.
    Deterministic: the same texts give the same file.
    """
    out_path = pathlib.Path(out_path)
    if vocab_size < 300:
        raise UserError(f"vocab_size={vocab_size} is too small: 256 bytes and the specials need at least 300.")
    chunks = list(_chunks(texts, sample_bytes))
    if not chunks:
        raise UserError("tokenizer training found no text: the source is empty.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=8 * _CHUNK_CHARS,
            user_defined_symbols=["\t"],  # the trainer's own separator: it never learns pieces with a tab
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"SentencePiece could not train vocab_size={vocab_size} on {sum(map(len, chunks))} characters: {error} "
            f"Choose another vocab_size or give more text."
        ) from error
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with places.whole_file(out_path) as partial:
        partial.write_bytes(model.getvalue())
    return SentencePieceTokenizer(out_path)


def _chunks(texts: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """The chunks of the texts, until they have so many bytes."""
    for chunk in (chunk for text in texts for chunk in _split(text.replace("\0", ""))):
        yield chunk
        sample_bytes -= len(chunk.encode())
        if sample_bytes <= 0:
            return


def _split(text: str) -> Iterator[str]:
    """Runs of whole lines of at most _CHUNK_CHARS characters; a longer line is cut."""
    chunk = ""
    for line in text.splitlines(keepends=True):
        for piece in (line[i : i + _CHUNK_CHARS] for i in range(0, len(line), _CHUNK_CHARS)):
            if len(chunk) + len(piece) > _CHUNK_CHARS:
                yield chunk
                chunk = ""
            chunk += piece
    if chunk:
        yield chunk
