"""Errors that the user can mend, and how a verb ends on one."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake that the user can mend.

    The message names the field, its value, what was expected, and what to do.
    A verb prints it without a traceback and exits with status 2.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(field: str, value: str, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`, else raises a UserError naming the field."""
    known = list(known)
    if value not in known:
        raise UserError(
            f"{field}={value!r} is not known{nearest(str(value), known)}: expected one of {', '.join(known)}."
        )
    return value


def exit_on_user_error(main: Callable[[], None], show_traceback: bool = False) -> None:
    """Runs `main`; a UserError becomes a short message on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        if show_traceback:
            raise
        sys.exit(_report(error))


def _report(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
