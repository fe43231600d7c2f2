"""Dense layers and look-ups against autodiff in float32, and gradients that bfloat16 could not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import sharding
from lmboost.models import linear

CASES = {  # x, kernel, axes that are summed over
    "dense": ((3, 4, 5), (5, 6), 1),
    "to heads": ((3, 4, 5), (5, 2, 7), 1),
    "from heads": ((3, 4, 2, 7), (2, 7, 5), 2),
    "one row": ((5,), (5, 6), 1),
}


def draws(*shapes):
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("x, kernel, axes", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_autodiff(x, kernel, axes, biased):
    x, w, b, weights = draws(x, kernel, kernel[axes:], (*x[: len(x) - axes], *kernel[axes:]))
    b = b if biased else None

    def plain(x, w, b):
        y = jnp.tensordot(x, w, axes)
        return jnp.sum(jnp.sin(y if b is None else y + b) * weights)

    def ours(x, w, b):
        return jnp.sum(jnp.sin(linear.project(x, w, b, axes)) * weights)

    want, got = (jax.value_and_grad(f, argnums=(0, 1, 2))(x, w, b) for f in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), want, got)


def test_a_look_up_is_that_of_autodiff():
    table, weights = draws((6, 4), (2, 3, 4))
    ids = jnp.array([[0, 5, 5], [2, 0, 5]])
    want = jax.value_and_grad(lambda t: jnp.sum(jnp.sin(t[ids]) * weights))(table)
    got = jax.value_and_grad(lambda t: jnp.sum(jnp.sin(linear.look_up(t, ids, "vocab", "float32")) * weights))(table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), want, got)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_gradients_of_bfloat16_are_summed_in_float32(fsdp):
    """Each of 8 devices has 257 equal tokens: sums of more than 8 bits, which bfloat16 would round."""
    x = jnp.ones((8, 257, 4), jnp.bfloat16)
    ids = jnp.zeros((8, 257), jnp.int32)
    with jax.set_mesh(mesh := sharding.make_mesh(fsdp=fsdp)):
        rows = sharding.batch_sharding(mesh)
        x, ids = (jax.device_put(a, rows) for a in (x, ids))

        def loss(kernel, bias, table):
            y = linear.project(x, kernel, bias) + linear.look_up(table, ids, "vocab", "bfloat16")
            return jnp.sum(y.astype(jnp.float32))

        kernel, bias, table = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*map(jnp.zeros, ((4, 4), (4,), (2, 4))))
    assert {a.dtype for a in (kernel, bias, table)} == {jnp.float32.dtype}
    assert (kernel == 8 * 257).all() and (bias == 8 * 257).all()
    assert (table[0] == 8 * 257).all() and (table[1] == 0).all()
