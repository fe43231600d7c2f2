"""Batches from token records, with grain: a pure function of the data, the seed and the step.

A row of T tokens is a slice of a record. Rows have global numbers: row i is found from i alone, through grain's index
permutation (a new one each epoch, constant memory) and, for a mixture, grain's interleaving by weight. A step asks for
a range of rows, and a host reads its share of that range. So the position in the data is the step, and neither hosts,
workers, threads nor restarts change a batch.
"""

import dataclasses
import gc
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

from lmboost import orphans
from lmboost.data import records, scored
from lmboost.data.retokenize import Retokenizer
from lmboost.data.rows import Rows
from lmboost.data.windows import Batch, Window, Windows, batch_of
from lmboost.errors import UserError, one_of


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Facts about one split of a data set or of a mixture.

    Attributes:
      directories, weights: the data sets and their shares, which sum to 1.
      fingerprint: of the records, and for a mixture also of the shares.
      fingerprints: of the records of each data set.
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
    fingerprints: tuple[str, ...]
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
    fingerprints = tuple(manifest["fingerprint"] for manifest in manifests)
    mixed = hashlib.sha256(json.dumps([fingerprints, weights]).encode()).hexdigest()
    return DataInfo(
        directories=directories,
        weights=weights,
        fingerprint=fingerprints[0] if len(directories) == 1 else mixed,
        fingerprints=fingerprints,
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


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """(number of the data set, number of the row) in the place of the rows of a data set."""

    number: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[int, int]:
        return self.number, int(row)


@dataclasses.dataclass(frozen=True)
class Ordered:
    """Windows by global row number. grain orders their numbers alone: it looks into all that passes through it."""

    sources: Sequence[Windows]
    numbers: grain.MapDataset

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Window:
        source, row = self.numbers[place]
        return self.sources[source][row]


def make_rows(sources: Sequence[Windows], weights: Sequence[float], seed: int | None) -> Ordered:
    """Windows by global row number.

    With a seed: endless, shuffled anew each epoch of each data set, mixed by weight (grain rounds the shares to one
    part in a hundred of the smallest). Without: each row at most once, in stored order, mixed by weight.
    """
    parts = []
    for number, source in enumerate(sources):
        rows = grain.MapDataset.source(_Numbers(number, len(source)))
        if seed is not None:
            name = json.dumps([source.fingerprint, source.split, seed])
            # Hashed, because grain adds the epoch to the seed: neighbouring seeds would share permutations.
            rows = rows.shuffle(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])).repeat()
        parts.append(rows)
    return Ordered(sources, parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights))


@dataclasses.dataclass(frozen=True)
class _FetchBatch(grain.transforms.Map):
    """This host's share of a step's batch. Picklable, for grain's worker processes."""

    rows: Sequence[Window]
    schedule: Callable[[int], tuple[int, int]]
    seq_len: int
    shards: tuple[int, ...]
    shard_count: int
    answers: scored.Parts | None = None  # of `groups`
    groups: tuple[str, ...] = ()
    retokenizers: tuple[Retokenizer, ...] = ()

    def map(self, step: int) -> Batch:
        first, count = self.schedule(int(step))
        if first < 0 or count < 1 or count % self.shard_count:
            raise UserError(
                f"step {step} asks for rows {first} to {first + count} in {self.shard_count} shards: "
                f"expected a positive number of rows that the shards divide evenly."
            )
        size = count // self.shard_count
        share = [first + shard * size + i for shard in self.shards for i in range(size)]
        there = [self.rows[row] for row in share if row < len(self.rows)]
        empty = self.answers and self.answers.like(len(share), self.groups)
        batch = batch_of(there, len(share), self.seq_len, empty)
        for retokenizer in self.retokenizers:
            batch |= retokenizer.rows(there, len(share), self.seq_len)
        return batch


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some rows of a data set."""

    windows: Windows
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Window:
        return self.windows[int(self.rows[place])]


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
        self.split, self.seq_len, self._seed = split, seq_len, seed
        self._shards = (tuple(shards), shard_count)
        self._workers, self._threads = workers, threads
        self.sources = [Windows(directory, split, seq_len) for directory in self.info.directories]
        self.rows = make_rows(self.sources, self.info.weights, seed)
        self.rows_in_order = make_rows(self.sources, self.info.weights, None)

    def batches(
        self,
        schedule: Callable[[int], tuple[int, int]],
        start_step: int = 0,
        stop_step: int | None = None,
        known: scored.Scored | None = None,
        groups: Sequence[str] = (),
        retokenizers: Sequence[Retokenizer] = (),
    ) -> Iterator[Batch]:
        """This host's batches of steps start_step, start_step + 1, ... before stop_step (None: endless).

        Args:
          schedule: maps a step to (first row, number of rows) of the global batch; a pure function, picklable if
            there are workers. The number may change between steps; the hosts must divide it evenly.
          known: has what helpers have said of the rows; batches have what is in these groups of it.
          retokenizers: make the rows of helpers that read other tokens; batches have these, too.
        """
        if start_step < 0 or (stop_step is not None and stop_step < start_step):
            raise UserError(f"start_step={start_step}, stop_step={stop_step}: expected 0 <= start_step <= stop_step.")
        stop_step = sys.maxsize if stop_step is None else stop_step
        if not groups:
            return self._iterate(self.rows, schedule, start_step, stop_step, retokenizers=tuple(retokenizers))
        sources = [
            Windows(directory, self.split, self.seq_len, known.answers(fingerprint, groups))
            for directory, fingerprint in zip(self.info.directories, self.info.fingerprints, strict=True)
        ]
        rows = make_rows(sources, self.info.weights, self._seed)
        return self._iterate(rows, schedule, start_step, stop_step, known.parts, tuple(groups))

    def first_rows(self, count: int) -> list[np.ndarray]:
        """Of each data set, the numbers of its rows that are among the first `count` of the order, ascending uint32."""
        found: list[set[int]] = [set() for _ in self.sources]
        for place in range(count):
            source, row = self.rows.numbers[place]
            found[source].add(row)
        return [np.array(sorted(rows), np.uint32) for rows in found]

    def chosen(self, source: int, rows: np.ndarray, batch_size: int) -> Iterator[Batch]:
        """This host's share of the batches that these rows of a data set make, in their order.

        The last batch is padded with rows of zero weight.
        """
        schedule = Rows(batch_size, candidates=1, selecting=())
        return self._iterate(_Chosen(self.sources[source], rows), schedule, 0, -(-len(rows) // batch_size))

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

    def _iterate(
        self,
        rows: Sequence[Window],
        schedule: Callable,
        start: int,
        stop: int,
        answers: scored.Parts | None = None,
        groups: tuple[str, ...] = (),
        retokenizers: tuple[Retokenizer, ...] = (),
    ) -> Iterator[Batch]:
        if start >= stop:
            return
        fetch = _FetchBatch(rows, schedule, self.seq_len, *self._shards, answers, groups, retokenizers)
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
            for batch in iterator:
                if self._workers:  # they hand over shared memory, which is given back before the batch is passed on
                    batch = {name: np.array(value) for name, value in batch.items()}
                yield batch
        finally:
            iterator.close()
            if self._workers:
                gc.collect()  # grain's last exception, by its frames, holds itself and the last batch's shared memory


def _begin_worker(*_: int) -> None:
    """Has a worker live as long as the process that trains, which ends it when it has saved.

    Some clusters send SIGTERM to all processes of a job, and terminals SIGINT and SIGHUP.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library would start a thread per core in each process
    orphans.end_with_parent()
