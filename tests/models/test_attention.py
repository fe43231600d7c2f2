"""Every kernel is softmax(q k / sqrt(N)) v over earlier tokens of the same segment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models.attention import PLAIN, Rule, attend, resolve, splash_block

B, T, N = 4, 128, 16


def inputs(heads, kv_heads, rows=B, length=T, features=N, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(rows, length, h, features)).astype(np.float32) for h in (heads, kv_heads, kv_heads))
    segment_ids = np.cumsum(rng.random((rows, length)) < 0.05, axis=1).astype(np.int32)
    return q, k, v, segment_ids


def oracle(q, k, v, segment_ids, rule=PLAIN):
    """Dense, in float64, one query head at a time."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        logits = q[b, :, h].astype(float) @ k[b, :, h // group].T.astype(float)
        logits *= rule.scale or 1 / np.sqrt(q.shape[-1])
        logits = rule.softcap * np.tanh(logits / rule.softcap) if rule.softcap else logits
        allowed = np.tril(segment_ids[b][:, None] == segment_ids[b][None, :])
        allowed = np.triu(allowed, 1 - rule.window) if rule.window else allowed
        weights = np.exp(np.where(allowed, logits - logits.max(-1, keepdims=True), -np.inf))
        out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h // group]
    return out


def test_a_soft_cap_is_not_for_cudnn():
    resolve_ = functools.partial(resolve, platform="gpu", seq_len=1024, head_dims=[64], dtype="bfloat16")
    assert resolve_("auto") == resolve_("cudnn") == "cudnn" and resolve_("auto", softcap=True) == "xla"
    with pytest.raises(UserError, match="attention='cudnn' needs .*no attn_softcap; here: .*1024, attn_softcap"):
        resolve_("cudnn", softcap=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("implementation", ["xla", "auto", "splash_interpret"])
def test_equals_the_dense_oracle(implementation, heads, kv_heads):
    args = inputs(heads, kv_heads, rows=2)
    np.testing.assert_allclose(attend(*args, implementation), oracle(*args), atol=2e-5)


@pytest.mark.parametrize("window", [1, 20, T, 2 * T])
@pytest.mark.parametrize("implementation", ["xla", "splash_interpret"])
def test_a_window_equals_the_dense_oracle(implementation, window):
    args = inputs(4, 2, rows=2)
    np.testing.assert_allclose(attend(*args, implementation, Rule(window)), oracle(*args, Rule(window)), atol=2e-5)


@pytest.mark.parametrize("rule", [Rule(scale=0.7), Rule(softcap=1.5), Rule(20, 0.7, 1.5)])
@pytest.mark.parametrize("implementation", ["xla", "splash_interpret"])
def test_a_scale_and_a_soft_cap_equal_the_dense_oracle(implementation, rule):
    args = inputs(4, 2, rows=2)
    np.testing.assert_allclose(attend(*args, implementation, rule), oracle(*args, rule), atol=2e-5)


def test_a_soft_cap_has_the_same_gradient_in_both_kernels():
    args, rule = inputs(4, 2, rows=2), Rule(20, 0.7, 1.5)
    a, b = (value_and_gradients(*args, implementation=name, rule=rule) for name in ("xla", "splash_interpret"))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.abs(x).max()))


@functools.partial(jax.jit, static_argnames=("implementation", "rule"))
def value_and_gradients(q, k, v, segment_ids, implementation, rule=PLAIN):
    def total(q, k, v):
        q = sharding.constrain(q, ("batch", "length", "heads", None))
        k, v = (sharding.constrain(x, ("batch", "length", "kv_heads", None)) for x in (k, v))
        y = attend(q, k, v, segment_ids, implementation, rule)
        return (y**2 * jnp.arange(1.0, N + 1)).mean(), y

    gradients, y = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return y, *gradients


MESHES = [
    pytest.param(None, 4, 2, 4, id="no mesh"),
    pytest.param((2, 2, 2), 4, 2, 4, id="two heads on each device"),
    pytest.param((2, 1, 4), 4, 2, 4, id="fewer key/value heads than devices"),
    pytest.param((1, 2, 4), 12, 6, 2, id="key/value heads that devices do not divide"),
    pytest.param((4, 1, 2), 3, 1, 4, id="query heads that devices do not divide"),
    pytest.param((4, 1, 2), 4, 4, 3, id="rows that devices do not divide"),
]


@pytest.mark.parametrize(("sizes", "heads", "kv_heads", "rows"), MESHES)
def test_splash_equals_xla_in_value_and_gradient(sizes, heads, kv_heads, rows):
    args = inputs(heads, kv_heads, rows)
    expected = value_and_gradients(*args, implementation="xla")
    if sizes is None:
        got = value_and_gradients(*args, implementation="splash_interpret")
    else:
        with jax.set_mesh(sharding.make_mesh(*sizes)):
            got = value_and_gradients(*args, implementation="splash_interpret")
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("length", [384, 640])
def test_splash_takes_lengths_that_are_not_powers_of_two(length):
    args = inputs(2, 1, rows=1, length=length)
    np.testing.assert_allclose(attend(*args, "splash_interpret"), oracle(*args), atol=2e-5)


@pytest.mark.parametrize(
    ("seq_len", "head_dim", "window", "block"),
    [
        (8192, 128, 0, 1024), (2048, 64, 0, 1024), (1024, 128, 0, 512), (8192, 256, 0, 512), (8192, 128, 512, 512),
        (8192, 128, 4096, 1024), (2560, 128, 0, 512), (2176, 128, 0, 128),
    ],
)  # fmt: skip
def test_blocks_of_splash_attention(seq_len, head_dim, window, block):
    assert splash_block(seq_len, head_dim, window) == block


def test_splash_takes_large_blocks():
    args = inputs(1, 1, rows=1, length=2048, features=8)
    np.testing.assert_allclose(attend(*args, "splash_interpret"), attend(*args, "xla"), atol=2e-5)


def test_later_tokens_and_other_segments_do_not_matter():
    q, k, v, segment_ids = inputs(4, 2)
    y = attend(q, k, v, segment_ids, "xla")
    cut = T // 2
    other = (segment_ids != segment_ids[:, cut : cut + 1]) | (np.arange(T) > cut)
    k2, v2 = (np.where(other[:, :, None, None], x + 100, x) for x in (k, v))
    np.testing.assert_array_equal(attend(q, k2, v2, segment_ids, "xla")[:, cut], y[:, cut])


def test_bfloat16_stays_bfloat16():
    q, k, v, segment_ids = inputs(4, 2)
    args = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    for implementation in ("xla", "splash_interpret"):
        y = attend(*args, segment_ids, implementation)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(y.astype(jnp.float32), oracle(q, k, v, segment_ids), atol=0.05)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
def test_cudnn_equals_the_dense_oracle():
    q, k, v, segment_ids = inputs(4, 2, features=64)
    args = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    y = attend(*args, segment_ids, "cudnn")
    np.testing.assert_allclose(y.astype(jnp.float32), oracle(q, k, v, segment_ids), atol=0.05)


@pytest.mark.parametrize(
    ("implementation", "platform", "seq_len", "head_dim", "dtype", "expected"),
    [
        ("auto", "cpu", 1024, 64, "bfloat16", "xla"),
        ("auto", "gpu", 1024, 64, "bfloat16", "cudnn"),
        ("auto", "gpu", 1024, 64, "float32", "xla"),
        ("auto", "gpu", 1024, 100, "bfloat16", "xla"),
        ("auto", "gpu", 1024, 256, "bfloat16", "xla"),
        ("auto", "gpu", 1023, 64, "bfloat16", "xla"),
        ("auto", "tpu", 1280, 64, "bfloat16", "splash"),
        ("auto", "tpu", 128, 80, "float32", "splash"),
        ("auto", "tpu", 64, 64, "bfloat16", "xla"),
        ("xla", "tpu", 1024, 64, "bfloat16", "xla"),
        ("splash", "tpu", 1024, 64, "bfloat16", "splash"),
        ("splash_interpret", "cpu", 128, 64, "float32", "splash_interpret"),
    ],
)
def test_resolve(implementation, platform, seq_len, head_dim, dtype, expected):
    assert resolve(implementation, platform, seq_len, [head_dim], dtype) == expected


@pytest.mark.parametrize(
    ("implementation", "platform", "seq_len", "dtype", "needs"),
    [
        ("splash", "cpu", 1024, "bfloat16", "a TPU"),
        ("splash", "tpu", 1000, "bfloat16", "multiple of 128"),
        ("cudnn", "tpu", 1024, "bfloat16", "a GPU"),
        ("cudnn", "gpu", 1024, "float32", "dtype bfloat16"),
        ("cudnn", "gpu", 1023, "bfloat16", "even seq_len"),
    ],
)
def test_resolve_says_what_a_kernel_needs(implementation, platform, seq_len, dtype, needs):
    with pytest.raises(UserError, match=rf"teacher.attention='{implementation}' needs .*{needs}.*Use 'auto'"):
        resolve(implementation, platform, seq_len, [64], dtype, field="teacher")
