"""Rows of another tokenizer: the text of a row of token records once more, in the tokens of a helper.

The text comes from the bytes of the tokens (`bytes_of`), document by document; both rows cover the same bytes, but for
those of a character that the row's border cuts. What comes out depends on the row alone.

Tokens of both sides are compared by where they end. Places count up through all rows of a batch: each document has one
for its begin, one for each of its bytes and one for its end, so the tokens that begin and end documents have places,
too. The rows of a batch are one after the other in all arrays here, as a call of numpy costs more than a row's work.
"""

import codecs
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lmboost.data import bytes_of
from lmboost.data.bytes_of import Pieces
from lmboost.data.windows import Batch, Window

# What helpers ask for: where each token ends (align), chunks of text (kd, the lead), the bytes of tokens (select).
ASKS = frozenset({"index", "chunks", "bytes"})


class Segments(NamedTuple):
    """The documents of some rows, or what of them is in a row, in order: S of them.

    Attributes:
      raw: their bytes.
      bases: places of their begins, int64 [S].
      begins, is_whole: bool [S], whether the document's begin and end are in the row.
      rows: of each the number of its row, int64 [S].
      numbers: its number in its row, from 1, int64 [S].
    """

    raw: list[bytes]
    bases: np.ndarray
    begins: np.ndarray
    is_whole: np.ndarray
    rows: np.ndarray
    numbers: np.ndarray


class Tokens(NamedTuple):
    """The tokens of some rows by one tokenizer.

    Attributes:
      ids: int32 [tokens].
      ends: places at which they end, int64 [tokens], not falling.
      counts: how many there are of each segment, int64 [S].
      exact: bool [tokens]; whether just the bytes up to `ends` are in the tokens so far.
    """

    ids: np.ndarray
    ends: np.ndarray
    counts: np.ndarray
    exact: np.ndarray


class Rows(NamedTuple):
    """Rows by both tokenizers.

    Attributes:
      segments, own, other: the rows.
      changed: (first, last) place of each span that the other tokenizer has changed.
    """

    segments: Segments
    own: Tokens
    other: Tokens
    changed: list[tuple[int, int]]

    @property
    def places(self) -> int:
        """How many places there are."""
        return int(self.segments.bases[-1]) + len(self.segments.raw[-1]) + 2


def segments_of(windows: Sequence[Window], data: Pieces) -> tuple[Segments, Tokens]:
    """The documents of some rows, the last one of each with the token after the row, if that is of it."""
    lengths = np.array([window.length for window in windows])
    # A document of which there is only the token after the row is not of it.
    counts = lengths - [w.length == len(w.tokens) and bool(w.starts[w.length - 1]) for w in windows]
    ids = np.concatenate([w.tokens[:n] for w, n in zip(windows, counts, strict=True)])
    starts = np.concatenate([w.starts[:n] for w, n in zip(windows, counts, strict=True)])
    row_stops = np.cumsum(counts)
    is_first = starts.copy()
    is_first[(row_stops - counts)[counts > 0]] = True
    firsts = np.flatnonzero(is_first)
    stops = np.append(firsts[1:], len(ids))[: len(firsts)]
    rows, begins = np.searchsorted(row_stops, firsts, "right"), starts[firsts]
    # One token may begin and end documents; alone at a begin it is that.
    eos = -1 if data.tokenizer.eos_id is None else data.tokenizer.eos_id
    closes = (ids[stops - 1] == eos) & ~(begins & (stops == firsts + 1))
    is_whole = closes | (stops - (row_stops - counts)[rows] < lengths[rows])
    text, ends = data.spell(ids)
    high = ends[stops - 1]
    low = np.append(0, high[:-1])
    if data.puts_space:
        with_space = (text[first : min(first + 1, stop)] == b" " for first, stop in zip(low, high, strict=True))
        low += begins & np.fromiter(with_space, bool, len(low))
    places, counts = high - low + 2, stops - firsts
    bases = np.cumsum(places) - places
    ends += np.repeat(bases - low, counts)
    if data.puts_space:  # what begins with that space alone ends where the document begins
        np.maximum(ends, np.repeat(bases, counts), out=ends)
    ends[stops[closes] - 1] = (bases + places - 1)[closes]
    raw = [text[first:stop] for first, stop in zip(low.tolist(), high.tolist(), strict=True)]
    numbers = np.arange(len(firsts)) - np.searchsorted(rows, rows) + 1
    return Segments(raw, bases, begins, is_whole, rows, numbers), Tokens(ids, ends, counts, np.ones(len(ids), bool))


def text_of(raw: bytes) -> tuple[int, int, str]:
    """(first byte, the one after the last, the text between): all whole characters of a segment."""
    first = next((i for i, byte in enumerate(raw[:4]) if byte & 0xC0 != 0x80), min(len(raw), 4))
    text, used = codecs.utf_8_decode(raw[first:], "replace", False)
    return first, first + used, text


def encode(segments: Segments, other: Pieces) -> tuple[Tokens, list[tuple[int, int]]]:
    """(the same segments in the tokens of another tokenizer, the places of what this has changed)."""
    texts = [text_of(raw) for raw in segments.raw]
    encoded = other.tokenizer.encode_batch([text for *_, text in texts])
    ids, counts = np.concatenate([np.zeros(0, np.int32), *encoded]), np.array([len(ids) for ids in encoded], np.int64)
    ends, stops = np.cumsum(other.lengths[ids]), np.cumsum(counts)
    high = np.concatenate([[0], ends])[stops]
    low = np.concatenate([[0], high[:-1]])
    exact, changed = np.ones(len(ids), bool), []
    ends += np.repeat(segments.bases + [first for first, *_ in texts] - low, counts)
    for i, (raw, (first, stop, _)) in enumerate(zip(segments.raw, texts, strict=True)):
        if other.keeps and high[i] - low[i] == stop - first:
            continue
        here, base = slice(stops[i] - counts[i], stops[i]), segments.bases[i] + first
        if (own := other.join(ids[here])) != raw[first:stop]:
            found, exact[here], span = places(raw[first:stop], own, ends[here] - base, other.puts_space)
            ends[here] = base + found
            changed += [(base + span[0], base + span[1])] if span else []
    # Tokens that begin and end documents come between those of texts.
    both = lambda begin, end: np.stack([begin, end], 1).reshape(-1)  # noqa: E731
    bos, eos = other.tokenizer.bos_id, other.tokenizer.eos_id
    there = both(segments.begins & (bos is not None), segments.is_whole & (eos is not None))
    lasts = segments.bases + np.array([len(raw) + 1 for raw in segments.raw], np.int64)
    at = both(stops - counts, stops)[there]
    at += np.arange(len(at))
    is_text = np.ones(len(ids) + len(at), bool)
    is_text[at] = False

    def whole(of_texts: np.ndarray, of_documents: np.ndarray | bool) -> np.ndarray:
        found = np.empty(len(is_text), of_texts.dtype)
        found[is_text], found[at] = of_texts, of_documents
        return found

    ids = whole(ids, np.tile([bos or 0, eos or 0], len(counts))[there])
    ends = whole(ends, both(segments.bases, lasts)[there])
    exact = whole(exact, True) if changed else np.ones(len(ids), bool)
    return Tokens(ids, ends, counts + there.reshape(-1, 2).sum(1), exact), changed


def places(
    raw: bytes, own: bytes, ends: np.ndarray, puts_space: bool
) -> tuple[np.ndarray, np.ndarray, tuple[int, int] | None]:
    """(after how many bytes of `raw` each token of its text ends; whether that is exact; which bytes were changed).

    What a tokenizer changes in a text before it splits it (normal forms, white space) is taken as one span, from the
    first byte that differs to the last one, in which no token has an end.

    Args:
      raw: the bytes of the text.
      own, ends: the bytes of its tokens, and after how many of them each ends.
      puts_space: whether the tokenizer begins a text with a space that it has not itself.
    """
    if puts_space and own.startswith(b" "):
        own, ends = own[1:], np.maximum(ends - 1, 0)
    if own == raw:
        return ends, np.ones(len(ends), bool), None
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


def index_of(rows: Rows) -> np.ndarray:
    """Of each own token the last other one that ends where it does or before, int64 [own tokens].

    -1 where there is none in its document, and in what the other tokenizer has changed.
    """
    _, own, other, changed = rows
    # Looking up by place is faster than searching: how many of the other tokens end there or before.
    index = np.cumsum(np.bincount(other.ends, minlength=rows.places))[own.ends] - 1
    there = index >= np.repeat(np.cumsum(other.counts) - other.counts, own.counts)
    if changed:
        inside = np.zeros(rows.places, bool)
        for low, high in changed:
            inside[low + 1 : high] = True
        there &= ~inside[own.ends]
    index[~there] = -1
    return index


def chunks_of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Of each own token, and of each other one, the number of the chunk that it lies in, int64, from 1 in each row.

    A chunk is the tokens from one place at which both sides have an end to the next; 0 is none. One that touches what
    the other tokenizer has changed is none.
    """
    segments, own, other, changed = rows
    is_shared, theirs = np.zeros(rows.places, bool), np.zeros(rows.places, bool)
    is_shared[own.ends], theirs[other.ends if other.exact.all() else other.ends[other.exact]] = True, True
    is_shared &= theirs
    shared = np.flatnonzero(is_shared)
    closes = np.ones(len(shared) + 1, bool)
    closes[np.searchsorted(shared, segments.bases)] = False
    if changed:
        # What it has put between two bytes has the same place twice, and is touched on both sides.
        touched = np.zeros(rows.places, bool)
        for low, high in changed:
            touched[min(low, high - 1) + 1 : max(high, low + 1) + 1] = True
        closes[1:-1] &= np.diff(np.cumsum(touched)[shared]) == 0
    closes[-1] = False  # of tokens that end after all that is shared
    # Numbers begin anew in each row.
    numbers = np.cumsum(closes)
    firsts = np.searchsorted(shared, segments.bases[segments.numbers == 1])
    numbers -= np.repeat(numbers[firsts], np.diff(firsts, append=len(numbers)))
    numbers *= closes

    def of(ends: np.ndarray) -> np.ndarray:
        ends_one = is_shared[ends]
        return numbers[np.cumsum(ends_one & (np.diff(ends, prepend=-1) > 0)) - ends_one]

    return of(own.ends), of(other.ends)


@dataclasses.dataclass(frozen=True)
class Retokenizer:
    """Makes rows of another tokenizer. Picklable: each process of the loader reads the tokenizers for itself.

    Attributes:
      name: of whom the rows are for ("teacher", "scorer").
      data, path: the tokenizer of the records, and the other one, as `tokenizer.load` finds them.
      seq_len: tokens of the other rows, U; a longer one is cut.
      asks: what is asked for besides the tokens themselves, of ASKS.
    """

    name: str
    data: str
    path: str
    seq_len: int
    asks: frozenset[str] = ASKS

    def rows(self, windows: Sequence[Window], batch_size: int, seq_len: int) -> Batch:
        """The rows of some windows, padded to `batch_size` rows B; the windows have `seq_len` tokens T.

        Returns, each after the name and "_":
          tokens, segment_ids, positions: int32 [B, U], as in `windows.batch_of`.
          targets, weights: [B, U], as there; where chunks or bytes are asked for.
          index: int32 [B, T]; of each token, the last one of the other row that ends where it does or before; -1 where
            there is none, or its place is beyond a row that was cut.
          chunks, own_chunks: int32 [B, T] and [B, U]; of each target the number of its chunk in the row, from 1, or 0.
          bytes: int32 [B, U], of each target.
        """
        batch = self.padded(batch_size, seq_len)
        if windows:
            rows = {name.removeprefix(f"{self.name}_"): value for name, value in batch.items()}
            _fill(rows, self.read(windows))
            if "bytes" in rows:
                rows["bytes"][:] = bytes_of.load(self.path).lengths[rows["targets"]] * (rows["weights"] > 0)
        return batch

    def padded(self, batch_size: int, seq_len: int) -> Batch:
        """As `rows`, of no window at all."""
        whole, theirs = (batch_size, seq_len), (batch_size, self.seq_len)
        batch = {name: np.zeros(theirs, np.int32) for name in ("tokens", "segment_ids", "positions")}
        if self.asks & {"chunks", "bytes"}:
            batch |= {"targets": np.zeros(theirs, np.int32), "weights": np.zeros(theirs, np.float32)}
        if "chunks" in self.asks:
            batch |= {"chunks": np.zeros(whole, np.int32), "own_chunks": np.zeros(theirs, np.int32)}
        if "index" in self.asks:
            batch["index"] = np.full(whole, -1, np.int32)
        if "bytes" in self.asks:
            batch["bytes"] = np.zeros(theirs, np.int32)
        return {f"{self.name}_{name}": value for name, value in batch.items()}

    def read(self, windows: Sequence[Window]) -> Rows:
        """Some windows by both tokenizers, those of the other one uncut."""
        segments, own = segments_of(windows, bytes_of.load(self.data))
        return Rows(segments, own, *encode(segments, bytes_of.load(self.path)))


def _fill(batch: Batch, rows: Rows) -> None:
    """Writes what a batch has room for; see `Retokenizer.rows`."""
    segments, own, other, _ = rows
    rows = rows._replace(other=(other := _cut(other, segments.rows, most := batch["tokens"].shape[1])))
    borders, own_borders = _borders(other, segments.rows), _borders(own, segments.rows)
    positions = _places(other.counts)
    inputs = {"tokens": other.ids, "segment_ids": np.repeat(segments.numbers, other.counts), "positions": positions}
    _write(batch, inputs, borders, 0)
    if "targets" in batch:
        _write(batch, {"targets": other.ids, "weights": positions > 0}, borders, 1)
    if "index" in batch:
        index = index_of(rows)
        columns = index - np.repeat(borders[:-1], np.diff(own_borders))
        columns[(index < 0) | (columns >= most)] = -1
        _write(batch, {"index": columns}, own_borders, 0)
    if "chunks" in batch:
        chunks, own_chunks = chunks_of(rows)
        _write(batch, {"chunks": chunks}, own_borders, 1)
        _write(batch, {"own_chunks": own_chunks}, borders, 1)


def _places(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... of each of some runs."""
    places = np.arange(counts.max(initial=0))
    return np.concatenate([places[:0], *(places[:count] for count in counts.tolist())])


def _borders(tokens: Tokens, rows: np.ndarray) -> np.ndarray:
    """Where the rows begin and, one more, where the last one ends."""
    return np.cumsum(np.bincount(rows + 1, tokens.counts)).astype(int)


def _cut(tokens: Tokens, rows: np.ndarray, most: int) -> Tokens:
    """The tokens without those of a row after `most` inputs and one more label."""
    lengths = np.diff(_borders(tokens, rows))
    if (lengths <= most + 1).all():
        return tokens
    kept = _places(lengths) <= most
    counts = np.bincount(np.repeat(np.arange(len(rows)), tokens.counts)[kept], minlength=len(rows))
    return Tokens(tokens.ids[kept], tokens.ends[kept], counts, tokens.exact[kept])


def _write(batch: Batch, arrays: Batch, borders: np.ndarray, skip: int) -> None:
    """Writes what rows have, one after the other between these borders, but the first `skip`, to those of a batch."""
    borders = borders.tolist()
    for name, values in arrays.items():
        for row, first, stop in zip(batch[name], borders, borders[1:], strict=False):
            stop = min(stop, first + skip + len(row))
            row[: max(stop - first - skip, 0)] = values[first + skip : stop]


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
    segments, own, other, changed = Retokenizer("", data, path, 0).read(windows)
    pieces = bytes_of.load(data)
    same = 1 - sum(high - low for low, high in changed) / max(int(pieces.lengths[own.ids].sum()), 1)
    unknown = 0 if pieces.unknown is None else int((own.ids == pieces.unknown).sum())
    longest = int(np.diff(_borders(other, segments.rows)).max(initial=0))
    return Measured(longest, len(other.ids) / max(len(own.ids), 1), same, unknown)
