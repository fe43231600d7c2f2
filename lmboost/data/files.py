"""The files that a source names: those that a glob matches, and Python's own library."""

import fnmatch
import glob
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator

from lmboost.errors import UserError

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"})


def matches(pattern: str) -> list[str]:
    """The files that a glob matches, in order; a UserError where there are none, or a link leads nowhere."""
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        tfds = os.path.isfile(os.path.join(expanded, "features.json"))
        advice = f"tfds:{pattern}" if tfds else f"a glob of its files, such as '{pattern}/**/*.txt'"
        raise UserError(f"source={pattern!r} is a directory: give {advice}.")
    # A name with brackets in it is no glob where there is such a file.
    found = [expanded] if os.path.isfile(expanded) else sorted(_expand(expanded))
    if dangling := [path for path in found if not os.path.exists(path)]:
        raise UserError(f"source={pattern!r}: {dangling[0]} is a link to what is not there. Remove or exclude it.")
    found = [path for path in found if os.path.isfile(path)]
    if not found:
        raise UserError(
            f"source={pattern!r} matches no file. Give a glob (quote it, '**' descends), tfds:NAME or stdlib."
        )
    return found


def _expand(pattern: str) -> Iterator[str]:
    """As glob.glob, but that `**` goes into each directory once, however many links lead there."""
    found = re.fullmatch(r"(|.*?/)\*\*/(.+)", pattern + "/*" * (pattern.split("/")[-1] == "**"), re.DOTALL)
    if not found:
        yield from glob.glob(pattern)
        return
    top, wanted = found[1], found[2].split("/")
    for base in glob.glob(top) if top else [""]:
        been = set()
        for directory, below, names in os.walk(base or ".", followlinks=True):
            status = os.stat(directory)
            if (status.st_dev, status.st_ino) in been:
                below.clear()
                continue
            been.add((status.st_dev, status.st_ino))
            below[:] = sorted(name for name in below if not name.startswith("."))
            inside = os.path.relpath(directory, base or ".").split("/")
            inside = [] if inside == ["."] else inside
            for name in (*names, *below):
                if _fits([*inside, name], wanted):
                    yield os.path.join(base, *inside, name)


def _fits(parts: list[str], wanted: list[str]) -> bool:
    """Whether the last parts of a path are as a pattern wants them; "**" in it are any number of parts."""
    if "**" in wanted:
        at = wanted.index("**")
        return any(_fits(parts[:n], wanted[:at]) and _fits(parts[n:], wanted[at + 1 :]) for n in range(len(parts)))
    ends = parts[len(parts) - len(wanted) :] if len(wanted) <= len(parts) else []
    return len(ends) == len(wanted) and all(
        fnmatch.fnmatchcase(part, want) and (want.startswith(".") or not part.startswith("."))
        for part, want in zip(ends, wanted, strict=True)
    )


def standard_library() -> list[str]:
    """The sources of Python's own library, in order, without its tests."""
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_LIBRARY]
        found += [pathlib.Path(directory, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(f"source='stdlib': {root} holds no .py files; this interpreter ships without its sources.")
    return [str(path) for path in sorted(found)]
