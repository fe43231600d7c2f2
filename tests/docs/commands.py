"""The commands of the documentation, and what becomes of them where a test runs them.

Pages are written for sizes that take hours. A test runs the same commands in the tiny variants of their recipes, and
with numbers of steps that fit these. What a command reads and another one writes is made by that one first, so that
each page can be run by itself.
"""

import dataclasses
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Commands that are not run, by their first words, and who checks them beside shellcheck.
ELSEWHERE = {
    "bash launch/quickstart.sh": "makes an environment; its commands are those of notebooks/quickstart.ipynb",
    "python -m pytest": "is what runs this test",
    "pip install": "is done by .ci/run",
    "docker": "has no engine here; tests/launch reads the Dockerfile",
    "gcloud": "needs an account",
    "pip wheel": "tests/test_shipped.py, as the three below",
    "lmboost --help": "",
    "lmboost where": "",
    "bash '$(lmboost": "",
    "python -m venv beam": "tests/data/test_beam.py",
    "beam/bin/": "the same",
    "python -m lmboost.prepare --source=hub:": "tests/data/test_hub.py, with a stand-in for the Hub",
    "python -m lmboost.prepare '--source=hub:": "the same",
    "lmboost convert --source=runs/large --out=gguf:": "tests/hf/test_llama_cpp.py: gguf is not in every environment",
    "lmboost convert --source=runs/large --out=hf:models/sent": "tests/hf/test_upload.py, with a stand-in for the Hub",
    "python -m lmboost.train --config=configs/quickstart.py:plain": "tests/run/test_trackers.py: nor is wandb",
    "scancel": "needs a cluster",
    "launch/tpu_vm.sh": "says what it would do, in test_pages.py; tests/launch has a stand-in for gcloud",
    "python launch/gke.py": "the same, of kubectl",
    "python -m lmboost.aot": "tests/aot: it compiles for minutes",
    "python -m lmboost.evaluate --checkpoint=runs/large --tasks": "tests/test_harness.py: tasks lie on the Hub",
}
# What becomes of an argument.
TINY = {
    "--config.init.step=40000": "--config.init.step=4",
    "--config.steps=45000": "--config.steps=12",
    "--config.checkpoint.keep_every=40000": "--config.checkpoint.keep_every=4",
    "--config.resume.step=40000": "--config.resume.step=4",
    "--config.data.skip=40950-41100": "--config.data.skip=5-6",
    "--config.checkpoint.keep_every=3100": "--config.checkpoint.keep_every=4",
    "--config.init.step=3100": "--config.init.step=4",
    "--layers=0-5,8": "--layers=0-1,3",
    "--record_tokens=10240": "--record_tokens=128",
}
# What a verb is given besides.
MORE = {
    "prepare": ["--validation_fraction=0.2", "--workers=1"], "evaluate": ["--batches=1"], "rank": ["--rows=4"],
    "rounds": ["--target=100"],
}  # fmt: skip
_WRITES = ("--workdir=", "--out=")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page: its words."""

    words: tuple[str, ...]

    @property
    def line(self) -> str:
        return shlex.join(self.words)

    @property
    def is_elsewhere(self) -> bool:
        return any(self.line.startswith(first) for first in ELSEWHERE)

    @property
    def writes(self) -> str:
        """The directory that it makes, without hf:; "" for none."""
        found = [word.partition("=")[2] for word in self.words if word.startswith(_WRITES)]
        return found[0].removeprefix("hf:") if found else ""

    @property
    def reads(self) -> Iterator[str]:
        """The directories, and files in them, that its flags name."""
        for word in self.words:
            if "=" in word and not word.startswith(_WRITES):
                yield word.partition("=")[2].removeprefix("hf:")

    def run(self) -> None:
        """The verb, tiny, in this process and directory."""
        verb = re.match(r"(?:python -m lmboost\.|lmboost )(\w+)", self.line)
        assert verb, f"{self.line}: say in tests/docs/commands.py why it cannot be run"
        words = [word for word in self.words if word.startswith("--")]
        argv = [tiny(word) for word in words] + MORE.get(verb[1], []) + ["--traceback"]
        before, sys.argv = sys.argv, [verb[1], *argv]
        try:
            runpy.run_module(f"lmboost.{verb[1]}", run_name="__main__")
        finally:
            sys.argv = before


def tiny(word: str) -> str:
    """An argument at a size for tests."""
    if recipe := re.fullmatch(r"(--config=configs/\w+\.py)(?::([\w,]+))?", word):
        return f"{recipe[1]}:{recipe[2]},tiny" if recipe[2] else f"{recipe[1]}:tiny"
    return TINY.get(word, word)


def blocks(page: pathlib.Path) -> list[str]:
    """The texts of a page's blocks of commands."""
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def of_page(page: pathlib.Path) -> list[Command]:
    """A page's commands, in order."""
    lines = "".join(blocks(page)).replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [Command(tuple(one)) for one in words if one]


class Runner:
    """Runs commands of all pages, each once, and before it those that make what it reads."""

    def __init__(self):
        here = [command for page in PAGES for command in of_page(page) if not command.is_elsewhere]
        self._makes = {command.writes: command for command in here if command.writes}
        self._done: set[Command] = set()

    def run(self, command: Command) -> None:
        if command in self._done or command.is_elsewhere:
            return
        self._done.add(command)
        for path in command.reads:
            for made, maker in self._makes.items():
                if path == made or path.startswith(f"{made}/"):
                    self.run(maker)
        command.run()
