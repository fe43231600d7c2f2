"""What helpers have said of the rows of data sets: written once by lmboost.score, read beside the rows by the loader.

A directory with `manifest.json` and, for each data set, one ArrayRecord file a shard of it and group: a record is what
is known of a row of `seq_len` tokens. Rows are those of `loader.Windows`, so neither their order, epochs, mixtures,
hosts nor restarts matter. Two groups, as one may be of fewer rows than the other: "labels" (soft labels, the teacher's
loss on the labels, selection scores), and "states" that guide the student's.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_data_source

from lmboost import strict_json
from lmboost.errors import UserError, one_of

MANIFEST = "manifest.json"
FORMAT = 1
GROUPS = ("labels", "states")
BASIS = "basis-{}.npy"  # float32 [width of the teacher, what is kept]; of each layer whose states are not kept whole
KINDS = ("draws", "best")
_HINT = "Put back the manifest that was written, or score again."
_MANIFEST = {
    "fingerprint": str, "tokenizer": str, "parts": dict, "teacher": dict | None, "scorer": dict | None,
    "reach": dict, "data": dict, "flops": float, "tokens": int, "bytes": int,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SoftLabels:
    """What is known of the teacher's distribution at each token.

    Attributes:
      kind: "draws" from it, how often each token was drawn; "best" tokens, their log-probabilities.
      number: how many draws, or how many best tokens.
      temperature: of the distribution.
      vocab_size: over how many tokens of the vocabulary it is.
      slots: tokens of the vocabulary that are known of a token, at most.
    """

    kind: str
    number: int
    temperature: float
    vocab_size: int
    slots: int

    @property
    def id_type(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


@dataclasses.dataclass(frozen=True)
class State:
    """A teacher's state that guides the student's: after which layer, its width, and how much of that is kept."""

    layer: int
    width: int
    kept: int


@dataclasses.dataclass(frozen=True)
class Selection:
    """Scores by which rows are chosen, as in `objective.select`."""

    k: int
    others: str


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is known of each row of `seq_len` tokens T.

    Attributes:
      loss: whether the teacher's cross-entropy on the labels is.
      final_norm: whether the teacher's last state is the one after its final norm.
    """

    seq_len: int
    labels: SoftLabels | None = None
    loss: bool = False
    selection: Selection | None = None
    states: tuple[State, ...] = ()
    final_norm: bool = True

    @classmethod
    def of_json(cls, values: Mapping[str, Any], where: str) -> "Parts":
        """Undoes dataclasses.asdict; a UserError, beginning with `where`, where that is not what they are."""
        inner = {
            "labels?": dict | None, "selection?": dict | None, "states?": [dict], "seq_len": int, "loss?": bool,
            "final_norm?": bool,
        }  # fmt: skip
        strict_json.check(values, inner, where, _HINT)
        made = dict(values)
        for name, kind in (("labels", SoftLabels), ("selection", Selection)):
            if made.get(name):
                made[name] = strict_json.make(kind, made[name], f"{where}: {name}", _HINT)
        made["states"] = tuple(
            strict_json.make(State, each, f"{where}: a state", _HINT) for each in values.get("states", ())
        )
        if made.get("labels"):
            one_of(f"{where}: labels.kind", made["labels"].kind, KINDS)
        return cls(**made)

    def groups(self) -> tuple[str, ...]:
        """Those of GROUPS that have anything."""
        there = {"labels": self.labels or self.loss or self.selection, "states": self.states}
        return tuple(group for group in GROUPS if there[group])

    def like(self, rows: int, groups: Sequence[str] = GROUPS) -> dict[str, np.ndarray]:
        """Arrays [rows, ...] as a batch has them, of rows of which nothing is known.

        soft_ids, soft_values: [rows, T, slots]; the tokens that are known, and how many draws each has (0: none), or
        its log-probability. soft_rest: [rows, T]; the entropy of the distribution, or the log-probability of all other
        tokens. teacher_loss: [rows, T]. score: [rows]. state_L, scale_L: int8 [rows, T, kept] and [rows, T], whose
        product is the state after layer L, by `BASIS`.
        """
        shape, found = (rows, self.seq_len), {}
        if "labels" in groups:
            if self.labels:
                draws, slots = self.labels.kind == "draws", self.labels.slots
                found["soft_ids"] = np.zeros((*shape, slots), self.labels.id_type)
                found["soft_values"] = np.zeros((*shape, slots), "u1" if draws else "<f4")
                found["soft_rest"] = np.zeros(shape, "<f2" if draws else "<f4")
            if self.loss:
                found["teacher_loss"] = np.zeros(shape, "<f2")
            if self.selection:
                found["score"] = np.zeros(rows, "<f4")
        if "states" in groups:
            for state in self.states:
                found[f"state_{state.layer}"] = np.zeros((*shape, state.kept), "i1")
                found[f"scale_{state.layer}"] = np.zeros(shape, "<f2")
        return found


def pack(parts: Parts, group: str, row: Mapping[str, np.ndarray]) -> bytes:
    """What is known of a row, its arrays named and shaped as in `Parts.like` but for their first axis.

    Of draws only the tokens that were drawn are kept, after how many they are at each place; so their number of
    slots is open.
    """
    pieces = []
    for name in parts.like(1, [group]):
        value = row[name]
        if name == "soft_ids" and parts.labels.kind == "draws":
            drawn = row["soft_values"] > 0
            pieces.append(drawn.sum(-1).astype("u1"))
            value = value[drawn]
        elif name == "soft_values" and parts.labels.kind == "draws":
            value = value[value > 0]
        pieces.append(np.asarray(value))
    return b"".join(piece.tobytes() for piece in pieces)


def unpack(parts: Parts, group: str, packed: bytes) -> dict[str, np.ndarray]:
    """Undoes `pack`; a ValueError where the bytes are none of this."""
    at, found = 0, {}

    def take(count: int, kind: np.dtype) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(packed, kind, count, at)
        at += values.nbytes
        return values

    drawn = None
    for name, empty in parts.like(1, [group]).items():
        row = empty[0]
        if name == "soft_ids" and parts.labels.kind == "draws":
            many = take(parts.seq_len, np.dtype("u1"))
            if many.max() > parts.labels.slots:
                raise ValueError(f"{many.max()} tokens at one place, expected at most {parts.labels.slots}")
            drawn = np.arange(parts.labels.slots) < many[:, None]
        if drawn is not None and name in ("soft_ids", "soft_values"):
            row[drawn] = take(int(drawn.sum()), row.dtype)
        else:
            row = take(row.size, row.dtype).reshape(row.shape)
        found[name] = row
    if at != len(packed):
        raise ValueError(f"{len(packed)} bytes, expected {at}")
    return found


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a group. `digest` is over its records."""

    file: str
    records: int
    digest: str
    file_bytes: int


class Reach(NamedTuple):
    """Rows that a run reads first: so many, of these data in the order of this seed."""

    fingerprint: str
    seed: int
    rows: int


class Answers:
    """Random access to what is known of the rows of one data set, by their numbers in `loader.Windows`."""

    def __init__(self, scored: "Scored", fingerprint: str, groups: Sequence[str]):
        self._scored, self._sources, self._rows = scored, {}, {}
        self.groups = tuple(groups)
        where = scored.directory / fingerprint[:16]
        for group in groups:
            files = scored.files(fingerprint, group)
            for file in files:
                path = where / file.file
                size = os.path.getsize(path) if os.path.isfile(path) else None
                if size != file.file_bytes:
                    found = "is missing" if size is None else f"has {size} bytes, expected {file.file_bytes}"
                    raise UserError(f"{path} {found}: copy {scored.directory} again, or score again.")
            paths = [f"{where / file.file}[0:{file.records}]" for file in files if file.records]
            self._sources[group] = array_record_data_source.ArrayRecordDataSource(paths)
            if scored.reach[group]:
                self._rows[group] = _read_rows(where / f"{group}.npy", sum(file.records for file in files))

    def like(self, rows: int) -> dict[str, np.ndarray]:
        """As `Parts.like`, of these groups."""
        return self._scored.parts.like(rows, self.groups)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        found = {}
        for group, source in self._sources.items():
            place = self._place(group, row)
            try:
                found |= unpack(self._scored.parts, group, source[place])
            except Exception as error:  # a damaged file shows in many ways
                raise UserError(
                    f"{self._scored.directory}: what is known of row {row} is damaged ({type(error).__name__}: "
                    f"{str(error)[:200]}): copy it again, or score again."
                ) from error
        return found

    def _place(self, group: str, row: int) -> int:
        if group not in self._rows:
            return row
        place = int(np.searchsorted(self._rows[group], row))
        if place == len(self._rows[group]) or self._rows[group][place] != row:
            raise UserError(
                f"{self._scored.directory} has no {group} of row {row}: it was made for fewer rows than are read. "
                "Score again, with a larger --until."
            )
        return place


def _read_rows(path: pathlib.Path, count: int) -> np.ndarray:
    try:
        rows = np.load(path, allow_pickle=False)
        if rows.dtype != np.uint32 or rows.shape != (count,) or (rows[1:] <= rows[:-1]).any():
            raise ValueError(f"{rows.dtype} {rows.shape}, expected {count} ascending numbers")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): copy its directory again, or score again.") from error
    return rows


@dataclasses.dataclass(frozen=True)
class Scored:
    """A directory that lmboost.score has made, found and not read."""

    directory: pathlib.Path
    field: str
    manifest: dict[str, Any]
    parts: Parts

    @classmethod
    def find(cls, path: str, field: str = "teacher.targets") -> "Scored":
        """The one that `field` names; a UserError where there is none, or it is not finished, or damaged."""
        refuse_bucket(path, field)
        directory = pathlib.Path(os.path.expanduser(path))
        where = f"{field}={path!r}"
        if not (file := directory / MANIFEST).is_file():
            partial = directory.with_name(directory.name + ".partial")
            hint = f" Scoring has not finished: {partial} exists, run its command again." if partial.is_dir() else ""
            raise UserError(f"{where} was not made by lmboost.score: there is no {file}.{hint}")
        if (found := strict_json.read(file, {"format": int}, _HINT)["format"]) != FORMAT:
            raise UserError(f"{file} has format {found}, this version reads {FORMAT}: score again.")
        manifest = strict_json.read(file, _MANIFEST, _HINT)
        parts = Parts.of_json(manifest["parts"], f"{file}: parts")
        for group in parts.groups():
            for fingerprint, files in manifest["data"].items():
                strict_json.check(files, {group: [dict]}, f"{file}: data.{fingerprint}", _HINT)
                manifest["data"][fingerprint][group] = [
                    strict_json.make(File, each, f"{file}: a file", _HINT) for each in files[group]
                ]
            strict_json.check(manifest["reach"], {group: dict | None}, f"{file}: reach", _HINT)
            if reach := manifest["reach"][group]:
                strict_json.check(reach, {"fingerprint": str, "seed": int, "rows": int}, f"{file}: reach", _HINT)
                manifest["reach"][group] = Reach(**{name: reach[name] for name in Reach._fields})
        return cls(directory, field, manifest, parts)

    @property
    def where(self) -> str:
        """How messages about it begin."""
        return f"{self.field}={str(self.directory)!r}"

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def reach(self) -> Mapping[str, Reach | None]:
        """Of each group the rows that are known, where these are not all."""
        return self.manifest["reach"]

    def files(self, fingerprint: str, group: str) -> list[File]:
        return self.manifest["data"][fingerprint][group]

    def check_data(self, fingerprints: Sequence[str], tokenizer: str, seq_len: int) -> None:
        """Raises a UserError where it is not of these data sets, or not of rows of this length."""
        if self.manifest["tokenizer"] != tokenizer:
            raise UserError(
                f"{self.where} was made with another tokenizer (fingerprint {self.manifest['tokenizer'][:12]}) than "
                f"the data's ({tokenizer[:12]}): score these data."
            )
        if self.parts.seq_len != seq_len:
            raise UserError(
                f"{self.where} is of rows of {self.parts.seq_len} tokens, but seq_len={seq_len}: score again, or take "
                "that length."
            )
        for fingerprint in fingerprints:
            if fingerprint not in self.manifest["data"]:
                there = ", ".join(known[:12] for known in self.manifest["data"])
                raise UserError(
                    f"{self.where} is of other data (fingerprints {there}) than those of data.train "
                    f"({fingerprint[:12]}): score these."
                )

    def answers(self, fingerprint: str, groups: Sequence[str]) -> Answers:
        """What is known of the rows of a data set."""
        return Answers(self, fingerprint, groups)

    def bases(self) -> dict[str, np.ndarray]:
        """By layer, what turns the kept part of a state into the state: float32 [width, kept]."""
        found = {}
        for state in self.parts.states:
            if state.kept < state.width:
                path = self.directory / BASIS.format(state.layer)
                try:
                    basis = np.load(path, allow_pickle=False)
                    if basis.shape != (state.width, state.kept) or basis.dtype != np.float32:
                        raise ValueError(f"{basis.dtype} {basis.shape}")
                except (OSError, ValueError, EOFError) as error:
                    raise UserError(f"{path} is damaged ({error}): copy it again, or score again.") from error
                found[str(state.layer)] = basis
        return found


def refuse_bucket(path: str, field: str) -> None:
    """Raises a UserError where a path is not one of a file system: rows are read one by one, at random."""
    if "://" in path:
        raise UserError(f"{field}={path!r}: expected a directory; mount the bucket (gcsfuse) and name the mount.")


def fingerprint(content: Mapping[str, Any]) -> str:
    """Of what a manifest says, which has the digests of all records."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
