"""Tokenizer files of a Hugging Face Hub directory; a SentencePiece model becomes a tokenizer.json.

Source of the conversion: SentencePiece's own description of a model (sentencepiece_model.proto). Its BPE merges the
pair whose piece has the highest score first, so a tokenizer.json lists the pairs of every piece in the scores' order.
"""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import decoders, models, normalizers, processors

from lmboost.data import tokenizer as tokenizer_lib
from lmboost.data.tokenizer import Tokenizer
from lmboost.errors import UserError
from lmboost.hf import files

_Piece = sentencepiece_model.ModelProto.SentencePiece
_FAST, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_BESIDE = (
    _FAST, _CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
# What a tokenizer_config.json says that is no part of how a text is split.
_KEPT = (
    "unk_token", "pad_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens",
    "extra_special_tokens", "added_tokens_decoder", "chat_template", "model_max_length", "padding_side",
    "truncation_side", "clean_up_tokenization_spaces",
)  # fmt: skip
_MARK = "\u2581"  # SentencePiece's space
SPLIT_OF_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OF_QWEN = {  # of its tokenizer.json, all that decides about ids but vocabulary and merges
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT_OF_QWEN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    },
    "model": {"type": "BPE", "byte_fallback": False, "ignore_merges": False},
}


def copy(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Copies a tokenizer's file, and those beside it that belong to it."""
    tokenizer.save(directory)
    for name in _BESIDE:
        source = tokenizer.path.with_name(name)
        if source.is_file() and not (directory / name).exists() and (name != _FAST or _is_same(tokenizer, source)):
            shutil.copyfile(source, directory / name)


def _is_same(tokenizer: Tokenizer, fast: pathlib.Path) -> bool:
    """Whether the tokenizer.json beside a SentencePiece model has its tokens and no more."""
    return tokenizer_lib.load(fast).fingerprint == tokenizer.fingerprint


def write(tokenizer: Tokenizer, directory: pathlib.Path, max_length: int) -> None:
    """Writes what AutoTokenizer needs: tokenizer.json, copied or converted, and tokenizer_config.json."""
    copy(tokenizer, directory)
    if not (directory / _FAST).exists():
        from_sentencepiece(tokenizer.path).save(str(directory / _FAST))
    beside, pieces = directory / _CONFIG, tokenizer.pieces()
    config = files.read_json(beside, {}) if beside.is_file() else {}
    config = {"model_max_length": max_length, "clean_up_tokenization_spaces": False} | {
        name: value for name, value in config.items() if name in _KEPT
    }
    special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    config |= {name: pieces[i] for name, i in special.items() if i is not None}
    # Other classes build parts of a tokenizer anew, whatever its tokenizer.json says.
    files.write_json(beside, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def is_qwen(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer normalises and splits text as Qwen's do.

    For a Qwen2 model AutoTokenizer (transformers 5) puts this in the place of the file's own.
    """
    if tokenizer.kind == "sentencepiece":
        return False
    return _has(files.read_json(tokenizer.path, {}), _OF_QWEN)


def _has(value: Any, expected: Any) -> bool:
    """Whether all that is expected is in a JSON value: of an object these fields, of a list all and no more."""
    if isinstance(expected, dict):
        return isinstance(value, dict) and all(_has(value.get(name), inner) for name, inner in expected.items())
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(_has, value, expected))
    return value == expected


def from_sentencepiece(path: pathlib.Path) -> tokenizers.Tokenizer:
    """A SentencePiece model as a tokenizer of the `tokenizers` library, with the same ids for the same text.

    It begins texts with bos where there is one, as the training data does. Two things differ: U+2581 in a text is a
    space to it, and where a unigram model has two equally good ways to split a text, rounding chooses between them.
    A UserError names what cannot be carried over.
    """
    with tokenizer_lib.refusing(path, "cannot be made a tokenizer.json; give one with --tokenizer"):
        proto = sentencepiece_model.ModelProto.FromString(path.read_bytes())
        _check(path, proto)
        return _converted(proto)


def _converted(proto: sentencepiece_model.ModelProto) -> tokenizers.Tokenizer:
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    bytes_too = any(piece.type == _Piece.BYTE for piece in proto.pieces)
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == _Piece.UNKNOWN)
    if trainer.model_type == trainer.BPE:
        model = models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
            merges=_merges(proto.pieces),
            unk_token=proto.pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=bytes_too,
        )
    else:
        model = models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unknown, bytes_too)
    out = tokenizers.Tokenizer(model)
    out.normalizer = _normalizer(rules)
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    out.decoder = decoders.Sequence([decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    control = [piece.piece for piece in proto.pieces if piece.type in (_Piece.CONTROL, _Piece.UNKNOWN)]
    out.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in control])
    bos = trainer.bos_piece
    if bos in control:
        out.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, out.token_to_id(bos))]
        )
    return out


def _check(path: pathlib.Path, proto: sentencepiece_model.ModelProto) -> None:
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    symbols = [piece.piece for piece in proto.pieces if piece.type == _Piece.USER_DEFINED and len(piece.piece) > 1]
    lacks = [
        (trainer.model_type not in (trainer.BPE, trainer.UNIGRAM), "a model that is neither BPE nor unigram"),
        (all(piece.type != _Piece.UNKNOWN for piece in proto.pieces), "no piece for what is unknown"),
        (any(piece.type == _Piece.UNUSED for piece in proto.pieces), "unused pieces"),
        (trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix"),
        (not rules.escape_whitespaces, "escape_whitespaces=false"),
        (bool(symbols), f"user-defined symbols of several characters ({symbols[:3]})"),
    ]
    for there, what in lacks:
        if there:
            raise UserError(
                f"tokenizer {path} has {what}, for which a tokenizer.json has no equal: give one that stands for the "
                "same tokens with --tokenizer."
            )


def _merges(pieces: Sequence[_Piece]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best piece's first.

    A user-defined symbol is merged with nothing.
    """
    normal = {piece.piece: piece.score for piece in pieces if piece.type == _Piece.NORMAL}
    merges = []
    for piece in sorted(normal, key=lambda piece: -normal[piece]):
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(a, b) for a, b in pairs if a in normal and b in normal]
    return merges


def _normalizer(rules: sentencepiece_model.NormalizerSpec) -> normalizers.Normalizer:
    steps = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_MARK))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _MARK)])
