"""The mesh, and how parameters and states that mirror them are laid out on it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=256, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128, max_seq_len=32,
    norm="layernorm", position="learned", mlp="silu_gated", qkv_bias=True, attn_out_bias=True, mlp_bias=True,
)  # fmt: skip


def shapes(config=CONFIG):
    return jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))


def specs(tree, mesh):
    flat, _ = jax.tree_util.tree_flatten_with_path(sharding.tree_sharding(tree, mesh))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): s.spec for path, s in flat}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, 4), (1, 2, 4)), ((8, -1, 1), (8, 1, 1))],
)
def test_mesh_takes_the_devices_that_are_left(sizes, shape):
    mesh = sharding.make_mesh(*sizes)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert sharding.batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), r"mesh.data=3, mesh.fsdp=1, mesh.tensor=1 asks for 3 devices, but there are 8\b"),
        ((3, -1, 1), "mesh.data=3, mesh.fsdp=-1, mesh.tensor=1 asks for 6 devices"),
        ((16, -1, 1), "asks for 16 devices"),
        ((-1, -1, 1), "at most one of them -1"),
        ((0, 1, 8), "at least 1"),
        ((8, -2, 1), "at least 1"),
    ],
)
def test_mesh_errors(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(*sizes)


def test_parameters_are_laid_out_by_name():
    got = specs(shapes(), sharding.make_mesh(2, 2, 2))
    assert got["embed/embedding"] == P("tensor", "fsdp")
    assert got["position_embed/embedding"] == P(None, "fsdp")
    assert got["head"] == P("fsdp", "tensor")
    assert got["layers/attn/q/kernel"] == P(None, "fsdp", "tensor", None)
    assert got["layers/attn/k/kernel"] == P(None, "fsdp", "tensor", None)
    assert got["layers/attn/o/kernel"] == P(None, "tensor", None, "fsdp")
    assert got["layers/attn/q/bias"] == P(None, "tensor", None)
    assert got["layers/mlp/gate/kernel"] == P(None, "fsdp", "tensor")
    assert got["layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert got["layers/mlp/up/bias"] == P(None, "tensor")
    assert got["layers/attn_norm/scale"] == P(None, None) and got["final_norm/bias"] == P(None)


def test_every_matrix_is_spread_over_fsdp():
    for name, spec in specs(shapes(), sharding.make_mesh(1, 8, 1)).items():
        if name.endswith(("kernel", "embedding", "head")):
            assert "fsdp" in spec, name


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(1e-3), optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-3))]
)
def test_moments_follow_their_parameters(optimizer):
    mesh, params = sharding.make_mesh(2, 2, 2), shapes()
    expected = specs(params, mesh)
    state = jax.eval_shape(optimizer.init, params)
    got = specs(state, mesh)
    moments = {name: spec for name, spec in got.items() if "mu/" in name or "nu/" in name}
    assert len(moments) in (len(expected), 2 * len(expected))
    for name, spec in moments.items():
        assert spec == expected[name.split("mu/")[-1].split("nu/")[-1]], name
    assert all(spec == P() for name, spec in got.items() if name.endswith("count"))


def test_what_does_not_divide_stays_whole():
    config = ModelConfig(
        vocab_size=255, num_layers=2, d_model=66, num_heads=3, num_kv_heads=3, head_dim=16, mlp_dim=130
    )
    got = specs(shapes(config), sharding.make_mesh(1, 4, 2))
    assert got["embed/embedding"] == P(None, None)
    assert got["layers/attn/q/kernel"] == P(None, None, None, None)
    assert got["layers/mlp/up/kernel"] == P(None, None, "tensor")
    params = jax.jit(
        lambda: transformer.init(config, jax.random.key(0)),
        out_shardings=sharding.tree_sharding(shapes(config), sharding.make_mesh(1, 4, 2)),
    )()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes(config))


def test_factored_statistics_fall_back():
    """Leaves named as a parameter but of fewer axes than it (row and column statistics) are still laid out validly."""
    mesh = sharding.make_mesh(1, 4, 2)
    state = jax.eval_shape(optax.adafactor(1e-3, min_dim_size_to_factor=8).init, shapes())
    for s, x in zip(jax.tree.leaves(sharding.tree_sharding(state, mesh)), jax.tree.leaves(state), strict=True):
        s.shard_shape(x.shape)  # raises where the layout does not divide


@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 3, 5)])
def test_rows_of_any_rank_are_spread_by_their_first_axis(shape):
    mesh = sharding.make_mesh(2, 2, 2)
    x = np.arange(math.prod(shape)).reshape(shape)
    for put in (sharding.put_batch, sharding.put_rows):
        there = put({"x": x}, mesh)["x"]
        assert there.sharding == sharding.batch_sharding(mesh, x.ndim)
        assert there.sharding.shard_shape(shape) == (2, *shape[1:])
        np.testing.assert_array_equal(there, x)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, sharding.row_axes(x.ndim)))(x)
        z = jax.jit(lambda x: sharding.constrain(x, (None, *sharding.row_axes(x.ndim - 1))))(np.stack([x, x]))
    assert y.sharding.shard_shape(y.shape) == (2, *shape[1:]) and z.sharding.shard_shape(z.shape) == (2, 2, *shape[1:])


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, ("batch", "length")) is x
    assert sharding.shards("heads") == 1 and sharding.batch_shards() == 1


def test_constrain_and_shards_on_a_mesh():
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        assert (sharding.shards("heads"), sharding.shards("batch"), sharding.shards("length")) == (2, 4, 1)
        y = jax.jit(lambda x: sharding.constrain(x, ("batch", "length")))(jnp.ones((4, 5)))
        z = jax.jit(lambda x: sharding.constrain(x, ("batch", "length")))(jnp.ones((3, 5)))
    assert y.sharding.shard_shape(y.shape) == (1, 5) and z.sharding.shard_shape(z.shape) == (3, 5)


def test_per_device_sees_its_own_part():
    def sizes(x, y):
        return x * 0 + x.shape[0] * 100 + y.shape[1]

    run = sharding.per_device(sizes, (("batch", "length"), ("batch", "heads")), ("batch", "length"))
    assert run(jnp.ones((8, 2)), jnp.ones((8, 4)))[0, 0] == 804
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        run = sharding.per_device(sizes, (("batch", "length"), ("batch", "heads")), ("batch", "length"))
        assert jax.jit(run)(jnp.ones((8, 2)), jnp.ones((8, 4)))[0, 0] == 202
        assert jax.jit(run)(jnp.ones((6, 2)), jnp.ones((6, 3)))[0, 0] == 603


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """As much of a TPU of one of several slices as a mesh looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_of_several_slices_each_holds_a_run_of_the_data_axis():
    devices = [SliceDevice(i, i // 4) for i in range(8)]
    mesh = sharding.make_mesh(4, 2, 1, devices=devices)
    assert tuple(mesh.shape.values()) == (4, 2, 1)
    assert [[d.slice_index for d in row] for row in mesh.devices[:, :, 0]] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    mesh = sharding.make_mesh(-1, 4, 1, devices=devices)
    assert [{d.slice_index for d in row} for row in mesh.devices[:, :, 0]] == [{0}, {1}]
    with pytest.raises(UserError, match="mesh.data=1 is not a multiple of the 2 slices"):
        sharding.make_mesh(1, 8, 1, devices=devices)


def test_programs_of_64_bits_are_refused():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        with pytest.raises(UserError, match="JAX_ENABLE_X64 is on.*unset it"):
            sharding.make_mesh()
    sharding.make_mesh()
