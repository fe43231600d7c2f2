"""The notebooks run from top to bottom, and what they draw is what the runs have written."""

import json
import os
import pathlib
import signal
import threading
import time

import pytest

from lmboost import notebook
from lmboost.errors import UserError
from lmboost.objective import auto

ROOT = pathlib.Path(__file__).parents[1]
LINES = [
    {"step": 1, "ce": 5.0, "kd_weight": 0.5, "lead": 1.5, auto.ENDED: auto.NEVER},
    {"step": 2, "val_loss": 4.5, "tokens": 64.0},
    {"step": 3, "ce": 4.0, "kd_weight": None, "lead": 0.2, auto.ENDED: 3},
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Where notebooks run: recipes, and the model that one of them would download."""
    from tests import hub

    desk = tmp_path_factory.mktemp("desk")
    (desk / "configs").symlink_to(ROOT / "configs")
    hub.write(desk / "models" / "smollm2-135m")
    return desk


def executed(name: str, desk: pathlib.Path) -> list[dict]:
    """The cells of a notebook after it has run at a tiny size; nothing is installed."""
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebook]'")
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in book.cells:
        tags = cell.metadata.get("tags", [])
        if "install" in tags:
            cell.source = "pass"
        if "parameters" in tags:
            assert cell.source.count("TINY = False") == 1
            cell.source = cell.source.replace("TINY = False", "TINY = True")
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(desk)}}).execute()
    return book.cells


def pictures(cells: list[dict]) -> int:
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"), [("quickstart", 4), ("hub_teacher", 2), ("small_from_large", 4), ("aot_bill", 1)]
)
def test_notebook(name, shown, desk, monkeypatch):
    if name == "aot_bill":
        pytest.importorskip("libtpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"))
    cells = executed(name, desk)
    assert pictures(cells) == shown
    said = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))
    assert "error:" not in said and "Traceback" not in said
    assert {"aot_bill": "chip-hours"}.get(name, "finished: 8 steps") in said


def write(directory: pathlib.Path, lines: list[dict]) -> str:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ce"')
    return str(directory)


def test_curves_are_what_was_written(tmp_path):
    run = write(tmp_path / "run", LINES)
    drawn = notebook.figure([run, str(tmp_path / "not begun")])
    losses, help_ = drawn.axes
    assert [line.get_xydata().tolist() for line in losses.lines] == [[[1, 5.0], [3, 4.0]], [[2, 4.5]], []]
    weight, lead, ended = help_.lines
    assert (weight.get_xydata().tolist(), lead.get_xydata().tolist()) == ([[1, 0.5]], [[1, 1.5], [3, 0.2]])
    assert set(ended.get_xdata()) == {3}
    assert len(notebook.figure([write(tmp_path / "plain", LINES[1:2])]).axes) == 1


@pytest.fixture
def shell():
    """What makes this process a notebook's."""
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    yield interactiveshell.InteractiveShell.instance()
    interactiveshell.InteractiveShell.clear_instance()


def test_elsewhere_than_in_a_notebook_it_says_what_to_take(tmp_path):
    pytest.importorskip("IPython")
    with pytest.raises(UserError, match="take python -m lmboost.train"):
        notebook.train("--config=configs/quickstart.py", f"--workdir={tmp_path}/run")


def test_a_run_that_fails_or_has_no_place_is_one_error(tmp_path, capsys, shell):
    with pytest.raises(UserError, match="--workdir is missing"):
        notebook.train("--config=configs/quickstart.py")
    with pytest.raises(UserError, match="ended with status 2"):
        notebook.train(f"--config={tmp_path}/none.py", f"--workdir={tmp_path}/run")
    assert "there is no file" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_cell_saves_the_run(tmp_path, recipe, data, shell, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = (f"--config={recipe}", data, f"--workdir={tmp_path}/run", "--config.steps=2000", "--config.eval.every=0")

    def interrupt():
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(UserError, match="was stopped, and has saved"):
        notebook.train(*flags, seconds=0.2)
    (saved,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert 0 < saved < 2000
