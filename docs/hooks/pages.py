"""What mkdocs is told beside mkdocs.yml: pages made of what stands elsewhere, and links out of docs/.

In docs/ a link to a file of the repository is written as it works in a checkout, ../benchmarks/results/pods.md. In the
site it leads to the page that is made of this file; where there is none, as of code, its words stay and the link goes.
A link to a file that is not there stays as it is, which ends a strict build.
"""

import ast
import os
import pathlib
import re
from typing import NamedTuple

import code_reference
import config_reference
import track_tables
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]
MEASURED = ("benchmarks/results", "benchmarks/track", "benchmarks/track/results")  # folders whose files are pages
RECIPES = """# Recipes

The heads of the files in `configs/`: what each recipe reproduces, its commands, what is published and what was chosen,
what it costs.
"""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


class Made(NamedTuple):
    """A page that is not in docs/.

    Attributes:
      of: the file or folder of the repository that links to it mean.
      is_copy: whether it is that file as it is, whose links start from where it lies.
    """

    of: str
    content: str | bytes
    is_copy: bool = False


def made() -> dict[str, Made]:
    """Place in the site -> what it is made of."""
    copies = {"index.md": "README.md"}
    for folder in MEASURED:
        names = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / folder).iterdir())]
        copies |= {_measured(name): name for name in names if name.endswith((".md", ".png"))}
    pages = {place: Made(name, _content(ROOT / name), is_copy=True) for place, name in copies.items()}
    pages["measured/index.md"] = Made("benchmarks", _measured_index(copies))
    pages["reference/config.md"] = Made("lmboost/config.py", config_reference.page())
    pages["reference/recipes.md"] = Made("configs", _recipes())
    folders = {"code.md": "lmboost"}
    code = code_reference.pages().items()
    return pages | {f"reference/{name}": Made(folders.get(name, ""), text) for name, text in code}


def _content(path: pathlib.Path) -> str | bytes:
    return path.read_bytes() if path.suffix == ".png" else path.read_text(encoding="utf-8")


def _measured(name: str) -> str:
    """The place in the site of a file of benchmarks/."""
    return name.replace("benchmarks/", "measured/").replace("measured/results/", "measured/")


def _measured_index(copies: dict[str, str]) -> str:
    """A page that leads to every page below measured/, by its title."""
    lines = ["# Measured", "", "What the programs in `benchmarks/` wrote; each page says which.", ""]
    for place, name in copies.items():
        if place.startswith("measured/") and place.endswith(".md"):
            first = (ROOT / name).read_text(encoding="utf-8").partition("\n")[0]
            title = first.removeprefix("# ") if first.startswith("# ") else f"The track: {pathlib.PurePath(name).stem}"
            lines.append(f"- [{title}]({place.removeprefix('measured/')})")
    return "\n".join(lines) + "\n"


def _recipes() -> str:
    """A page with the docstring of each recipe, as it stands in its file."""
    parts = [RECIPES]
    for path in sorted((ROOT / "configs").glob("*.py")):
        head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        parts.append(f"## {path.stem}\n\n```text\n{head}\n```\n")
    return "\n".join(parts)


def on_files(files, config):
    """Adds the pages that are made."""
    for place, page in made().items():
        file = File.generated(config, place, content=page.content)
        file.made = page
        files.append(file)
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """A page's text with its tables as they are now, and its links as the site has them."""
    own = getattr(page.file, "made", None)
    if own is None:
        markdown, source = track_tables.filled(markdown), f"docs/{page.file.src_uri}"
    elif own.is_copy:
        source = own.of
    else:
        return markdown
    places = {file.made.of if hasattr(file, "made") else f"docs/{file.src_uri}": file.src_uri for file in files}
    return linked(markdown, source, page.file.src_uri, places)


def linked(markdown: str, source: str, place: str, places: dict[str, str]) -> str:
    """The links of the repository's file `source`, which is the page `place`, as they lead in the site.

    places: of files of the repository that are in the site.
    """

    def one(match: re.Match) -> str:
        image, words, target = match.groups()
        path, sign, anchor = target.partition("#")
        if ":" in path or not path:  # elsewhere, or in the page
            return match[0]
        words = _LINK.sub(one, words)
        named = os.path.normpath(os.path.join(os.path.dirname(source), path))
        found, anchor = places.get(named) or places.get(f"{named}/README.md"), sign + anchor
        if found is None and named.startswith("configs/"):
            found, anchor = places["configs"], f"#{pathlib.PurePath(named).stem}"
        if found is None:
            return words if (ROOT / named).exists() and not image else match[0]
        return f"{image}[{words}]({os.path.relpath(found, os.path.dirname(place) or '.')}{anchor})"

    return _LINK.sub(one, markdown)
