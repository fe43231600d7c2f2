"""Pages are made by the hooks of the site, which lie beside them."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[2] / "docs" / "hooks"))
