"""The documentation as a site: it is built without a warning, and needs nothing from elsewhere."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.commands import PAGES, ROOT


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"],
        cwd=ROOT, text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    read = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for page in PAGES[1:]:
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix().removesuffix("index").rstrip("/")
        assert f"{name}/index.html" in read
    assert 'id="objective.kd.gate"' in read["reference/config/index.html"]
    assert 'id="lmboost.objective.blend.blend"' in read["reference/lmboost.objective/index.html"]
    assert 'href="../reference/config/#objective.kd.gate"' in read["methods/kd/index.html"].replace("../../", "../")
    loaded = [
        link for text in read.values() for link in re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="([^"]*)', text)
    ]
    assert len(loaded) > 100 and not [link for link in loaded if link.startswith(("http:", "https:", "//"))]
