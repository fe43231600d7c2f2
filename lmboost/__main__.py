"""lmboost VERB [--flag=value ...]

The same as `python -m lmboost.VERB`; `lmboost VERB --help` says what a verb takes.
"""

import ast
import importlib.util
import pathlib
import runpy
import sys

from lmboost.errors import UserError, exit_on_user_error, one_of

# In the order in which they are met.
VERBS = (
    "prepare", "train", "report", "evaluate", "generate", "score", "convert", "search", "rounds", "rank", "aot",
    "where",
)  # fmt: skip


def overview() -> str:
    """What `lmboost --help` prints: each verb with the first line of its docstring."""
    width = max(map(len, VERBS))
    return "\n".join([__doc__, *(f"  {verb:{width}}  {summary(verb)}" for verb in VERBS)])


def summary(verb: str) -> str:
    """The first line of a verb's docstring, read without an import, which would be that of jax."""
    spec = importlib.util.find_spec(f"lmboost.{verb}")
    path = pathlib.Path(spec.origin)
    path = path.with_name("__main__.py") if spec.submodule_search_locations else path
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n")[0]


def find_verb() -> str:
    """The verb on the command line; a UserError where it is missing or misspelt."""
    if not sys.argv[1:]:
        raise UserError(f"the verb is missing: expected lmboost VERB, one of {', '.join(VERBS)} (lmboost --help).")
    return one_of("VERB", sys.argv[1], VERBS)


def main() -> None:
    """The console script. A verb runs as `python -m` runs it, so flags, help and exit status are its own."""
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(overview())
        return
    exit_on_user_error(find_verb)
    verb = sys.argv.pop(1)
    runpy.run_module(f"lmboost.{verb}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
