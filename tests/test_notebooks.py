"""The commands of the notebooks, run in order at a size for tests."""

import json
import pathlib
import shlex
import string
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def commands(notebook: pathlib.Path) -> list[list[str]]:
    """The arguments of each line `!python -m lmboost...`, with the notebook's own variables put in."""
    variables, found = {}, []
    for cell in json.loads(notebook.read_text())["cells"]:
        for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else ():
            name, equals, value = line.partition(" = ")
            if equals and name.isupper():
                variables[name] = value.strip("\"'")
            elif line.startswith("!python -m lmboost"):
                found.append(shlex.split(string.Template(line).substitute(variables))[1:])
    return found


@pytest.mark.slow
def test_quickstart_notebook(tmp_path):
    lines = commands(ROOT / "notebooks" / "quickstart.ipynb")
    assert [line[1] for line in lines] == [f"lmboost.{v}" for v in ("prepare", "train", "train", "train", "report")]
    small = {"--source=stdlib": f"--source={ROOT}/lmboost/**/*.py", "--tokenizer=train:2048": "--tokenizer=train:400"}
    small["--validation_fraction=0.05"] = "--validation_fraction=0.2"
    for line in lines:
        line = [small.get(flag, flag).replace("runs/notebook", str(tmp_path)) for flag in line]
        line = [f"{flag},tiny" if flag.startswith("--config=") else flag for flag in line]
        line += ["--config.model.vocab_size=400"] if "lmboost.train" in line else []
        subprocess.run([sys.executable, *line], cwd=ROOT, check=True, timeout=600)
    assert (tmp_path / "report" / "report.png").stat().st_size > 10_000
