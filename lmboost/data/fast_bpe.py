"""The ids of a `tokenizer.json`, many times as fast: by fastokens, where it is installed and gives the same ids.

Equal ids are not taken on trust. A tokenizer of a kind that fastokens does not have, or with other ids on a text of
all sorts of characters, is read by Hugging Face's library as if fastokens were not there; later every 1,024th text is
encoded by both, and a difference is an error.
"""

import importlib.util
import os
from collections.abc import Sequence

import numpy as np
import tokenizers

from lmboost.errors import UserError

_EVERY = 1024  # so that comparing costs a few percent: Hugging Face's library takes about 60 times as long
_PROBE = (
    *(" ".join(map(chr, codes)) for codes in (range(0x20), range(0x20, 0x250), range(0x250, 0xD800, 11))),
    *(" ".join(map(chr, codes)) for codes in (range(0xE000, 0x30000, 101), range(0x30000, 0x110000, 9973))),
    "It's  1234567 o'clock,\tI'LL\r\n\r\n   wait!?   \u3000\u2581\u2028e\u0301\u200d\U0001f926\U0001f3fd </s> <0x41>  ",
    "",
)


class FastBpe:
    """Encodes as the tokenizer that it is made of does, special tokens as text.

    Attributes:
      model: Hugging Face's.
    """

    def __init__(self, model: tokenizers.Tokenizer):
        import fastokens

        self.model, self._seen = model, 0
        self._fast = fastokens.Tokenizer.from_json_str(model.to_str())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [tokens]; a UserError where they are found not to be those of `model`."""
        found = self._encode(texts)
        for i in range(-self._seen % _EVERY, len(texts), _EVERY):
            if not self._same(texts[i], found[i]):
                raise UserError(
                    f"fastokens gives other ids than the tokenizers library for the text {texts[i][:80]!r}: remove it "
                    "(pip uninstall fastokens), which makes this slower and right, and report the text to its makers."
                )
        self._seen += len(texts)
        return found

    def is_exact(self) -> bool:
        """Whether the ids of a text of all sorts of characters are those of `model`."""
        return all(map(self._same, _PROBE, self._encode(_PROBE)))

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            ids, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        except ValueError:  # its answer to a byte that has no token, which Hugging Face's library leaves out
            if len(texts) == 1:
                return [np.asarray(self.model.encode(texts[0], add_special_tokens=False).ids, np.int32)]
            half = len(texts) // 2
            return self._encode(texts[:half]) + self._encode(texts[half:])
        flat = np.frombuffer(ids, np.uint32).astype(np.int32)
        ends = np.frombuffer(offsets, np.uint64).tolist()
        return [flat[first:last] for first, last in zip(ends, ends[1:], strict=False)]

    def _same(self, text: str, ids: np.ndarray) -> bool:
        return self.model.encode_batch_fast([text], add_special_tokens=False)[0].ids == ids.tolist()


def make(model: tokenizers.Tokenizer) -> FastBpe | None:
    """Of a tokenizer whose `encode_special_tokens` is set; None where fastokens cannot stand in for it."""
    if importlib.util.find_spec("fastokens") is None:
        return None
    os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # texts are divided among processes already
    try:
        fast = FastBpe(model)
    except ValueError:  # its answer where it does not have this kind
        return None
    return fast if fast.is_exact() else None
