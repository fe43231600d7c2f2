"""The bytes that the tokens of a text stand for, which are what two tokenizers have in common.

SentencePiece writes a space as U+2581, and what it has no piece for as bytes; byte-level BPE has a letter for every
byte. Other kinds (WordPiece, words with a mark at their end) do not say which bytes a token is, and are refused.
"""

import functools
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmboost import strict_json
from lmboost.data import tokenizer as tokenizers
from lmboost.data.tokenizer import Tokenizer
from lmboost.errors import UserError

UNKNOWN = "\ufffd".encode()  # the bytes of a token that stands for what a tokenizer has no token for
_SPACE_MARK = "\u2581"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Pieces:
    """A tokenizer, and the bytes of each of its ids.

    Attributes:
      table: by id; b"" for what is in no text, as the tokens that begin and end documents.
      lengths: of the table's entries, int64 [vocabulary].
      unknown: the id that stands for what it has no token for, if it has one; its bytes are UNKNOWN.
      puts_space: whether a text begins with a space that it has not itself.
      keeps: whether the bytes of a text's tokens are known to be the text's where they are as many.

    Raises a UserError, naming the tokenizer's file, where its tokens do not say which bytes they are.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        of = _of_sentencepiece if tokenizer.kind == "sentencepiece" else _of_tokenizer_json
        self.table, self.unknown, self.keeps = of(tokenizer)
        self.lengths = np.array([len(piece) for piece in self.table], np.int64)
        self._all, self._first = np.frombuffer(b"".join(self.table), np.uint8), np.cumsum(self.lengths) - self.lengths
        self.puts_space = self.join(tokenizer.encode("a")).startswith(b" ")

    def join(self, ids: np.ndarray) -> bytes:
        """The bytes of a text."""
        return self.spell(ids)[0]

    def spell(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """(the bytes of a text, after how many of them each of its tokens ends, int64 [tokens])."""
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths)
        places = np.repeat(self._first[ids] - (ends - lengths), lengths)
        places += np.arange(len(places))
        return self._all[places].tobytes(), ends


def load(path: str) -> Pieces:
    """Those of the tokenizer that `tokenizer.load` finds in `path`; read once by each process."""
    with _LOADING:  # the loader's threads ask for it at the same time
        return _load(path)


_LOADING = threading.Lock()
_load = functools.lru_cache(maxsize=8)(lambda path: Pieces(tokenizers.load(path)))


def _of_sentencepiece(tokenizer: Tokenizer) -> tuple[list[bytes], int | None, bool]:
    """(bytes of each id, the id that stands for what has no token, `Pieces.keeps`)."""
    from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

    kinds = sentencepiece_model.ModelProto.SentencePiece
    pieces = sentencepiece_model.ModelProto.FromString(tokenizer.path.read_bytes()).pieces
    table = [_plain(piece.piece) for piece in pieces]
    for i, piece in enumerate(pieces):
        if piece.type in (kinds.CONTROL, kinds.UNUSED):
            table[i] = b""
        elif piece.type == kinds.BYTE:
            table[i] = _byte(piece.piece)
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == kinds.UNKNOWN), None)
    if unknown is not None:
        table[unknown] = UNKNOWN
    return table, unknown, False


def _of_tokenizer_json(tokenizer: Tokenizer) -> tuple[list[bytes], int | None, bool]:
    """As above; of added tokens, which texts are searched for, the bytes are those of their content."""
    file = strict_json.read(tokenizer.path, {"model": dict, "added_tokens?": [{"content": str}]}, "Download it again.")
    model, pieces = file["model"], tokenizer.pieces()
    kinds = {kind for part in ("normalizer", "pre_tokenizer", "decoder") for kind in _types(file.get(part))}
    marks = {name: model.get(name) for name in ("end_of_word_suffix", "continuing_subword_prefix") if model.get(name)}
    if marks or not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        found = ", ".join([str(model.get("type")), *sorted(kinds), *marks])
        raise UserError(
            f"tokenizer {tokenizer.path} does not say which bytes its tokens are (it has {found}): expected byte-level "
            "BPE, or tokens with U+2581 for a space."
        )
    added = {token["content"] for token in file.get("added_tokens", ())}
    in_model = {piece[0] if isinstance(piece, list) else piece for piece in model.get("vocab", ())}
    falls_back, in_texts = bool(model.get("byte_fallback")), tokenizer.in_texts()

    def spell(i: int, piece: str | None) -> bytes:
        if piece is None or i not in in_texts:
            return b""
        if piece in added or piece not in in_model:
            return piece.encode()
        if "ByteLevel" in kinds:
            return bytes(_LETTERS[letter] for letter in piece) if set(piece) <= _LETTERS.keys() else piece.encode()
        return _byte(piece) if falls_back and _BYTE.fullmatch(piece) else _plain(piece)

    table = [spell(i, piece) for i, piece in enumerate(pieces)]
    unknown = model.get("unk_id")
    if unknown is None and model.get("unk_token") in pieces:
        unknown = pieces.index(model["unk_token"])
    if unknown is not None:
        table[unknown] = UNKNOWN
    return table, unknown, _keeps(file)


def _keeps(file: dict[str, Any]) -> bool:
    """Of byte-level BPE without a normal form, a space of its own, or tokens that take space away.

    It may have no token for some bytes, which are then left out.
    """
    before = file.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", ()) if before.get("type") == "Sequence" else (before,)
    splits = {"ByteLevel": {"add_prefix_space": False}, "Digits": {}, "Split": {"behavior": "Isolated"}}
    return (
        file.get("normalizer") is None
        and file["model"].get("type") == "BPE"
        and not file["model"].get("unk_token")
        and any(step.get("type") == "ByteLevel" for step in steps)
        and all(splits.get(step.get("type"), {"type": ""}).items() <= step.items() for step in steps)
        and not any(token.get("lstrip") or token.get("rstrip") for token in file.get("added_tokens", ()))
    )


def _plain(piece: str) -> bytes:
    return piece.replace(_SPACE_MARK, " ").encode()


def _byte(piece: str) -> bytes:
    return bytes.fromhex(_BYTE.fullmatch(piece)[1])


def _types(part: Any) -> Iterator[str]:
    """The types of a part of a tokenizer.json, and of those in it."""
    if isinstance(part, list):
        for each in part:
            yield from _types(each)
    elif isinstance(part, dict):
        yield str(part.get("type"))
        for each in part.values():
            yield from _types(each)


def _letters() -> dict[str, int]:
    """The byte of each letter of byte-level BPE, as GPT-2 has it: bytes that print are their own letters."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _letters()
