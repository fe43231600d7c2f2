"""Which commit the code that runs is of."""

import pathlib
import subprocess

_ROOT = pathlib.Path(__file__).parents[2]


def of_checkout() -> str | None:
    """The commit of lmboost's checkout, "-dirty" behind it where files differ from it; None where it is not known.

    That is so for a package that was installed, where there is no git, and where git refuses another user's files.
    """
    if not (_ROOT / ".git").exists():  # the repository around an environment is another one
        return None
    command = ["git", "-C", _ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None
