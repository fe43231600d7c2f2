"""Errors that the user can mend, how a verb ends on one, and what its exit status says to a launcher."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable

from lmboost import streams

# Exit statuses. Launchers start the same command again on every one but 0 and EXIT_USER_ERROR; after a crash (any
# other status) not for ever.
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # asked to stop: the state was saved at a step boundary
EXIT_INTERRUPTED = 130  # Ctrl-C, where there is no state to save
EXIT_HUNG = 76  # no progress for watchdog.seconds


class UserError(ValueError):
    """A mistake that the user can mend.

    The message names the field, its value, what was expected, and what to do.
    A verb prints it without a traceback and exits with status 2.
    """


class Stop(Exception):
    """A run that ends before its last step through no mistake in it: a message, and the exit status it ends with."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


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
    """Runs `main`; a UserError becomes a short message on stderr and exit status 2, a Stop one and its own status."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Stop as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except UserError as error:
        if show_traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def run_verb(main: Callable[[list[str]], None], doc: str) -> None:
    """A verb of the command line: `doc` if it has --help, else `main` of its arguments, ended as above."""
    streams.protect()
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        sys.exit(print(doc))
    exit_on_user_error(lambda: main(argv), show_traceback="--traceback" in argv)


def run_flags(main: Callable[..., None], parser: argparse.ArgumentParser, prints: bool = False) -> None:
    """A verb whose flags `parser` knows: `main` of them by their names, ended as above. --traceback comes with it.

    prints: whether what it prints is its result, so that the status is 1 where that could not be written.
    """
    streams.protect()
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    flags = vars(parser.parse_args())
    show_traceback = flags.pop("traceback")
    exit_on_user_error(lambda: main(**flags), show_traceback)
    if prints and (why := streams.lost_output()):
        print(f"error: standard output could not be written ({why}).", file=sys.stderr)
        sys.exit(1)


def exit_at_once(status: int) -> None:
    """Ends the process without the farewells of libraries, which would wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def number(field: str, value: float, low: float = 0.0, below: float = math.inf) -> float:
    """Returns `value` if low <= value < below, else raises a UserError naming the field."""
    if not low <= value < below:  # false for NaN, too
        least = f"at least {low:g}"
        expected = f"a finite number, {least}" if below == math.inf else f"{least} and below {below:g}"
        raise UserError(f"{field}={value} is out of range: expected {expected}.")
    return float(value)


def count(field: str, value: int, least: int = 1) -> int:
    """Returns `value` if it is at least so much, else raises a UserError naming the field."""
    if value < least:
        raise UserError(f"{field}={value} must be at least {least}.")
    return value


def fraction(field: str, value: float) -> float:
    """Returns `value` if it is between 0 and 1, else raises a UserError naming the field."""
    if not 0 <= value <= 1:
        raise UserError(f"{field}={value} is not a fraction: expected a number from 0 to 1.")
    return float(value)
