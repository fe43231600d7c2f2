"""What runs have written and learned, to be compared: numbers, files, and trees of arrays bit for bit."""

import json
import pathlib

import jax
import numpy as np


def assert_same(a, b) -> None:
    """Trees of the same structure with the same arrays, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def lines(workdir) -> list[dict]:
    """The lines of metrics.jsonl, which are strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (pathlib.Path(workdir) / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def losses(workdir, name: str = "loss") -> dict[int, float]:
    """{step: number} of the steps that have this number."""
    return {line["step"]: line[name] for line in lines(workdir) if line.get(name) is not None}


def content(directory) -> dict[str, bytes]:
    """Every file of a directory, by its path in it."""
    paths = sorted(path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
