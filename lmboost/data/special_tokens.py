"""Which tokens begin and end a text, as the files beside a tokenizer say, in the order in which transformers asks them.

1. special_tokens_map.json, where tokenizer_config.json has no added_tokens_decoder; 2. tokenizer_config.json; in both,
null says that there is none; 3. the model file itself (SentencePiece); 4. the defaults of the class that
tokenizer_config.json or config.json names; 5. the ids in generation_config.json and config.json. Names are guessed only
where all of these say nothing and no class is named, and never one that begins a turn of a conversation.
Source: transformers 5, PreTrainedTokenizerBase._from_pretrained; the fifth is ours.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmboost import strict_json
from lmboost.errors import UserError

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MODEL, GENERATION = "config.json", "generation_config.json"
LARGEST_ID = 1 << 22  # more than ten times the largest vocabulary there is
_GUESSES = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}
_DEFAULTS = {  # by class: (bos, eos)
    "LlamaTokenizer": ("<s>", "</s>"), "CodeLlamaTokenizer": ("<s>", "</s>"), "GemmaTokenizer": ("<bos>", "<eos>"),
    "Qwen2Tokenizer": (None, "<|endoftext|>"), "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"), "CodeGenTokenizer": ("<|endoftext|>", "<|endoftext|>"),
}  # fmt: skip
_CLASSES = {  # by model_type
    "gpt2": "GPT2Tokenizer", "opt": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer", "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}  # fmt: skip
_HINT = "Mend it, or download it again."
_NOWHERE = "no file"
_TOKEN, _IDS = str | dict | None, int | list | None
_EXPECTED = {
    CONFIG: {"bos_token?": _TOKEN, "eos_token?": _TOKEN, "tokenizer_class?": str | None, "added_tokens_decoder?": dict},
    MAP: {"bos_token?": _TOKEN, "eos_token?": _TOKEN},
    ADDED: {},
    MODEL: {"tokenizer_class?": str | None, "model_type?": str | None, "bos_token_id?": _IDS, "eos_token_id?": _IDS},
    GENERATION: {"bos_token_id?": _IDS, "eos_token_id?": _IDS},
}


class Special(NamedTuple):
    """The ids of the tokens that begin and end a text, None where there is none, and which file says so.

    `stop_ids` are those with which a generated text ends: eos, and what generation_config.json or config.json has
    besides.
    """

    bos_id: int | None
    eos_id: int | None
    bos_from: str
    eos_from: str
    stop_ids: tuple[int, ...]


def ends(directory: str | os.PathLike) -> list[int]:
    """The ids that end a generation by the files in a Hub directory; there may be no such tokens."""
    return Beside(pathlib.Path(directory) / "tokenizer.json").ids("eos_token_id")


class Beside:
    """The files beside a tokenizer's own. Raises a UserError where one is not what it should be."""

    def __init__(self, tokenizer: pathlib.Path):
        self.tokenizer = tokenizer
        self._found = {
            name: strict_json.read(path, expected, _HINT)
            for name, expected in _EXPECTED.items()
            if (path := tokenizer.with_name(name)).is_file()
        }
        self._config, self._model = self._found.get(CONFIG, {}), self._found.get(MODEL, {})

    def added(self) -> dict[int, dict[str, Any]]:
        """Tokens by their ids, as the `tokenizers` library describes them, that the tokenizer has besides its own."""
        if CONFIG in self._found and "added_tokens_decoder" in self._config:
            where, pairs = CONFIG, self._config["added_tokens_decoder"].items()
        else:
            where, pairs = ADDED, [(i, {"content": piece}) for piece, i in self._found.get(ADDED, {}).items()]
        out = {}
        for key, token in pairs:
            wrong = strict_json.mismatch(token, {"content": str, "special?": bool}, f"the token {key}")
            if wrong or not str(key).isdecimal() or int(str(key)[:12]) > LARGEST_ID or isinstance(key, bool):
                wrong = wrong or f"{str(key)[:40]!r} is no id of a token (0 to {LARGEST_ID})"
                raise UserError(f"{self.tokenizer.with_name(where)}: {wrong}. {_HINT}")
            out[int(key)] = token
        return out

    def special(self, vocab: Mapping[str, int], own: tuple[str | None, str | None] | None = None) -> Special:
        """Which tokens of `vocab` are special. `own` are (bos, eos) of the model file, where it has such."""
        pieces = {i: piece for piece, i in vocab.items()}
        found = [self._token(i, name, vocab, pieces, own) for i, name in enumerate(_GUESSES)]
        if all(where == _NOWHERE for _, where in found) and not self._class():
            guesses = [next((piece for piece in names if piece in vocab), None) for names in _GUESSES.values()]
            found = [(piece, _NOWHERE if piece is None else "its name") for piece in guesses]
        (bos, bos_from), (eos, eos_from) = found
        bos_id, eos_id = (None if piece is None else vocab[piece] for piece in (bos, eos))
        ends = {i for i in (eos_id, *self.ids("eos_token_id")) if i in pieces}
        return Special(bos_id, eos_id, bos_from, eos_from, tuple(sorted(ends)))

    def _token(
        self, place: int, name: str, vocab: Mapping[str, int], pieces: Mapping[int, str], own: tuple | None
    ) -> tuple[str | None, str]:
        """(the piece, or None; where that was found)."""
        field = f"{name}_token"
        for file in (MAP, CONFIG) if "added_tokens_decoder" not in self._config else (CONFIG,):
            if field in self._found.get(file, {}):
                return self._named(file, field, vocab), file
        if own is not None:
            return own[place], self.tokenizer.name
        if (default := _DEFAULTS.get(kind := self._class(), (None, None))[place]) in vocab:
            return default, f"the default of {kind}"
        for i in self.ids(f"{field}_id"):
            if i in pieces:
                return pieces[i], f"{field}_id of {GENERATION} or {MODEL}"
        return None, _NOWHERE

    def _class(self) -> str:
        """Of the tokenizer in transformers; "" where nothing says which."""
        kind = self._config.get("tokenizer_class") or self._model.get("tokenizer_class")
        return (kind or _CLASSES.get(self._model.get("model_type"), "")).removesuffix("Fast")

    def _named(self, file: str, field: str, vocab: Mapping[str, int]) -> str | None:
        """The piece that a file names."""
        piece, where = self._found[file][field], self.tokenizer.with_name(file)
        if isinstance(piece, dict):
            strict_json.check(piece, {"content": str}, f"{where}: {field}", _HINT)
            piece = piece["content"]
        if piece is not None and piece not in vocab:
            raise UserError(
                f"{where}: {field}={piece!r} is not in the vocabulary of {self.tokenizer}. Name one that is, or save "
                "the tokenizer again with transformers, which writes all of its tokens to one tokenizer.json."
            )
        return piece

    def ids(self, field: str) -> list[int]:
        """The ids that generation_config.json, or else config.json, has in a field."""
        for file in (GENERATION, MODEL):
            if (value := self._found.get(file, {}).get(field)) is not None:
                ids = value if isinstance(value, list) else [value]
                strict_json.check({field: ids}, {field: [int]}, str(self.tokenizer.with_name(file)), _HINT)
                return ids
        return []
