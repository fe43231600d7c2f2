"""Writes what helpers say of the rows of data sets: OUT.partial, in which a shard that is done stays done, and its end.

What it is made of is in OUT.partial/plan.json, so that the same command continues it, and no other one does.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module

from lmboost import places, strict_json
from lmboost.data import records, scored, unfinished
from lmboost.data.scored import Parts, Reach, Scored
from lmboost.errors import UserError

_MADE = re.compile(r"[0-9a-f]{16}|basis-\d+\.npy|lock|(plan|manifest)\.json|.*\.tmp")
_DONE = {"files": dict, "slots": int}


@contextlib.contextmanager
def opened(out: str, asked: Mapping[str, Any], parts: Parts) -> Iterator["Unfinished"]:
    """What is to become `out`, held against other processes, with what an earlier one has left of it.

    asked: all that the result depends on; a UserError where OUT or OUT.partial is of something else.
    """
    one = Unfinished(out, asked, parts)
    if one.is_finished:
        one.clear()
        yield one
        return
    with unfinished.locked(one.partial, _MADE, "score"):
        one.begin()
        yield one


class Unfinished:
    """OUT.partial, see `opened`; or OUT, where it is finished."""

    def __init__(self, out: str, asked: Mapping[str, Any], parts: Parts):
        scored.refuse_bucket(out, "--out")
        self.out = pathlib.Path(os.path.realpath(os.path.expanduser(out)))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._asked, self._parts = json.loads(json.dumps(asked)), parts
        self.is_finished = (self.out / scored.MANIFEST).is_file()
        if self.is_finished:
            self._check_same(self.out, Scored.find(out, "--out").manifest.get("asked", {}))
        else:
            places.check_target(self.out, f"--out={out}")

    def begin(self) -> None:
        """Goes on with what there is, which must be of the same arguments. What a kill has left half is removed."""
        path = self.partial / unfinished.PLAN
        if path.is_file():
            self._check_same(self.partial, unfinished.read(path, {}))
        else:
            records.write_json(path, self._asked)
        for half in self.partial.rglob("*.tmp"):
            half.unlink()

    def _check_same(self, where: pathlib.Path, before: Mapping[str, Any]) -> None:
        if differ := sorted(name for name, value in self._asked.items() if before.get(name) != value):
            raise UserError(
                f"{where} was made with other arguments ({', '.join(differ)} differ): repeat those, choose another "
                "--out, or remove it to score anew."
            )

    def is_done(self, fingerprint: str, shard: int) -> bool:
        """Whether a shard of a data set has been written."""
        return self._done(fingerprint, shard).exists()

    def _done(self, fingerprint: str, shard: int) -> pathlib.Path:
        return self.partial / fingerprint[:16] / f"{shard:05d}.json"

    def basis(self, layer: int) -> pathlib.Path:
        """The file of the directions in which the states after a layer are kept."""
        return self.partial / scored.BASIS.format(layer)

    def write_basis(self, layer: int, basis: np.ndarray) -> None:
        with records.disk_errors(self.partial):
            _save(self.basis(layer), basis)

    def write(
        self, fingerprint: str, shard: int, wanted: Mapping[str, np.ndarray], answers: Iterable[tuple[int, Mapping]]
    ) -> None:
        """Writes a shard of a data set.

        Args:
          wanted: of each group the rows of which it is kept, ascending.
          answers: (row, what is known of it) of all of these rows, ascending.
        """
        directory, slots = self.partial / fingerprint[:16], 0
        with records.disk_errors(self.partial), contextlib.ExitStack() as stack:
            directory.mkdir(exist_ok=True)
            files = {group: _Records(stack, directory / _file_name(group, shard)) for group in wanted}
            for row, answer in answers:
                if self._parts.labels:
                    slots = max(slots, int((answer["soft_values"] != 0).sum(-1).max()))
                for group, rows in wanted.items():
                    place = np.searchsorted(rows, row)
                    if place < len(rows) and rows[place] == row:
                        files[group].write(scored.pack(self._parts, group, answer))
            for file in files.values():
                file.close()
        with records.disk_errors(self.partial):
            facts = {group: file.facts() for group, file in files.items()}
            records.write_json(self._done(fingerprint, shard), {"files": facts, "slots": slots})

    def finish(
        self,
        shards: Mapping[str, int],
        rows: Mapping[str, Mapping[str, np.ndarray] | None],
        reach: Mapping[str, Reach | None],
        about: Mapping[str, Any],
        flops_per_token: float,
    ) -> dict[str, Any]:
        """Writes the manifest, and puts the result in its place.

        Args:
          shards: how many each data set has, by its fingerprint.
          rows: of each group and data set those that it is kept of; None is all.
          about: what the manifest says besides: tokenizer, teacher and scorer.
        """
        data, slots = {}, 1
        with records.disk_errors(self.partial):
            for fingerprint, count in shards.items():
                hint = f"Remove {self.partial} to start over."
                done = [strict_json.read(self._done(fingerprint, i), _DONE, hint) for i in range(count)]
                data[fingerprint] = {g: [each["files"][g] for each in done] for g in self._parts.groups()}
                slots = max([slots, *(each["slots"] for each in done)])
                for group in self._parts.groups():
                    if rows[group] is not None:
                        _save(self.partial / fingerprint[:16] / f"{group}.npy", rows[group][fingerprint])
            manifest = self._manifest(data, slots, reach, about, flops_per_token)
            records.write_json(self.partial / scored.MANIFEST, manifest)
            places.sync_tree(self.partial)
            if self.out.is_dir():
                self.out.rmdir()
            os.rename(self.partial, self.out)
            self.clear()
        return manifest

    def clear(self) -> None:
        """Removes from OUT what only the work on it needed. After the rename: a kill before it then loses nothing."""
        for path in (*self.out.glob("*/*.json"), self.out / unfinished.PLAN, self.out / "lock"):
            path.unlink(missing_ok=True)

    def _manifest(self, data, slots, reach, about, flops_per_token) -> dict[str, Any]:
        files = [file for groups in data.values() for each in groups.values() for file in each]
        rows = sum(max(sum(f["records"] for f in each) for each in groups.values()) for groups in data.values())
        tokens = rows * self._parts.seq_len
        labels = self._parts.labels and dataclasses.replace(self._parts.labels, slots=slots)
        content = {
            "parts": dataclasses.asdict(dataclasses.replace(self._parts, labels=labels)), "data": data, **about,
            "reach": {group: r and r._asdict() for group, r in reach.items()},
        }  # fmt: skip
        content = json.loads(json.dumps(content))
        return {
            "format": scored.FORMAT, "fingerprint": scored.fingerprint(content), **content, "asked": self._asked,
            "flops": flops_per_token * tokens, "tokens": tokens, "bytes": sum(file["file_bytes"] for file in files),
        }  # fmt: skip


def _file_name(group: str, shard: int) -> str:
    return f"{group}-{shard:05d}.array_record"


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with places.whole_file(path) as partial, open(partial, "wb") as file:
        np.save(file, array)


class _Records:
    """A file of records, whole or not at all."""

    def __init__(self, stack: contextlib.ExitStack, path: pathlib.Path):
        self._path, self._digest, self._count = path, hashlib.sha256(), 0
        partial = stack.enter_context(places.whole_file(path))
        self._writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,zstd:3")

    def write(self, record: bytes) -> None:
        self._digest.update(hashlib.sha256(record).digest())
        self._writer.write(record)
        self._count += 1

    def close(self) -> None:
        self._writer.close()

    def facts(self) -> dict[str, Any]:
        """As a `scored.File`."""
        size = self._path.stat().st_size
        return dataclasses.asdict(scored.File(self._path.name, self._count, self._digest.hexdigest(), size))
