"""A tokenizer in the words of a GGUF file. What llama.cpp would split otherwise is refused.

It knows SentencePiece's BPE (it merges by scores) and byte-level BPE; how that splits text before the merges it knows
by names, each for one list of regular expressions (src/llama-vocab.cpp).
"""

import dataclasses
import pathlib
import tempfile
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from lmboost.data import tokenizer as tokenizer_lib
from lmboost.data.tokenizer import Tokenizer
from lmboost.errors import UserError
from lmboost.hf import files
from lmboost.hf.tokenizer_files import SPLIT_OF_QWEN

# As sentencepiece_model.proto counts them, and llama.cpp after it.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_SPLIT_OF_LLAMA3 = SPLIT_OF_QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(regex: str) -> tuple[dict[str, Any], ...]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return split, _BYTES | {"use_regex": False}


@dataclasses.dataclass(frozen=True)
class _Splitting:
    """What llama.cpp does under one of its names."""

    steps: tuple[dict[str, Any], ...]  # of the tokenizer.json, in their order
    normalizers: tuple[str | None, ...] = (None,)  # that it may have; llama.cpp normalises nothing
    ignore_merges: bool = False  # a word that is a token is never split


_SPLITTINGS = {
    "gpt-2": _Splitting((_BYTES,)),
    "smollm": _Splitting(({"type": "Digits", "individual_digits": True}, _BYTES)),
    "qwen2": _Splitting(_split(SPLIT_OF_QWEN), (None, "NFC")),
    "llama-bpe": _Splitting(_split(_SPLIT_OF_LLAMA3), ignore_merges=True),
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The keys of a GGUF file about its tokenizer; `kinds` as `NORMAL` and its like, one for each token."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    unknown: int | None
    space_prefix: bool | None
    bos: int | None
    ends: tuple[int, ...]

    def add_to(self, file: Any) -> None:
        """Adds the keys to a gguf.GGUFWriter."""
        file.add_tokenizer_model(self.model)
        file.add_tokenizer_pre(self.pre)
        file.add_token_list(self.tokens)
        file.add_token_types(self.kinds)
        if self.scores is not None:
            file.add_token_scores(self.scores)
        if self.merges is not None:
            file.add_token_merges(self.merges)
        if self.unknown is not None:
            file.add_unk_token_id(self.unknown)
        if self.space_prefix is not None:
            file.add_add_space_prefix(self.space_prefix)
        if self.bos is not None:
            file.add_bos_token_id(self.bos)
        for add, end in zip((file.add_eos_token_id, file.add_eot_token_id), self.ends, strict=False):
            add(end)
        file.add_add_bos_token(self.bos is not None)  # as documents begin in training
        file.add_add_eos_token(False)


def of(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """The tokenizer of a model with `rows` rows of embeddings; those without a token are unused.

    Raises a UserError for a tokenizer that llama.cpp has no equal of.
    """
    kind = _of_sentencepiece if tokenizer.kind == "sentencepiece" else _of_bytes
    found = kind(tokenizer)
    more = range(len(found.tokens), rows)
    ends = (tokenizer.eos_id, *(i for i in tokenizer.special.stop_ids if i != tokenizer.eos_id))
    return dataclasses.replace(
        found,
        tokens=[*found.tokens[:rows], *(f"[PAD{i}]" for i in more)],
        kinds=[*found.kinds[:rows], *(UNUSED for _ in more)],
        scores=None if found.scores is None else [*found.scores[:rows], *(-10_000.0 for _ in more)],
        bos=tokenizer.bos_id,
        ends=tuple(i for i in ends if i is not None),
    )


def _refuse(tokenizer: Tokenizer, what: str) -> UserError:
    return UserError(
        f"tokenizer {tokenizer.path} {what}, for which llama.cpp has no equal: give the model as hf:DIR instead."
    )


def _of_sentencepiece(tokenizer: Tokenizer) -> Vocabulary:
    with tokenizer_lib.refusing(tokenizer.path, "cannot be read"):
        proto = sentencepiece_model.ModelProto.FromString(tokenizer.path.read_bytes())
    trainer, rules, pieces = proto.trainer_spec, proto.normalizer_spec, proto.pieces
    lacks = [
        (trainer.model_type != trainer.BPE, "is not a BPE model"),
        (all(piece.type != piece.BYTE for piece in pieces), "has no tokens for single bytes"),
        (trainer.treat_whitespace_as_suffix, "has treat_whitespace_as_suffix"),
        (not rules.escape_whitespaces, "has escape_whitespaces=false"),
        (rules.remove_extra_whitespaces, "has remove_extra_whitespaces"),
        (bool(rules.precompiled_charsmap), f"normalises text ({rules.name})"),
    ]
    for there, what in lacks:
        if there:
            raise _refuse(tokenizer, what)
    unknown = next((i for i, piece in enumerate(pieces) if piece.type == UNKNOWN), None)
    return Vocabulary(
        "llama", "default", [piece.piece for piece in pieces], [int(piece.type) for piece in pieces],
        [piece.score for piece in pieces], None, unknown, rules.add_dummy_prefix, None, (),
    )  # fmt: skip


def _of_bytes(tokenizer: Tokenizer) -> Vocabulary:
    with tempfile.TemporaryDirectory() as directory:  # as one file, with what stood in files beside it
        content = files.read_json(tokenizer.save(pathlib.Path(directory)), {"model": {"type": str}})
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refuse(tokenizer, f"is a {model['type']} model that is not of bytes")
    pre = _name_of_splitting(tokenizer, content)
    pieces, added = tokenizer.pieces(), {token["id"]: token for token in content.get("added_tokens") or ()}
    control = {i for i, token in added.items() if token["special"]} | {tokenizer.bos_id, tokenizer.eos_id}
    kinds = [
        UNUSED if piece is None else CONTROL if i in control else USER_DEFINED if i in added else NORMAL
        for i, piece in enumerate(pieces)
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = [f"[PAD{i}]" if piece is None else piece for i, piece in enumerate(pieces)]
    return Vocabulary("gpt2", pre, tokens, kinds, None, merges, None, None, None, ())


def _name_of_splitting(tokenizer: Tokenizer, content: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits text; a UserError where it has none."""
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    steps = tuple({key: value for key, value in step.items() if key != "trim_offsets"} for step in steps)
    normalizer = (content.get("normalizer") or {}).get("type")
    for name, known in _SPLITTINGS.items():
        if steps == known.steps:
            if normalizer not in known.normalizers:
                raise _refuse(tokenizer, f"normalises text ({normalizer})")
            if bool(content["model"].get("ignore_merges")) != known.ignore_merges:
                raise _refuse(tokenizer, f"has ignore_merges={not known.ignore_merges}".lower())
            return name
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise _refuse(tokenizer, f"splits text by a pre-tokenizer ({kinds}) other than those of {', '.join(_SPLITTINGS)}")
