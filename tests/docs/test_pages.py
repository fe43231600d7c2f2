"""What pages say is as it is elsewhere: links lead to files, figures are the results', fields are the config's."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

import code_reference
import config_reference
import pytest
import track_tables

from lmboost import config
from tests.docs.commands import ELSEWHERE, PAGES, ROOT, TINY, blocks, of_page

LINK = re.compile(r"\]\(([^()\s:#]+)(?:#[^()\s]*)?\)")
COPIES = [ROOT / "launch" / "README.md", ROOT / "benchmarks" / "track" / "README.md", ROOT / "benchmarks/track/LOG.md"]


@pytest.mark.parametrize("page", [*PAGES, *COPIES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_of_the_track_are_its_results(page):
    text = page.read_text(encoding="utf-8")
    assert track_tables.filled(text) == text, "python docs/hooks/track_tables.py writes them anew"


def test_a_figure_that_is_another_one_is_mended_and_the_rest_of_the_page_stays():
    text = (ROOT / "docs" / "methods" / "larger.md").read_text(encoding="utf-8")
    loss = track_tables.results("nano")["stack-long"]["loss"]
    assert text.count(loss) == 1
    assert track_tables.filled(text.replace(loss, "2.0000")) == text
    with pytest.raises(KeyError, match="stack-longer"):
        track_tables.filled(text.replace("\nstack-long: ", "\nstack-longer: "))


def test_every_field_is_in_the_reference_with_its_default_and_what_its_comment_says():
    rows = re.findall(r"^\| `([\w.]+)`\{ #\1 \} \| `(.*?)` \| (.*) \|$", config_reference.page(), re.MULTILINE)
    shown = {name: ast.literal_eval(default) for name, default, _ in rows}
    assert len(shown) == len(rows)
    assert shown == config.flatten(config.base())
    says = {name: text for name, _, text in rows}
    assert says["objective.kd.stop"] == "fraction of the run at which the weight is 0"
    assert says["resume.path"].startswith("a run or checkpoint to go on from")
    assert says["init.kind"].startswith('"inherit": layers of a deeper model')
    assert says["model.norm"] == "one of rmsnorm, layernorm, layernorm\\_nobias"
    assert sum(map(bool, says.values())) > 0.8 * len(says)


def test_no_two_commands_write_to_one_place():
    makers: dict[str, set] = {}
    for command in (command for page in PAGES for command in of_page(page) if not command.is_elsewhere):
        makers.setdefault(command.writes or command.line, set()).add(command)
    assert [one for one in makers.values() if len(one) > 1] == []


def test_what_is_said_of_commands_is_of_commands_that_there_are():
    found = [command for page in PAGES for command in of_page(page)]
    assert [first for first in ELSEWHERE if not any(one.line.startswith(first) for one in found)] == []
    assert {*TINY} <= {word for one in found for word in one.words}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say_of_the_pages_commands(tmp_path):
    files = []
    for number, page in enumerate(PAGES):
        if text := "\n".join(blocks(page)):
            files.append(tmp_path / f"{number}-{page.stem}.sh")
            files[-1].write_text(f"#!/bin/bash\n{text}")
    shellcheck = ["shellcheck", "--severity=warning"]  # below that it wants quotes around $IMAGE, which is the reader's
    result = subprocess.run([*shellcheck, *files], text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout


LAUNCHERS = [
    one for page in PAGES for one in of_page(page) if "launch/tpu_vm.sh" in one.words or "launch/gke.py" in one.words
]


@pytest.mark.parametrize("command", LAUNCHERS, ids=lambda one: "-".join(one.words[:3]).replace("/", "-"))
def test_launchers_say_what_they_would_do(command):
    if "python" in command.words:
        pytest.importorskip("yaml")
    words = [sys.executable if word == "python" else word for word in command.words]
    result = subprocess.run([*words, "--dry-run"], cwd=ROOT, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search("^(gcloud|kubectl) ", result.stdout, re.MULTILINE)


def test_links_of_a_page_lead_to_pages_of_the_site():
    pages = pytest.importorskip("pages", reason="the site needs mkdocs: pip install -e '.[docs]'")
    places = {"docs/start.md": "start.md", "benchmarks/results/pods.md": "measured/pods.md", "configs": "recipes.md"}
    places |= {"benchmarks/track/README.md": "measured/track/README.md"}

    def linked(text: str) -> str:
        return pages.linked(text, "docs/methods/kd.md", "methods/kd.md", places)

    assert linked("[a](../start.md#one)") == "[a](../start.md#one)"
    assert linked("[a](../../benchmarks/results/pods.md)") == "[a](../measured/pods.md)"
    assert linked("[a [b, c]](../../benchmarks/track)") == "[a [b, c]](../measured/track/README.md)"
    assert linked("[`x`](../../configs/let_7b.py)") == "[`x`](../recipes.md#let_7b)"
    assert linked("[code](../../lmboost/train.py) and [more](../../lmboost)") == "code and more"
    for stays in ("[a](https://arxiv.org/abs/1)", "[a](#below)", "[a](../none.md)", "![a](../none.png)"):
        assert linked(stays) == stays


def test_every_page_has_a_place_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    names = {path.relative_to(ROOT / "docs").as_posix() for path in pathlib.Path(ROOT / "docs").rglob("*.md")}
    assert names <= {*re.findall(r": ([\w/-]+\.md)$", menu, re.MULTILINE)}


def test_every_module_is_in_the_reference():
    listed = re.findall(r"^::: ([\w.]+)$", "\n".join(code_reference.pages().values()), re.MULTILINE)
    paths = [path.relative_to(ROOT) for path in (ROOT / "lmboost").rglob("*.py") if not path.stem.startswith("__")]
    assert sorted(listed) == sorted(".".join(path.with_suffix("").parts) for path in paths)
