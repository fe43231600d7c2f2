"""Rows of token records: a row of T tokens is a slice of a record, and a batch is some of them."""

import bisect
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_data_source

from lmboost.data import records, scored
from lmboost.errors import UserError

Batch = dict[str, np.ndarray]
_MAX_ROWS = 2**32 - 1  # of grain's index permutation


class Window(NamedTuple):
    """A row, and the token after it.

    Attributes:
      tokens: int32 [T + 1].
      starts: bool [T + 1], where documents start.
      length: how many tokens are valid.
      answers: what helpers have said of it, see `scored.Parts.like`, without the axis of rows.
    """

    tokens: np.ndarray
    starts: np.ndarray
    length: int
    answers: Mapping[str, np.ndarray] = {}


class Windows:
    """Random access to the windows of a split in stored order, with the answers to them if there are any.

    Rows without any target (the padding of a shard's last record) are left out.
    """

    def __init__(self, directory: str, split: str, seq_len: int, answers: scored.Answers | None = None):
        self._answers = answers
        manifest = records.read_manifest(directory)
        record_tokens = manifest["record_tokens"]
        if seq_len < 1 or record_tokens % seq_len:
            raise UserError(
                f"seq_len={seq_len} does not divide the {record_tokens} tokens of a record of {directory}: "
                f"choose a divisor, or prepare the data with another --record_tokens."
            )
        self.split, self.fingerprint = split, manifest["fingerprint"]
        self._vocab_size = manifest["vocab_size"]
        shards = manifest["shards"][split]
        self._files = [os.path.join(directory, shard.file) for shard in shards]
        for path, shard in zip(self._files, shards, strict=True):
            size = os.path.getsize(path) if os.path.isfile(path) else None
            if size != shard.file_bytes:
                found = "is missing" if size is None else f"has {size} bytes, expected {shard.file_bytes}"
                raise UserError(f"{path} {found}: copy the data set again or prepare it anew.")
        self._seq_len = seq_len
        self._rows_per_record = record_tokens // seq_len
        self._row_ends = list(itertools.accumulate(-(-shard.positions // seq_len) for shard in shards))
        self._record_ends = list(itertools.accumulate(shard.records for shard in shards))
        if len(self) > _MAX_ROWS:
            raise UserError(
                f"{directory} has {len(self)} rows of seq_len={seq_len}, more than {_MAX_ROWS}: choose a longer "
                f"seq_len, or prepare it as several data sets and mix them."
            )
        # With the numbers of their records, so that files are not opened to count them.
        paths = [f"{path}[0:{shard.records}]" for path, shard in zip(self._files, shards, strict=True)]
        self._source = array_record_data_source.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return self._row_ends[-1]

    def shards(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of each file of the split."""
        return list(zip([0, *self._row_ends[:-1]], self._row_ends, strict=True))

    def __getitem__(self, row: int) -> Window:
        answers = {} if self._answers is None else self._answers[row]
        shard = bisect.bisect_right(self._row_ends, row)
        in_shard = row - (self._row_ends[shard - 1] if shard else 0)
        record, slice_ = divmod(in_shard, self._rows_per_record)
        record += self._record_ends[shard - 1] if shard else 0
        try:
            return window(self._read(record), slice_ * self._seq_len, self._seq_len)._replace(answers=answers)
        except Exception as error:  # a damaged file shows in many ways: RuntimeError, DecodeError, IndexError
            raise UserError(
                f"{self._files[shard]} is damaged ({type(error).__name__}: {str(error)[:200]}): "
                f"copy the data set again or prepare it anew."
            ) from error

    def _read(self, number: int) -> records.Record:
        record = records.parse(self._source[number])
        tokens = record.tokens[: record.length]
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            raise ValueError(f"record {number} of the split has a token beyond the vocabulary of {self._vocab_size}")
        return record


def window(record: records.Record, offset: int, seq_len: int) -> Window:
    """The window at `offset` of a record."""
    tokens = record.tokens[offset : offset + seq_len + 1]
    starts = np.zeros(seq_len + 1, bool)
    inside = record.doc_starts - offset
    starts[inside[(inside >= 0) & (inside <= seq_len)]] = True
    return Window(tokens, starts, min(max(record.length - offset, 0), seq_len + 1))


def batch_of(windows: Sequence[Window], batch_size: int, seq_len: int, answers: Batch | None = None) -> Batch:
    """The batch of some windows, padded to `batch_size` rows B of `seq_len` tokens T.

    answers: arrays of those rows of which nothing is known, which those of the windows fill.

    Returns, beside these:
      tokens, targets: int32 [B, T]; targets are the next tokens.
      segment_ids: int32 [B, T]; 1, 2, ... for the documents of a row, 0 for padding.
      positions: int32 [B, T]; from 0 at the start of each document and of the row.
      weights: float32 [B, T]; 1 where the target is a token of the same document as the input.
    """
    tokens = np.zeros((batch_size, seq_len + 1), np.int32)
    starts = np.zeros((batch_size, seq_len + 1), bool)
    lengths = np.zeros((batch_size, 1), np.int32)
    answers = {} if answers is None else answers
    for row, each in enumerate(windows):
        tokens[row], starts[row], lengths[row], _ = each
        for name, values in answers.items():
            values[row] = each.answers[name]
    places = np.arange(seq_len + 1, dtype=np.int32)
    valid = places < lengths
    tokens *= valid
    starts[:, 0] = True
    begins = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    inputs = valid[:, :-1]
    return answers | {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "segment_ids": (np.cumsum(starts[:, :-1], axis=1) * inputs).astype(np.int32),
        "positions": ((places - begins)[:, :-1] * inputs).astype(np.int32),
        "weights": (valid[:, 1:] & ~starts[:, 1:]).astype(np.float32),
    }
