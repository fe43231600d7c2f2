"""Stand-ins for the tools of clusters: they record what they are asked and answer from a script."""

import itertools
import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"

# One program under many names; in bash, which starts fast. Each directory in answers/ has words and answers: the first
# one whose words are all in the command answers, with its answers in turn, the last one again and again.
PROGRAM = r"""#!/bin/bash
home={home}
printf '%s\0' "${0##*/}" "$@" $'\x1e' >>"$home/calls"
case "$*" in *--filename=-*) cat >"$home/given" ;; esac
for entry in "$home"/answers/*; do
  [ -e "$entry" ] || exit 0
  fits=1
  for word in $(<"$entry/words"); do
    case "${0##*/} $*" in *"$word"*) ;; *) fits='' ;; esac
  done
  if [ "$fits" ]; then
    turn=0  # the first that no other call has taken: of calls at once only one makes a file that must not exist
    set -o noclobber
    while [ -e "$entry/$((turn + 1)).status" ] && ! : 2>/dev/null >"$entry/$turn.taken"; do turn=$((turn + 1)); done
    printf '%s' "$(<"$entry/$turn.out")"
    printf '%s' "$(<"$entry/$turn.err")" >&2
    exit "$(<"$entry/$turn.status")"
  fi
done
"""


class StandIns:
    """Programs first on PATH."""

    def __init__(self, home: pathlib.Path):
        self.home, self.bin = home, home / "bin"
        self.bin.mkdir()
        self.environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "TMPDIR": str(home)}

    def add(self, *names: str) -> None:
        """Programs that record and answer."""
        for name in names:
            self.write(name, PROGRAM.replace("{home}", shlex.quote(str(self.home))))

    def write(self, name: str, text: str) -> None:
        """A program with this text."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def answer(self, answers: dict[str, list]) -> None:
        """Sets the answers: words of the command -> answers, each a text or {"out", "err", "status"}."""
        shutil.rmtree(self.home / "answers", ignore_errors=True)
        for i, (words, entries) in enumerate(answers.items()):
            directory = self.home / "answers" / f"{i:02}"
            directory.mkdir(parents=True)
            (directory / "words").write_text(words)
            for turn, entry in enumerate(entries):
                entry = {"out": entry} if isinstance(entry, str) else entry
                for part, otherwise in (("out", ""), ("err", ""), ("status", 0)):
                    (directory / f"{turn}.{part}").write_text(str(entry.get(part, otherwise)))

    def run(self, *command, **environment) -> subprocess.CompletedProcess:
        """Runs a command with the stand-ins on PATH."""
        return subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=60, cwd=self.home,
            env=self.environment | environment,
        )  # fmt: skip

    def calls(self) -> list[list[str]]:
        """The commands that the programs were given since the last question, in their order."""
        path = self.home / "calls"
        if not path.exists():
            return []
        words = path.read_text().split("\0")
        path.unlink()
        return [list(call) for end, call in itertools.groupby(words[:-1], lambda w: w == "\x1e") if not end]


@pytest.fixture
def stand_ins(tmp_path):
    return StandIns(tmp_path)
