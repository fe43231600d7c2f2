"""OUT.partial, in which `prepare` works: held by one run at a time, and nothing in it that is the user's is touched.

`score` holds its own in the same way.
"""

import contextlib
import fcntl
import pathlib
import re
from collections.abc import Iterator

from etils import epath

from lmboost import places, strict_json
from lmboost.errors import UserError

PLAN = "plan.json"  # written first, and removed last
_MADE = re.compile(r"spread|shards|tokenizer|out|lock(\.\d+)?|refused\.json|plan\.json(\..*\.tmp)?")


@contextlib.contextmanager
def locked(partial: pathlib.Path, made: re.Pattern = _MADE, verb: str = "prepare") -> Iterator[None]:
    """Holds `partial`, so that two runs never write the same data set.

    Args:
      made: the names of what the verb makes in it; anything else is a UserError.
    """
    partial.mkdir(parents=True, exist_ok=True)
    if places.is_remote(partial):  # where there are no such locks, see the verb
        _refuse_others(partial, made, verb)
        yield
        return
    if partial.is_symlink():
        raise UserError(f"{partial} is a link: remove it, or choose another --out.")
    _refuse_others(partial, made, verb)
    places.refuse_links(partial, "--out")
    with open(partial / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{partial} is in use by another run of {verb}: wait for it or choose another --out."
            ) from error
        yield


def _refuse_others(partial: pathlib.Path, made: re.Pattern, verb: str) -> None:
    there = partial.iterdir() if partial.exists() else ()  # in a bucket there is no empty directory
    if others := sorted(path.name for path in there if not _is_ours(path, made)):
        raise UserError(f"{partial} holds {others[0]!r}, which is not {verb}'s: move it away, or choose another --out.")


def _is_ours(path: pathlib.Path, made: re.Pattern = _MADE) -> bool:
    there = (path.parent / PLAN).exists() or not path.is_dir() or not any(path.iterdir())
    return there and bool(made.fullmatch(path.name))


def empty(partial: pathlib.Path) -> None:
    """Removes what was made in `partial`, but for the lock."""
    there = partial.iterdir() if partial.exists() else ()
    ours = [path for path in there if not path.name.startswith("lock") and _is_ours(path)]
    for path in sorted(ours, key=lambda path: path.name == PLAN):
        epath.Path(path).rmtree() if path.is_dir() else path.unlink()


def clear(partial: pathlib.Path) -> None:
    """Removes what was made in `partial`, and it, if nothing else is in it."""
    if not partial.exists():
        return
    empty(partial)
    if places.is_remote(partial):
        return  # the lock is the verb's
    (partial / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or somebody has put something into it
        partial.rmdir()


def read(path: pathlib.Path, expected: dict) -> dict:
    """What a task that is done has left."""
    partial = path.parent if path.name == PLAN else path.parent.parent
    return strict_json.read(path, expected, f"Remove {partial} to start over.")
