"""Importance of the parts of a model, against loops written out, and what must not or must change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models import attention, rope, transformer
from lmboost.models.model_config import ModelConfig
from lmboost.surgery import importance

B, T = 8, 12
LLAMA = ModelConfig(
    vocab_size=61, num_layers=3, d_model=24, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=20, max_seq_len=T,
    dtype="float32",
)  # fmt: skip
PYTHIA = dataclasses.replace(
    LLAMA, num_kv_heads=4, norm="layernorm", rope_fraction=0.25, mlp="gelu", parallel_residual=True, qkv_bias=True,
    attn_out_bias=True, mlp_bias=True,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "pythia": PYTHIA,
    "gpt2": dataclasses.replace(
        PYTHIA, parallel_residual=False, position="learned", mlp="gelu_tanh", tie_embeddings=True
    ),
    "post norm": dataclasses.replace(LLAMA, norm_placement="post"),
}
grid = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def params_of(config, seed=1):
    """Every parameter drawn at random, biases and scales too."""
    shapes, rng = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0))), np.random.default_rng(seed)

    def draw(path, x):
        return np.asarray(jax.tree_util.keystr(path).endswith("['scale']") + 0.3 * rng.normal(size=x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def batch(seed=0, rows=B):
    """Two documents in a row, and padding after the second."""
    tokens = np.random.default_rng(seed).integers(0, 61, (rows, T), dtype=np.int32)
    segment_ids = np.tile(np.repeat(np.array([1, 2, 0], np.int32), (5, 4, T - 9)), (rows, 1))
    positions = np.tile(np.concatenate([np.arange(5), np.arange(4), np.zeros(T - 9)]).astype(np.int32), (rows, 1))
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}


def measure(config, params, batches, devices=1):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return importance.measure(config, params, batches, mesh)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), parts(a), parts(b))


def parts(found):
    return {name: x for name, x in dataclasses.asdict(found).items() if name != "head_dim"}


def normed(config, weights, x):
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weights["scale"] + weights.get("bias", 0)


def by_hand(config, params, batches):
    """One token after another, from the definition of the model and of each statistic."""
    width, layers, heads, units, count = 0, [0] * config.num_layers, [0] * config.num_layers, [0] * config.num_layers, 0
    for b in batches:
        tokens, segments, positions = b["tokens"], b["segment_ids"], b["positions"]
        x = params["embed"]["embedding"][tokens]
        if config.position == "learned":
            x = x + params["position_embed"]["embedding"][positions]
        for layer in range(config.num_layers):
            w = jax.tree.map(lambda a, i=layer: a[i], params["layers"])
            before, post = x, config.norm_placement == "post"
            attn_in = x if post else normed(config, w["attn_norm"], x)
            q, k, v = (
                np.einsum("btd,dhn->bthn", attn_in, w["attn"][n]["kernel"]) + w["attn"][n].get("bias", 0) for n in "qkv"
            )
            if config.position == "rope":
                q, k = rope.apply(jnp.asarray(q), positions, config), rope.apply(jnp.asarray(k), positions, config)
            matrices = attention.weights(q, k, segments)
            y = np.einsum("bhts,bshn->bthn", matrices, np.repeat(v, config.num_heads // config.num_kv_heads, axis=2))
            out = np.einsum("bthn,hnd->btd", y, w["attn"]["o"]["kernel"]) + w["attn"]["o"].get("bias", 0)
            middle = x + (normed(config, w["attn_norm"], out) if post else out)
            mlp_in = middle if post else normed(config, w["mlp_norm"], x if config.parallel_residual else middle)
            h = mlp_in @ w["mlp"]["up"]["kernel"] + w["mlp"]["up"].get("bias", 0)
            if config.mlp == "silu_gated":
                h = np.asarray(jax.nn.silu(mlp_in @ w["mlp"]["gate"]["kernel"])) * h
            else:
                h = np.asarray(jax.nn.gelu(h, approximate=config.mlp == "gelu_tanh"))
            out = h @ w["mlp"]["down"]["kernel"] + w["mlp"]["down"].get("bias", 0)
            x = middle + (normed(config, w["mlp_norm"], out) if post else out)
            for row, place in zip(*np.nonzero(segments), strict=True):
                width = width + np.abs(attn_in[row, place]) + np.abs(mlp_in[row, place])
                heads[layer] = heads[layer] + np.sqrt((y[row, place] ** 2).sum(-1))
                units[layer] = units[layer] + np.abs(h[row, place])
                a, c = before[row, place], x[row, place]
                layers[layer] += 1 - a @ c / np.sqrt((a @ a) * (c @ c))
        count += (segments > 0).sum()
    groups = (config.num_layers, config.num_kv_heads, -1)
    return importance.Importance(
        width / (2 * config.num_layers * count), np.array(layers) / count,
        (np.array(heads) / count).reshape(groups), np.array(units) / count, config.head_dim,
    )  # fmt: skip


@grid
def test_the_means_are_those_of_a_loop_over_tokens(config):
    batches = [batch(0), batch(1)]
    close(measure(config, params_of(config), batches), by_hand(config, params_of(config), batches))


def test_eight_devices_measure_what_one_does():
    batches = [batch(0), batch(1)]
    eight, one = (measure(LLAMA, params_of(LLAMA), batches, devices) for devices in (8, 1))
    close(eight, one)
    assert eight.orders() == one.orders()


@grid
def test_padding_and_how_rows_fall_into_batches_change_nothing(config):
    params, rows = params_of(config), batch(0, rows=4)
    other = rows | {"tokens": np.where(rows["segment_ids"] > 0, rows["tokens"], 7).astype(np.int32)}
    longer = {n: np.pad(x, ((0, 4), (0, 0))) for n, x in rows.items()}
    halves = [{n: x[i : i + 2] for n, x in rows.items()} for i in (0, 2)]
    expected = measure(config, params, [rows])
    for batches in ([other], [longer], halves):
        close(measure(config, params, batches), expected)


def test_what_is_dead_comes_last():
    params = params_of(PYTHIA)
    attn, mlp = params["layers"]["attn"], params["layers"]["mlp"]
    params["embed"]["embedding"][:, 5] = 0  # a feature that nothing writes
    attn["o"]["kernel"][..., 5], attn["o"]["bias"][:, 5] = 0, 0
    mlp["down"]["kernel"][..., 5], mlp["down"]["bias"][:, 5] = 0, 0
    for norm in ("attn_norm", "mlp_norm"):
        params["layers"][norm]["scale"][:, 5] = params["layers"][norm]["bias"][:, 5] = 0
    attn["v"]["kernel"][1, :, 2], attn["v"]["bias"][1, 2] = 0, 0  # a head of layer 1
    mlp["up"]["kernel"][2, :, 11], mlp["up"]["bias"][2, 11] = 0, 0  # a unit of layer 2
    for name in ("kernel", "bias"):  # all of layer 0
        attn["o"][name][0] = mlp["down"][name][0] = 0
    found = measure(PYTHIA, params, [batch()])
    orders = found.orders()
    assert (orders["width"][-1], orders["layers"][-1]) == (5, 0)
    assert (orders["groups"][1][-1], orders["units"][2][-1]) == (2, 11)
    assert found.width_D[5] == found.heads_LxKxG[1, 2] == found.units_LxF[2, 11] == 0
    assert abs(found.layers_L[0]) < 1e-6 < 1e-2 < found.layers_L[1:].min()


def test_permuting_a_model_permutes_its_order():
    """Its units, the query heads of a group, its groups and its features, each by a permutation of their own."""
    rng, params = np.random.default_rng(3), params_of(LLAMA)
    units, width = rng.permutation(LLAMA.mlp_dim), rng.permutation(LLAMA.d_model)
    groups, members = np.array([1, 0]), np.array([1, 0])  # 2 groups of 2
    heads = (2 * groups[:, None] + members).reshape(-1)

    def moved(path, x):
        name = jax.tree_util.keystr(path)
        for end, axis, index in (
            ("['q']['kernel']", 2, heads), ("['o']['kernel']", 1, heads), ("['k']['kernel']", 2, groups),
            ("['v']['kernel']", 2, groups), ("['up']['kernel']", 2, units), ("['gate']['kernel']", 2, units),
            ("['down']['kernel']", 1, units),
        ):  # fmt: skip
            x = np.take(x, index, axis) if name.endswith(end) else x
        axes = [i for i, n in enumerate(x.shape) if n == LLAMA.d_model]
        assert len(axes) == 1, name
        return np.take(x, width, axes[0])

    before = measure(LLAMA, params, [batch()]).orders()
    after = measure(LLAMA, jax.tree_util.tree_map_with_path(moved, params), [batch()]).orders()
    assert after["layers"] == before["layers"] and after["features"] == before["features"]
    assert tuple(width[list(after["width"])]) == before["width"] != after["width"]
    for layer in range(LLAMA.num_layers):
        assert tuple(units[list(after["units"][layer])]) == before["units"][layer]
        assert tuple(groups[list(after["groups"][layer])]) == before["groups"][layer]
        for group in range(2):
            own = after["heads"][layer][group]
            assert tuple(members[list(own)]) == before["heads"][layer][groups[group]]


def test_orders_name_every_part_once_and_equal_parts_as_they_come():
    even = importance.Importance(np.ones(5), np.array([1.0, 3.0]), np.ones((2, 2, 3)), np.ones((2, 4)), head_dim=6)
    assert even.orders() == {
        "width": (0, 1, 2, 3, 4), "layers": (1, 0), "groups": ((0, 1),) * 2, "heads": (((0, 1, 2),) * 2,) * 2,
        "features": ((0, 1, 2, 3, 4, 5),) * 2, "units": ((0, 1, 2, 3),) * 2,
    }  # fmt: skip


def test_one_layer_is_compiled_whatever_the_depth():
    def program(layers):
        config = dataclasses.replace(LLAMA, num_layers=layers)
        shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
        ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
        lowered = importance.sums.lower(config, shapes, ids, ids, ids)
        return lowered.compile().as_text().count(" dot("), lowered.as_text().count("\n")

    assert program(3) == program(30)


def test_statistics_of_a_bfloat16_model_are_float32():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    found = jax.eval_shape(lambda *args: importance.sums(config, *args), shapes, ids, ids, ids)
    assert {x.dtype for x in found.values()} == {jnp.dtype("float32")}


def test_what_cannot_be_measured_is_named():
    unequal = dataclasses.replace(LLAMA, layer_sizes="2*4/2/8/20,2/1/8/20").validate()
    with pytest.raises(UserError, match=r"model.layer_sizes='2\*4/2/8/20,2/1/8/20'.*Take one of these as the parent"):
        measure(unequal, {}, [batch()])
    for batches in ([], [jax.tree.map(np.zeros_like, batch())]):
        with pytest.raises(UserError, match="the held-out text has no token"):
            measure(LLAMA, params_of(LLAMA), batches)
