"""Dense layers and looked-up tables: computed in the activations' dtype, gradients of parameters in float32.

Autodiff of `x @ kernel.astype(bfloat16)` rounds every device's share of the kernel's gradient to bfloat16, and the
shares of hundreds of devices are then added up in bfloat16; a table's gradient even adds the tokens of a batch to
each other in it, and a sum of more than 256 equal numbers stands still there. Here both are float32 until they
reach the optimizer; what is multiplied stays in the activations' dtype, and so does what goes down to the layer below.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lmboost import sharding

QTYPES = {"int8": "int8", "float8": "float8_e4m3fn"}  # of `ModelConfig.quantize`
OUTPUT = "dense"  # the name of what a Dense gives, for policies of rematerialisation


def factors(a, b) -> tuple[jax.Array, jax.Array]:
    """The factors of a product that is summed up in float32.

    XLA for CPUs has no such product of bfloat16 in some layouts; cast before, the numbers are the same.
    """
    return (a.astype(jnp.float32), b.astype(jnp.float32)) if sharding.on_cpu() else (a, b)


class Dense(nn.Module):
    """x [..., *in] -> [..., *features], with a kernel [*in, *features] over the last `in_axes` axes of x.

    Parameters are float32 "kernel" and, if asked for, "bias" [*features], zeros at first.
    """

    features: tuple[int, ...]
    use_bias: bool
    dtype: jnp.dtype | str
    kernel_init: nn.initializers.Initializer
    in_axes: int = 1
    quantize: str = "none"

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[x.ndim - self.in_axes :]

        def draw(key):  # as a matrix, whatever the axes are
            flat = self.kernel_init(key, (math.prod(inputs), math.prod(self.features)))
            return flat.reshape(*inputs, *self.features)

        kernel = self.param("kernel", draw)
        bias = self.param("bias", nn.initializers.zeros, self.features) if self.use_bias else None
        x = x.astype(self.dtype)
        if self.quantize != "none":
            return project_quantized(x, kernel, bias, self.in_axes, self.quantize)
        return checkpoint_name(project(x, kernel, bias, self.in_axes), OUTPUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def project(x, kernel, bias=None, in_axes: int = 1):
    """The last `in_axes` axes of x [..., *in] times kernel [*in, *out], plus bias [*out], in x's dtype: [..., *out]."""
    inputs = tuple(range(x.ndim - in_axes, x.ndim)), tuple(range(in_axes))
    y = jax.lax.dot_general(x, kernel.astype(x.dtype), (inputs, ((), ())))
    return y if bias is None else y + bias.astype(x.dtype)


def _project_forward(x, kernel, bias, in_axes):
    return project(x, kernel, bias, in_axes), (x, kernel, bias)


def _project_backward(in_axes, residuals, dy):
    x, kernel, bias = residuals
    rows = tuple(range(x.ndim - in_axes))
    outputs = dy.ndim - len(rows)
    features = tuple(range(len(rows), dy.ndim)), tuple(range(in_axes, in_axes + outputs))
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), (features, ((), ())))
    dkernel = jax.lax.dot_general(*factors(x, dy), ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    dbias = None if bias is None else dy.sum(rows, dtype=jnp.float32).astype(bias.dtype)
    return dx, dkernel.astype(kernel.dtype), dbias


project.defvjp(_project_forward, _project_backward)


def project_quantized(x, kernel, bias, in_axes: int, kind: str):
    """As `project`, but both are rounded to 8 bits before: x with a scale for each token, the kernel for each output.

    There is no gradient. kind: a key of QTYPES.
    """
    import qwix

    rows = tuple(range(x.ndim - in_axes))
    inputs = tuple(range(len(rows), x.ndim)), tuple(range(in_axes))
    x, dtype = qwix.quantize(x, QTYPES[kind], channelwise_axes=rows), x.dtype
    kernel = qwix.quantize(kernel, QTYPES[kind], channelwise_axes=tuple(range(in_axes, kernel.ndim)))
    y = qwix.dot_general(x, kernel, (inputs, ((), ())), preferred_element_type=jnp.float32)
    return (y if bias is None else y + bias).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(table_VxD, ids, axis: str | None, dtype):
    """Rows of a table [V, D], in `dtype`: [..., D] for int32 ids [...]. `axis`: the logical axis of V."""
    # The table is gathered over fsdp before it is looked up: otherwise the rows of the batch would be.
    return jnp.take(sharding.constrain(table_VxD.astype(dtype), (axis, None)), ids, axis=0)


def _look_up_forward(table_VxD, ids, axis, dtype):
    return look_up(table_VxD, ids, axis, dtype), (table_VxD, ids)


def _look_up_backward(axis, dtype, residuals, dy):
    table_VxD, ids = residuals
    zeros = sharding.constrain(jnp.zeros(table_VxD.shape, jnp.float32), (axis, None))
    sums = sharding.constrain(zeros.at[ids].add(dy.astype(jnp.float32)), (axis, None))
    return sums.astype(table_VxD.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)
