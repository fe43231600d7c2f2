"""Helpers whose dense layers multiply numbers of 8 bits."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import config
from lmboost import teacher as helpers
from lmboost.errors import UserError
from lmboost.models import linear
from lmboost.run import metrics
from tests import runs

BITS = {"int8": 0.015, "float8": 0.05}  # what rounding changes, of the size of what comes out


@pytest.mark.peers
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("x, kernel, axes", [((3, 4, 64), (64, 2, 7), 1), ((3, 4, 2, 32), (2, 32, 5), 2)])
def test_products_of_8_bits(x, kernel, axes, kind):
    pytest.importorskip("qwix")
    x, kernel, bias = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((x, kernel, kernel[axes:])))
    # Tokens and outputs of very unequal sizes, which one scale for all of them would make 0.
    x = x * jnp.array([1e-3, 1.0, 1e3]).reshape(3, *[1] * (x.ndim - 1))
    kernel, bias = (a * jnp.logspace(-3, 3, kernel.shape[-1]) for a in (kernel, bias * 1e-4))
    want = linear.project(x, kernel, bias, axes)
    got = linear.project_quantized(x.astype("bfloat16"), kernel, bias, axes, kind)
    assert got.dtype == jnp.bfloat16 and got.shape == want.shape
    exact = want - bias
    error = np.linalg.norm(got.astype("float32") - want, axis=1) / np.linalg.norm(exact, axis=1)
    assert 0 < np.median(error) < BITS[kind] and error.max() < 5 * BITS[kind]


@pytest.mark.peers
def test_a_helped_run(tmp_path, recipe, data, teacher):
    pytest.importorskip("qwix")
    kd = ("--config.objective.kd.weight=0.5", "--config.objective.kd.stop=1")
    flags = (data, teacher, *kd, "--config.steps=2", "--config.log.every=1")
    losses = {}
    for one in ("none", "int8"):
        runs.run(recipe, tmp_path / one, *flags, f"--config.teacher.quantize={one}")
        losses[one] = [line["kd"] for line in metrics.read(str(tmp_path / one)) if "kd" in line]
    exact, rounded = (np.array(x) for x in losses.values())
    assert exact.size and not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0.02)


def test_without_qwix_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    c = config.base()
    assert helpers.quantized(c) == "none"
    c.teacher.quantize = "float8"
    with pytest.raises(UserError, match=r"teacher.quantize='float8' needs qwix: pip install 'lmboost\[int8\]'"):
        helpers.quantized(c)
