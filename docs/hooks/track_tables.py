"""Tables of the track in pages, made of its results: a figure stands once, and pages cannot fall behind.

    python docs/hooks/track_tables.py       # writes the tables into the pages anew

A page says which arms it shows, and in which words:

    <!-- track nano
    plain: alone
    salt: soft labels until 15%
    -->

What follows up to the next blank line is the table, from benchmarks/track/results/nano.md. It lies in the page, so that
it can be read without the site.
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "track" / "results"
# Columns of a result that a page shows, and what it calls them.
COLUMNS = {
    "n": "seeds", "loss": "loss", "against plain": "against plain of its seeds", "p": "p",
    "FLOPs spent": "FLOPs of the run", "FLOPs to plain's end": "FLOPs to plain's end",
}  # fmt: skip
_TABLE = re.compile(r"(<!-- track (\w+)\n((?:[\w.-]+: .*\n)+)-->\n\n)((?:\|.*\n)*)")


def results(tier: str) -> dict[str, dict[str, str]]:
    """The figures of each arm of a tier, as they stand in its table, by the names of its columns."""
    head, _, *rows = (RESULTS / f"{tier}.md").read_text(encoding="utf-8").splitlines()
    names = _cells(head)
    return {cells[0]: dict(zip(names, cells, strict=True)) for cells in map(_cells, rows)}


def table(tier: str, arms: dict[str, str]) -> str:
    """A table of these arms of a tier: name -> what the page calls it."""
    found = results(tier)
    rows = [[words, f"`{arm}`", *(found[arm][name] for name in COLUMNS)] for arm, words in arms.items()]
    head = ["", "arm", *COLUMNS.values()]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def filled(text: str) -> str:
    """A page with its tables as the results are now."""

    def fill(match: re.Match) -> str:
        arms = dict(line.split(": ", 1) for line in match[3].splitlines())
        return match[1] + table(match[2], arms)

    return _TABLE.sub(fill, text)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


if __name__ == "__main__":
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page}: tables are as the results now")
