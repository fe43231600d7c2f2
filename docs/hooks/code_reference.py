"""The modules of lmboost as pages, one a folder, for mkdocstrings to fill from their docstrings."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
TITLE = "# Code\n\nFrom the docstrings; `lmboost/` is meant to be read. The modules by what they are about:\n\n"
# Folders of lmboost/, "" the folder itself, and what they are about.
FOLDERS = {
    "": "the verbs, the loop, the step, and what all others rest on",
    "objective": "what helps a run: the terms of the loss, their weights, and when they end",
    "surgery": "where a student starts: functions from parameters to parameters",
    "search": "the search of a cut",
    "models": "the decoder",
    "hf": "models in the Hub's format",
    "data": "text to token records, and batches of them",
    "run": "what surrounds the loop: checkpoints, logs, lock, watchdog, several processes",
    "report": "runs compared: numbers, tables, plots, a page",
    "aot": "a step compiled for a pod that is not here",
}


def pages() -> dict[str, str]:
    """The pages below reference/: name -> text. A folder that is not in FOLDERS is an error here."""
    found = {path.parent.relative_to(ROOT / "lmboost").as_posix() for path in (ROOT / "lmboost").rglob("*.py")}
    if unknown := {name.split("/")[0] for name in found} - {*FOLDERS, "."}:
        raise ValueError(f"docs/hooks/code_reference.py: say what lmboost/{min(unknown)} is about, in FOLDERS")
    made, lines = {}, []
    for folder, about in FOLDERS.items():
        name = f"lmboost.{folder}" if folder else "lmboost"
        made[f"{name}.md"] = f"# {name}\n\n{about[0].upper()}{about[1:]}.\n\n" + "\n".join(_modules(folder))
        lines.append(f"- [{name}]({name}.md): {about}\n")
    return {"code.md": TITLE + "".join(lines)} | made


def _modules(folder: str) -> list[str]:
    """What mkdocstrings is told: each module of a folder, those of folders in it, too."""
    base = ROOT / "lmboost" / folder
    paths = sorted(base.glob("*.py") if not folder else base.rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [f"::: {name}\n" for name in names if not name.endswith(("__init__", "__main__"))]
