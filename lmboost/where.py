"""Where the recipes and launchers are that come with lmboost.

lmboost where             both directories
lmboost where launch      that one alone, as in `bash $(lmboost where launch)/tpu_vm.sh --help`
"""

from lmboost import shipped
from lmboost.errors import UserError, one_of, run_verb


def main(argv: list[str]) -> None:
    names = [word for word in argv if word != "--traceback"]
    if len(names) > 1:
        raise UserError(f"unexpected argument {names[1]!r}: expected nothing, or one of {', '.join(shipped.FOLDERS)}.")
    if names:
        print(shipped.folder(one_of("FOLDER", names[0], shipped.FOLDERS)))
        return
    for name in shipped.FOLDERS:
        print(f"{name}\t{shipped.folder(name)}")


if __name__ == "__main__":
    run_verb(main, __doc__)
