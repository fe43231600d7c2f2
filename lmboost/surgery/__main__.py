"""Says where the verbs of lmboost.surgery are now."""

import sys

from lmboost.errors import UserError, exit_on_user_error

NOW = {
    "grow": "python -m lmboost.rounds --config=FILE --reference=RUN --workdir=DIR",
    "rank": "python -m lmboost.rank --checkpoint=RUN --out=DIR",
    "inherit": "python -m lmboost.convert --source=RUN --layers=0-5,8 --out=DIR",
}


def main() -> None:
    verbs = {verb: NOW[verb] for verb in sys.argv[1:2] if verb in NOW} or NOW
    raise UserError("lmboost.surgery has no verbs any more. " + "; ".join(f"{v}: {now}" for v, now in verbs.items()))


if __name__ == "__main__":
    exit_on_user_error(main)
