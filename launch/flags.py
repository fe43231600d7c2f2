"""Flags of the launchers written in Python: their own ones of the form --name=value, all others are training's."""

import argparse
import sys

USER_ERROR = 2  # as in lmboost/errors.py, which need not be installed where a launcher runs


class Parser(argparse.ArgumentParser):
    """Ends the program with one line and status 2 when something is wrong."""

    def __init__(self):
        super().__init__(allow_abbrev=False, add_help=False)

    def error(self, message: str):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)

    def split(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """(the launcher's own options, the flags that are not its own, in their order)."""
        known = {name for action in self._actions for name in action.option_strings}
        own = [a for a in argv if a.partition("=")[0] in known]
        return self.parse_args(own), [a for a in argv if a not in own]


def number(kind: type, least: int):
    """An argparse type: a number of `least` or more."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return value

    return convert


def value_of(flags: list[str], name: str) -> str | None:
    """The value of the last --name=value, as training takes it."""
    return next((f.partition("=")[2] for f in reversed(flags) if f.startswith(f"--{name}=")), None)
