"""What a search has found so far, so that it goes on where it stopped: search.json and candidates.jsonl."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from lmboost import config as configs
from lmboost import places, strict_json
from lmboost.errors import UserError
from lmboost.run import lines
from lmboost.search import notation
from lmboost.surgery.subnet import Cut

_ABOUT = {"config": dict, "parent": dict, "data": str}
MORE = "search.candidates"  # the one field that may differ: it is raised to go on


class Log:
    """candidates.jsonl, and what of it an earlier start has written.

    Candidates that are computed together are written together. A batch that was torn is computed again as a whole, so
    that its losses are the same to the last bit.
    """

    def __init__(self, directory: pathlib.Path, about: dict[str, Any], at_once: int):
        self.path, self.at_once = directory / "candidates.jsonl", at_once
        self.written = 0
        directory.mkdir(parents=True, exist_ok=True)
        others = [path for path in directory.iterdir() if not path.name.startswith("lock")]
        if others and not (directory / "search.json").exists():
            raise UserError(
                f"--workdir={directory} holds {others[0].name}, but no search.json: it is no search's. Choose another "
                "workdir, or remove what is in it."
            )
        if (directory / "search.json").exists():
            old = strict_json.read(directory / "search.json", _ABOUT, "Choose another workdir.")
            _check_same(directory, old, about)
        with places.whole_file(directory / "search.json") as partial:
            partial.write_text(json.dumps(about, indent=1))
        fields = {"candidate": int, "loss": float | None, "cut": dict}
        self._old = list(lines.read(self.path, "a candidate", fields)) if self.path.exists() else []
        lines.rewrite(self.path, self._old)  # without what a kill left half written

    def replay(self, first: int, cuts: Sequence[Cut]) -> list[float]:
        """The losses of candidates `first` and on, if all of them have been written."""
        old = self._old[first : first + len(cuts)]
        if len(old) < len(cuts):
            return []
        for line, cut in zip(old, cuts, strict=True):
            if notation.from_json(line["cut"]) != cut:
                raise UserError(
                    f"{self.path}, candidate {line['candidate']}, is not the one that this search comes to: it was "
                    "written by another version. Choose another workdir."
                )
        self.written = first + len(cuts)
        return [math.nan if line["loss"] is None else line["loss"] for line in old]

    def write(
        self, first: int, generation: int, cuts: Sequence[Cut], losses: list[float], params: list[int]
    ) -> list[float]:
        """Writes candidates `first` and on, after what `replay` has found; returns their losses."""
        if len(self._old) > first:  # of a batch that was torn
            self._old = self._old[:first]
            lines.rewrite(self.path, self._old)
        new = [
            {"candidate": first + i, "generation": generation, "loss": loss, "params": n, "cut": notation.to_json(cut)}
            for i, (cut, loss, n) in enumerate(zip(cuts, losses, params, strict=True))
        ]
        with open(self.path, "ab") as file:
            file.write(b"".join(map(lines.encode, new)))
        self.written = first + len(cuts)
        return losses


def _check_same(directory: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before = {configs.modern(name): value for name, value in old["config"].items()}
    changed = [
        f"{name}: {before.get(name)!r} -> {value!r}"
        for name, value in new["config"].items()
        if name != MORE and before.get(name) != value
    ]
    changed += [f"{name}: {old[name]} -> {new[name]}" for name in ("parent", "data") if old[name] != new[name]]
    if changed:
        raise UserError(
            f"--workdir={directory} holds another search ({'; '.join(changed[:5])}): choose another workdir, or give "
            "its config."
        )
