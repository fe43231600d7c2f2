"""Rows of another tokenizer: the text of a row of token records once more, in the tokens of a helper.

The text comes from the bytes of the tokens (`bytes_of`), document by document; both rows cover the same bytes, but for
those of a character that the row's border cuts. What comes out depends on the row alone.

Tokens of both sides are compared by where they end. Places count up through a row: each document has one for its
begin, one for each of its bytes and one for its end, so the tokens that begin and end documents have places, too.
"""

import codecs
import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmboost.data import bytes_of
from lmboost.data.bytes_of import Pieces
from lmboost.data.windows import Batch, Window


class Segment(NamedTuple):
    """A document, or the part of one that is in a row.

    Attributes:
      raw: its bytes.
      ends: after how many of them each of the row's own tokens ends, int64; one more for the token that ends it.
      begins, is_whole: whether the document's begin and end are in the row.
    """

    raw: bytes
    ends: np.ndarray
    begins: bool
    is_whole: bool


class Tokens(NamedTuple):
    """The tokens of a row by one tokenizer.

    Attributes:
      ids: int32 [tokens].
      ends: places at which they end, int64 [tokens], not falling.
      segments: int32 [tokens]; 1, 2, ... for the documents.
      exact: bool [tokens]; whether just the bytes up to `ends` are in the tokens so far.
    """

    ids: np.ndarray
    ends: np.ndarray
    segments: np.ndarray
    exact: np.ndarray


class Map(NamedTuple):
    """What two rows of one text have in common.

    Attributes:
      index: of each token, the last one of the other row that ends where it does or before, int64 [tokens]; -1 where
        there is none.
      chunks, other_chunks: by the tokens of each row, the number of the chunk that they lie in, from 1; 0 is none. A
        chunk is the tokens from one place at which both rows have an end to the next.
    """

    index: np.ndarray
    chunks: np.ndarray
    other_chunks: np.ndarray


def segments_of(window: Window, data: Pieces) -> list[Segment]:
    """The documents of a row, the last one with the token after the row, if that is of it."""
    ids, starts, eos = window.tokens[: window.length], window.starts[: window.length], data.tokenizer.eos_id
    lengths = data.lengths[ids]
    firsts = [0, *(np.flatnonzero(starts[1:]) + 1)] if window.length else []
    found = []
    for first, stop in itertools.pairwise([*firsts, window.length]):
        raw, ends, begins = data.join(ids[first:stop]), np.cumsum(lengths[first:stop]), bool(starts[first])
        if begins and data.puts_space and raw.startswith(b" "):
            raw, ends = raw[1:], np.maximum(ends - 1, 0)
        # One token may begin and end documents; alone at a begin it is that.
        closes = eos is not None and ids[stop - 1] == eos and not (begins and stop == first + 1)
        if closes:
            ends[-1] = len(raw) + 1
        found.append(Segment(raw, ends, begins, closes or stop < window.length))
    return found[:-1] if window.length == len(window.tokens) and starts[-1] else found


def text_of(segment: Segment) -> tuple[int, int, str]:
    """(first byte, the one after the last, the text between): all whole characters of a segment."""
    first = next((i for i, byte in enumerate(segment.raw[:4]) if byte & 0xC0 != 0x80), min(len(segment.raw), 4))
    text, used = codecs.utf_8_decode(segment.raw[first:], "replace", False)
    return first, first + used, text


def places(raw: bytes, ids: np.ndarray, pieces: Pieces) -> tuple[np.ndarray, np.ndarray, tuple[int, int] | None]:
    """(after how many bytes of `raw` each token of its text ends; whether that is exact; which bytes were changed).

    What a tokenizer changes in a text before it splits it (normal forms, white space) is taken as one span, from the
    first byte that differs to the last one, in which no token has an end.
    """
    own, ends = pieces.join(ids), np.cumsum(pieces.lengths[ids])
    if pieces.puts_space and own != raw and own.startswith(b" "):
        own, ends = own[1:], np.maximum(ends - 1, 0)
    if own == raw:
        return ends, np.ones(len(ids), bool), None
    a, b = np.frombuffer(raw, np.uint8), np.frombuffer(own, np.uint8)
    shorter = min(len(a), len(b))
    low = _equal(a[:shorter], b[:shorter])
    tail = _equal(a[len(a) - shorter + low :][::-1], b[len(b) - shorter + low :][::-1])
    high = len(a) - tail
    before, after = ends <= low, ends >= len(b) - tail
    ends = np.where(before, ends, np.where(after, ends + len(a) - len(b), high))
    return ends, before | after, (low, high)


def _equal(a: np.ndarray, b: np.ndarray) -> int:
    """How many of the first entries are equal."""
    differ = a != b
    return int(differ.argmax()) if differ.any() else len(a)


def compare(own: Tokens, other: Tokens, changed: Sequence[tuple[int, int]]) -> Map:
    """What the row has in common with that of another tokenizer.

    changed: (first, last) places of each span that the other one has changed; a chunk that touches one is none. Where
      it has put something between two bytes these are the same place, and touched on both sides.
    """
    index = np.searchsorted(other.ends, own.ends, "right") - 1
    there = index >= 0
    there[there] = other.segments[index[there]] == own.segments[there]
    # Both are in order, so no sorting is needed to find what is in both.
    ends, theirs = own.ends[np.diff(own.ends, prepend=-1) > 0], other.ends[other.exact]
    shared = ends[np.searchsorted(theirs, ends, "left") < np.searchsorted(theirs, ends, "right")]
    segments = own.segments[np.searchsorted(own.ends, shared)]
    closes = np.concatenate([np.zeros(min(len(shared), 1), bool), segments[1:] == segments[:-1]])
    begins = np.concatenate([shared[:1], shared[:-1]])
    for low, high in changed:
        there &= (own.ends <= low) | (own.ends >= high)
        closes &= (begins >= max(high, low + 1)) | (shared <= min(low, high - 1))
    # One more, for tokens that end after all that is shared.
    numbers = np.concatenate([np.cumsum(closes) * closes, [0]])
    chunks, other_chunks = (numbers[np.searchsorted(shared, ends, "left")] for ends in (own.ends, other.ends))
    return Map(np.where(there, index, -1), chunks, other_chunks)


@dataclasses.dataclass(frozen=True)
class Retokenizer:
    """Makes rows of another tokenizer. Picklable: each process of the loader reads the tokenizers for itself.

    Attributes:
      name: of whom the rows are for ("teacher", "scorer").
      data, path: the tokenizer of the records, and the other one, as `tokenizer.load` finds them.
      seq_len: tokens of the other rows, U; a longer one is cut.
    """

    name: str
    data: str
    path: str
    seq_len: int

    def rows(self, windows: Sequence[Window], batch_size: int, seq_len: int) -> Batch:
        """The rows of some windows, padded to `batch_size` rows B; the windows have `seq_len` tokens T.

        Returns, each after the name and "_":
          tokens, targets, segment_ids, positions, weights: [B, U], as in `windows.batch_of`.
          index: int32 [B, T]; of each token, the last one of the other row that ends where it does or before; -1 where
            there is none, or its place is beyond a row that was cut.
          chunks, own_chunks: int32 [B, T] and [B, U]; of each target the number of its chunk in the row, from 1, or 0.
        """
        batch = self.padded(batch_size, seq_len)
        for row, both in enumerate(self.read(windows)):
            _fill({name.removeprefix(f"{self.name}_"): value[row] for name, value in batch.items()}, *both)
        return batch

    def padded(self, batch_size: int, seq_len: int) -> Batch:
        """As `rows`, of no window at all."""
        whole, theirs = (batch_size, seq_len), (batch_size, self.seq_len)
        batch = {name: np.zeros(theirs, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        batch |= {"own_chunks": np.zeros(theirs, np.int32), "chunks": np.zeros(whole, np.int32)}
        batch |= {"index": np.full(whole, -1, np.int32), "weights": np.zeros(theirs, np.float32)}
        return {f"{self.name}_{name}": value for name, value in batch.items()}

    def read(self, windows: Sequence[Window]) -> list[tuple[Tokens, Tokens, list[tuple[int, int]]]]:
        """Of each window its own tokens, those of the other row, uncut, and the places of what this has changed."""
        data, other = bytes_of.load(self.data), bytes_of.load(self.path)
        parts = [segments_of(window, data) for window in windows]
        texts = [text_of(segment) for segments in parts for segment in segments]
        encoded = iter(zip(texts, other.tokenizer.encode_batch([text for *_, text in texts]), strict=True))
        return [
            _both(window.tokens, segments, [next(encoded) for _ in segments], other)
            for window, segments in zip(windows, parts, strict=True)
        ]


def _both(tokens: np.ndarray, segments: Sequence[Segment], encoded: Sequence, other: Pieces):
    """As `Retokenizer.read`, of a row whose segments have been encoded: ((first, stop, text), ids) of each."""
    bos, eos = ([] if i is None else [i] for i in (other.tokenizer.bos_id, other.tokenizer.eos_id))
    base, changed, own, theirs = 0, [], [], []
    for number, (segment, ((first, stop, _), ids)) in enumerate(zip(segments, encoded, strict=True), 1):
        ends, exact, span = places(segment.raw[first:stop], ids, other)
        begin, end = bos * segment.begins, eos * segment.is_whole
        ids = np.concatenate([begin, ids, end]).astype(np.int32)
        last = base + len(segment.raw) + 1
        ends = np.concatenate([[base] * len(begin), base + first + ends, [last] * len(end)]).astype(np.int64)
        exact = np.concatenate([[True] * len(begin), exact, [True] * len(end)]).astype(bool)
        theirs.append((ids, ends, np.full(len(ids), number, np.int32), exact))
        own.append((base + segment.ends, np.full(len(segment.ends), number, np.int32)))
        changed += [(base + first + span[0], base + first + span[1])] if span else []
        base = last + 1
    ends, numbers = (np.concatenate(part) for part in zip(*own, strict=True))
    mine = Tokens(tokens[: len(ends)], ends, numbers, np.ones(len(ends), bool))
    return mine, Tokens(*(np.concatenate(part) for part in zip(*theirs, strict=True))), changed


def _fill(row: Batch, own: Tokens, other: Tokens, changed: Sequence[tuple[int, int]]) -> None:
    """Writes a row of a batch; see `Retokenizer.rows`."""
    seq_len, length = len(row["index"]), len(row["tokens"])
    other = Tokens(*(x[: length + 1] for x in other))
    common = compare(own, other, changed)
    inputs, labels = len(other.ids[:length]), max(len(other.ids) - 1, 0)
    begins = np.concatenate([[True], other.segments[1:] != other.segments[:-1]])[:inputs]
    places = np.arange(inputs)
    row["tokens"][:inputs], row["segment_ids"][:inputs] = other.ids[:inputs], other.segments[:inputs]
    row["positions"][:inputs] = places - np.maximum.accumulate(np.where(begins, places, 0))
    row["targets"][:labels] = other.ids[1:]
    row["weights"][:labels] = other.segments[1:] == other.segments[:-1]
    row["own_chunks"][:labels] = common.other_chunks[1:]
    index = common.index[:seq_len]
    row["index"][: len(index)] = np.where(index < length, index, -1)
    row["chunks"][: len(own.ids) - 1] = common.chunks[1:]


class Measured(NamedTuple):
    """What rows are in another tokenizer.

    Attributes:
      longest: tokens of the longest row.
      ratio: tokens for each of the row's own.
      same: share of the bytes that the tokenizer does not change.
      unknown: tokens of the rows that stand for what their tokenizer has no token for.
    """

    longest: int
    ratio: float
    same: float
    unknown: int


def measure(windows: Sequence[Window], data: str, path: str) -> Measured:
    """What these rows are in the tokenizer in `path`; theirs is in `data`."""
    read, pieces = Retokenizer("", data, path, 0).read(windows), bytes_of.load(data)
    size = sum(int(pieces.lengths[own.ids].sum()) for own, _, _ in read)
    changed = sum(high - low for *_, spans in read for low, high in spans)
    counts = [len(other.ids) for _, other, _ in read]
    unknown = sum(int((own.ids == pieces.unknown).sum()) for own, _, _ in read if pieces.unknown is not None)
    ratio = sum(counts) / max(sum(len(own.ids) for own, _, _ in read), 1)
    return Measured(max(counts, default=0), ratio, 1 - changed / max(size, 1), unknown)
