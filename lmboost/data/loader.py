"""Batches from token records, with grain: a pure function of the data, the seed and the step.

A row of T tokens is a slice of a record. Rows have global numbers: row i is found from i alone, through grain's index
permutation (a new one each epoch, constant memory) and, for a mixture, grain's interleaving by weight. A step asks for
a range of rows, and a host reads its share of that range. So the position in the data is the step, and neither hosts,
workers, threads nor restarts change a batch.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags
from array_record.python import array_record_data_source

from lmboost import orphans
from lmboost.data import records
from lmboost.data.rows import Rows
from lmboost.errors import UserError, one_of

Batch = dict[str, np.ndarray]
_MAX_ROWS = 2**32 - 1  # of grain's index permutation


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Facts about one split of a data set or of a mixture.

    Attributes:
      directories, weights: the data sets and their shares, which sum to 1.
      fingerprint: of the records, and for a mixture also of the shares.
      tokenizer_fingerprint, vocab_size, bos_id, eos_id: of the tokenizer, which all data sets share.
      tokenizer_path: directory for `tokenizer.load`.
      record_tokens: greatest number that every row length must divide.
      documents, tokens, bytes: sums over the data sets; `tokens` are targets, each inside a document.
      bytes_per_token: UTF-8 bytes per target, weighted as the mixture draws; bits per byte are
        loss / (ln 2 * bytes_per_token).
    """

    directories: tuple[str, ...]
    weights: tuple[float, ...]
    fingerprint: str
    tokenizer_fingerprint: str
    tokenizer_path: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    record_tokens: int
    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float


def info(spec: str, split: str = "train") -> DataInfo:
    """Facts about `spec`: a prepared directory, or a mixture "DIR1=0.7,DIR2=0.3".

    Raises:
      UserError: `spec` can't be read, a directory is not a prepared data set, or the tokenizers differ.
    """
    one_of("split", split, records.SPLITS)
    directories, weights = zip(*_parse(spec), strict=True)
    manifests = [records.read_manifest(directory) for directory in directories]
    first = manifests[0]
    for directory, manifest in zip(directories, manifests, strict=True):
        if manifest["tokenizer_fingerprint"] != first["tokenizer_fingerprint"]:
            raise UserError(
                f"data={spec!r} mixes tokenizers: {directory} ({manifest['vocab_size']} pieces) was prepared with "
                f"another one than {directories[0]} ({first['vocab_size']} pieces). Prepare both with one --tokenizer."
            )
    counts = [manifest["splits"][split] for manifest in manifests]
    fingerprints = [manifest["fingerprint"] for manifest in manifests]
    mixed = hashlib.sha256(json.dumps([fingerprints, weights]).encode()).hexdigest()
    return DataInfo(
        directories=directories,
        weights=weights,
        fingerprint=fingerprints[0] if len(directories) == 1 else mixed,
        tokenizer_fingerprint=first["tokenizer_fingerprint"],
        tokenizer_path=str(pathlib.Path(directories[0]) / "tokenizer"),
        vocab_size=first["vocab_size"],
        bos_id=first["bos_id"],
        eos_id=first["eos_id"],
        record_tokens=math.gcd(*(manifest["record_tokens"] for manifest in manifests)),
        documents=sum(count["documents"] for count in counts),
        tokens=sum(count["tokens"] for count in counts),
        bytes=sum(count["bytes"] for count in counts),
        bytes_per_token=sum(w * c["bytes"] / c["tokens"] for w, c in zip(weights, counts, strict=True)),
    )


def _parse(spec: str) -> list[tuple[str, float]]:
    """The directories of a spec and their shares of the whole."""
    if not spec.strip():
        raise UserError("data is empty: expected a prepared directory, or DIR1=0.7,DIR2=0.3.")
    if os.path.isdir(os.path.expanduser(spec)) or ("," not in spec and "=" not in spec):
        return [(os.path.expanduser(spec), 1.0)]
    parts = []
    for part in spec.split(","):
        directory, _, weight = part.strip().rpartition("=")
        try:
            share = float(weight)
        except ValueError:
            share = math.nan
        if not directory or not (0 < share < math.inf):
            raise UserError(f"data={spec!r}: {part!r} is not DIR=WEIGHT with a weight above 0.")
        parts.append((os.path.expanduser(directory), share))
    total = sum(share for _, share in parts)
    return [(directory, share / total) for directory, share in parts]


class Windows:
    """Random access to the windows of a split in stored order: tokens [T + 1], their document starts, their length.

    Rows without any target (the padding of a shard's last record) are left out.
    """

    def __init__(self, directory: str, split: str, seq_len: int):
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
        self._row_ends = np.cumsum([-(-shard.positions // seq_len) for shard in shards])
        self._record_ends = np.cumsum([shard.records for shard in shards])
        if len(self) > _MAX_ROWS:
            raise UserError(
                f"{directory} has {len(self)} rows of seq_len={seq_len}, more than {_MAX_ROWS}: choose a longer "
                f"seq_len, or prepare it as several data sets and mix them."
            )
        # With the numbers of their records, so that files are not opened to count them.
        paths = [f"{path}[0:{shard.records}]" for path, shard in zip(self._files, shards, strict=True)]
        self._source = array_record_data_source.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return int(self._row_ends[-1])

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray, int]:
        shard = int(np.searchsorted(self._row_ends, row, side="right"))
        in_shard = row - (int(self._row_ends[shard - 1]) if shard else 0)
        record, slice_ = divmod(in_shard, self._rows_per_record)
        record += int(self._record_ends[shard - 1]) if shard else 0
        try:
            return window(self._read(record), slice_ * self._seq_len, self._seq_len)
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


def window(record: records.Record, offset: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens [T + 1] at `offset` of a record, where documents start among them, bool [T + 1], and the valid length."""
    tokens = record.tokens[offset : offset + seq_len + 1]
    starts = np.zeros(seq_len + 1, bool)
    inside = record.doc_starts - offset
    starts[inside[(inside >= 0) & (inside <= seq_len)]] = True
    return tokens, starts, min(max(record.length - offset, 0), seq_len + 1)


def batch_of(windows: Sequence[tuple[np.ndarray, np.ndarray, int]], batch_size: int, seq_len: int) -> Batch:
    """The batch of some windows, padded to `batch_size` rows B of `seq_len` tokens T.

    Returns:
      tokens, targets: int32 [B, T]; targets are the next tokens.
      segment_ids: int32 [B, T]; 1, 2, ... for the documents of a row, 0 for padding.
      positions: int32 [B, T]; from 0 at the start of each document and of the row.
      weights: float32 [B, T]; 1 where the target is a token of the same document as the input.
    """
    tokens = np.zeros((batch_size, seq_len + 1), np.int32)
    starts = np.zeros((batch_size, seq_len + 1), bool)
    lengths = np.zeros((batch_size, 1), np.int32)
    for row, each in enumerate(windows):
        tokens[row], starts[row], lengths[row] = each
    places = np.arange(seq_len + 1, dtype=np.int32)
    valid = places < lengths
    tokens *= valid
    starts[:, 0] = True
    begins = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    inputs = valid[:, :-1]
    return {
        "tokens": tokens[:, :-1].copy(),
        "targets": tokens[:, 1:].copy(),
        "segment_ids": (np.cumsum(starts[:, :-1], axis=1) * inputs).astype(np.int32),
        "positions": ((places - begins)[:, :-1] * inputs).astype(np.int32),
        "weights": (valid[:, 1:] & ~starts[:, 1:]).astype(np.float32),
    }


def make_rows(sources: Sequence[Windows], weights: Sequence[float], seed: int | None) -> grain.MapDataset:
    """Windows by global row number.

    With a seed: endless, shuffled anew each epoch of each data set, mixed by weight (grain rounds the shares to one
    part in a hundred of the smallest). Without: each row at most once, in stored order, mixed by weight.
    """
    parts = []
    for source in sources:
        rows = grain.MapDataset.source(source)
        if seed is not None:
            name = json.dumps([source.fingerprint, source.split, seed])
            # Hashed, because grain adds the epoch to the seed: neighbouring seeds would share permutations.
            rows = rows.shuffle(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])).repeat()
        parts.append(rows)
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


@dataclasses.dataclass(frozen=True)
class _FetchBatch(grain.transforms.Map):
    """This host's share of a step's batch. Picklable, for grain's worker processes."""

    rows: grain.MapDataset
    schedule: Callable[[int], tuple[int, int]]
    seq_len: int
    shards: tuple[int, ...]
    shard_count: int

    def map(self, step: int) -> Batch:
        first, count = self.schedule(int(step))
        if first < 0 or count < 1 or count % self.shard_count:
            raise UserError(
                f"step {step} asks for rows {first} to {first + count} in {self.shard_count} shards: "
                f"expected a positive number of rows that the shards divide evenly."
            )
        size = count // self.shard_count
        share = [first + shard * size + i for shard in self.shards for i in range(size)]
        there = [row for row in share if row < len(self.rows)]
        return batch_of([self.rows[row] for row in there], len(share), self.seq_len)


class Loader:
    """Batches of one split for one host.

    Args:
      spec: see `info`.
      split: "train" or "validation".
      seq_len: tokens per row, T; must divide the record length of every data set.
      seed: of the order of the training rows.
      shards, shard_count: a batch's rows are that many equal runs, and this host reads those with these numbers,
        in ascending order.
      workers: processes that read ahead; 0 reads in this process.
      threads: threads per process that read ahead; 0 reads when asked.

    Raises:
      UserError: a data set is missing, damaged or does not fit `seq_len`.
    """

    def __init__(
        self,
        spec: str,
        split: str,
        seq_len: int,
        seed: int = 0,
        shards: Sequence[int] = (0,),
        shard_count: int = 1,
        workers: int = 0,
        threads: int = 4,
    ):
        if not shards or list(shards) != sorted(set(shards)) or not 0 <= shards[0] <= shards[-1] < shard_count:
            raise UserError(
                f"shards={shards}: expected ascending numbers from 0 to shard_count - 1 = {shard_count - 1}."
            )
        for name, value in (("workers", workers), ("threads", threads)):
            if value < 0:
                raise UserError(f"{name}={value}: expected 0 or more.")
        self.info = info(spec, split)
        self.seq_len = seq_len
        self._shards = (tuple(shards), shard_count)
        self._workers, self._threads = workers, threads
        sources = [Windows(directory, split, seq_len) for directory in self.info.directories]
        self.rows = make_rows(sources, self.info.weights, seed)
        self.rows_in_order = make_rows(sources, self.info.weights, None)

    def batches(
        self, schedule: Callable[[int], tuple[int, int]], start_step: int = 0, stop_step: int | None = None
    ) -> Iterator[Batch]:
        """This host's batches of steps start_step, start_step + 1, ... before stop_step (None: endless).

        Args:
          schedule: maps a step to (first row, number of rows) of the global batch; a pure function, picklable if
            there are workers. The number may change between steps; the hosts must divide it evenly.
        """
        if start_step < 0 or (stop_step is not None and stop_step < start_step):
            raise UserError(f"start_step={start_step}, stop_step={stop_step}: expected 0 <= start_step <= stop_step.")
        return self._iterate(self.rows, schedule, start_step, sys.maxsize if stop_step is None else stop_step)

    def eval_batches(self, batch_size: int, num_batches: int | None = None) -> Iterator[Batch]:
        """This host's share of the first `num_batches` (None: all) batches of the split, in stored order.

        Every row comes once; the last batch is padded with rows of zero weight.
        """
        if batch_size < 1 or batch_size % self._shards[1]:
            raise UserError(f"batch_size={batch_size}: expected a positive multiple of the {self._shards[1]} shards.")
        stop = -(-len(self.rows_in_order) // batch_size)
        if num_batches is not None:
            stop = min(stop, num_batches)
        return self._iterate(self.rows_in_order, Rows(batch_size, candidates=1, selecting=()), 0, stop)

    def _iterate(self, rows: grain.MapDataset, schedule: Callable, start: int, stop: int) -> Iterator[Batch]:
        if start >= stop:
            return
        fetch = _FetchBatch(rows, schedule, self.seq_len, *self._shards)
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        dataset = grain.MapDataset.range(start, stop).map(fetch).to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # in a notebook or a test nobody has; grain's workers read flags
                flags.FLAGS.mark_as_parsed()
            orphans.start_tracker()
            options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options, _begin_worker)
        iterator = iter(dataset)
        try:
            for batch in iterator:  # copied: grain's workers hand over shared memory, which must not outlive them
                yield {name: np.array(value) for name, value in batch.items()} if self._workers else batch
        finally:
            iterator.close()


def _begin_worker(*_: int) -> None:
    """Has a worker live as long as the process that trains, which ends it when it has saved.

    Some clusters send SIGTERM to all processes of a job, and terminals SIGINT and SIGHUP.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    orphans.end_with_parent()
