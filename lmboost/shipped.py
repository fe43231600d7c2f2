"""Recipes and launchers: folders beside the package in a checkout, and inside it where a wheel was installed."""

import os
import pathlib

from lmboost.errors import UserError, nearest

FOLDERS = ("configs", "launch")


def folder(name: str) -> pathlib.Path:
    """Where the folder `name`, one of FOLDERS, is."""
    package = pathlib.Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def recipes() -> list[str]:
    """File names of the recipes that come with lmboost."""
    return sorted(path.name for path in folder("configs").glob("*.py"))


def recipe(path: str, given: str) -> str:
    """The file that a recipe's path means: the user's own, or else the recipe of lmboost with this name.

    `NAME.py` and `configs/NAME.py` are names of recipes. Raises a UserError, which begins with `given`, where there is
    neither.
    """
    if os.path.isfile(path):
        return path
    directory, name = os.path.split(path)
    if directory not in ("", "configs"):
        raise UserError(f"{given}: there is no file {path!r}.")
    known = recipes()
    if name not in known:
        raise UserError(
            f"{given}: there is no file {path!r}, and no recipe of this name comes with lmboost"
            f"{nearest(name, known)}: expected your own file, or one of {', '.join(known)}."
        )
    return str(folder("configs") / name)
