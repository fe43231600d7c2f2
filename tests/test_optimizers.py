"""Optimizers: a stack of layers is trained as its layers would be one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmboost import optimizers, sharding
from lmboost.config import base
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig

SMALL = ModelConfig(
    vocab_size=24, num_layers=3, d_model=8, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=12, max_seq_len=16,
    norm="layernorm", position="learned", qk_norm="head", qkv_bias=True, attn_out_bias=True, mlp_bias=True,
)  # fmt: skip
# Axes of 128 and more, so that Adafactor factors; heads of 64, as one axis of which it would not.
WIDE = dataclasses.replace(
    SMALL, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=160,
    norm="rmsnorm", position="rope", qk_norm="none", attn_out_bias=False, mlp_bias=False,
)  # fmt: skip


def optimizer(**fields):
    c = base().optimizer
    c.update({"warmup_steps": 2, "learning_rate": 1e-2} | fields)
    return c


@functools.cache
def params(config=SMALL):
    """Random parameters whose layers differ in scale: a statistic over the stack is not that of a layer."""
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    shapes = {"model": shapes, "align": {"2": jax.ShapeDtypeStruct((6, config.d_model), jnp.float32)}}
    return layer_scaled(random_like(shapes, 0))


def random_like(tree, seed):
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [rng.normal(0, 0.1, x.shape).astype(np.float32) for x in leaves])


def layer_scaled(tree):
    scale = lambda x: x * (np.float32(4) ** np.arange(x.shape[0], dtype=np.float32)).reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    return tree | {"model": tree["model"] | {"layers": jax.tree.map(scale, tree["model"]["layers"])}}


def unstacked(tree):
    """The same parameters with one subtree per layer, in which every leaf is an array of its own."""
    model = dict(tree["model"])
    layers = model.pop("layers")
    count = jax.tree.leaves(layers)[0].shape[0]
    return {"rest": model | {"align": tree["align"]}} | {
        f"layer{i}": {"layers": jax.tree.map(lambda x, i=i: x[i], layers)} for i in range(count)
    }


def train(tx, start, gradients, view=lambda tree: tree):
    """The parameters after one step on each gradient."""
    p = view(start)
    state = quick_jit(tx.init)(p)
    for g in gradients:
        p, state = stepper(tx)(view(g), state, p)
    return p


# Compiling is most of the time that these tests take.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def stepper(tx):
    def step(gradient, state, p):
        updates, state = tx.update(gradient, state, p)
        return optax.apply_updates(p, updates), state

    return quick_jit(step)


def close(a, b, rtol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def gradients(config, count=4):
    return [layer_scaled(random_like(params(config), seed)) for seed in range(1, count + 1)]


@pytest.mark.slow
def test_adafactor_on_a_stack_is_adafactor_on_each_layer():
    """The oracle is optax.adafactor on every layer's kernels as matrices; it decays outside its learning rate."""
    c = optimizer(name="adafactor", weight_decay=0.0, clip_norm=0.0, learning_rate=0.5)
    tx, rate = optimizers.make_optimizer(c, 10, params(WIDE))

    def matrices(tree):
        tree = unstacked(tree)
        for layer in (v["layers"] for k, v in tree.items() if k != "rest"):
            for name, x in layer["attn"].items():
                if name in "qkvo":
                    x["kernel"] = x["kernel"].reshape(-1, 128) if name == "o" else x["kernel"].reshape(128, -1)
        return tree

    expected = train(optax.adafactor(rate), params(WIDE), gradients(WIDE), matrices)
    close(matrices(train(tx, params(WIDE), gradients(WIDE))), expected)
    # Over the whole stack it would be something else: the test can tell.
    naive = train(optax.adafactor(rate), params(WIDE), gradients(WIDE)[:1])
    with pytest.raises(AssertionError):
        close(naive, train(tx, params(WIDE), gradients(WIDE)[:1]))


def test_adafactor_factors_every_projection():
    tx, _ = optimizers.make_optimizer(optimizer(name="adafactor"), 10, params(WIDE))
    state = jax.eval_shape(tx.init, params(WIDE))
    sizes = {sharding.path_name(k): x.size for k, x in jax.tree_util.tree_leaves_with_path(state)}
    for name, (rows, columns) in {
        "attn/q": (128, 256),
        "attn/k": (128, 128),
        "attn/o": (256, 128),
        "mlp/up": (128, 160),
    }.items():
        statistics = sum(n for path, n in sizes.items() if path.endswith(f"layers/{name}/kernel"))
        assert statistics == 2 * (rows + columns + 1), name  # two layers; the 1 stands for the moment that is not kept


def test_muon_on_a_stack_is_muon_on_each_layer():
    c = optimizer(name="muon", clip_norm=0.0, learning_rate=0.1, weight_decay=0.1)
    tx, rate = optimizers.make_optimizer(c, 10, params())
    got = train(tx, params(), gradients(SMALL))

    def matrices(tree):
        """Only the layers' kernels, as 2-D matrices that plain Muon takes without being told their axes."""
        return {
            layer: {
                "/".join(path): x.reshape((16, 8) if "o" in path else (8, -1) if path[0] == "attn" else x.shape)
                for path, x in (
                    (sharding.path_name(k).split("/"), x) for k, x in jax.tree_util.tree_leaves_with_path(v["layers"])
                )
                if path[-1] == "kernel"
            }
            for layer, v in unstacked(tree).items()
            if layer != "rest"
        }

    oracle = optax.contrib.muon(rate, beta=c.b1, weight_decay=c.weight_decay, consistent_rms=0.2)
    close(matrices(got), train(oracle, params(), gradients(SMALL), matrices), rtol=1e-3)

    def others(tree):
        tree = unstacked(tree)
        drop = lambda k, x: None if sharding.path_name(k).endswith("kernel") else x  # noqa: E731
        return jax.tree_util.tree_map_with_path(drop, tree)

    adam = optax.chain(
        optax.scale_by_adam(c.b1, c.b2, c.eps, nesterov=True),
        optax.add_decayed_weights(c.weight_decay, lambda p: optimizers.decay_mask(p)),
        optax.scale_by_learning_rate(rate),
    )
    close(others(got), train(adam, params(), gradients(SMALL), others))


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_adamw_and_lion_are_those_of_optax(name):
    c = optimizer(name=name, clip_norm=1.0)
    tx, rate = optimizers.make_optimizer(c, 10, params())
    mask = optimizers.decay_mask(params())
    plain = {
        "adamw": lambda: optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=mask),
        "lion": lambda: optax.lion(rate, c.b1, c.b2, weight_decay=c.weight_decay, mask=mask),
    }[name]()
    expected = optax.chain(optax.clip_by_global_norm(1.0), plain)
    close(train(tx, params(), gradients(SMALL)), train(expected, params(), gradients(SMALL)))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_clipping_comes_first(name):
    """With a clip below every gradient's norm, the length of a gradient makes no difference."""
    tx, _ = optimizers.make_optimizer(optimizer(name=name, clip_norm=0.1), 10, params())
    longer = jax.tree.map(lambda x: 1000 * x, gradients(SMALL))
    close(train(tx, params(), gradients(SMALL)), train(tx, params(), longer), rtol=1e-3)


@pytest.mark.parametrize("name, embeddings", [("adamw", True), ("adafactor", False), ("muon", False), ("lion", True)])
def test_decay_shrinks_matrices_by_the_learning_rate_and_nothing_else(name, embeddings):
    c = optimizer(name=name, weight_decay=0.5, decay_embeddings=embeddings)
    tx, rate = optimizers.make_optimizer(c, 10, params())
    zero = jax.tree.map(np.zeros_like, params())
    after = train(tx, params(), [zero])
    for path, x in jax.tree_util.tree_leaves_with_path(after):
        before = functools.reduce(lambda tree, k: tree[k.key], path, params())
        path = sharding.path_name(path)
        decayed = path.endswith(("kernel", "head", "align/2")) or (embeddings and path.endswith("embedding"))
        np.testing.assert_allclose(x, before * (1 - rate(0) * 0.5 * decayed), rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", optimizers.NAMES)
@pytest.mark.parametrize("config", [SMALL, WIDE], ids=["small", "wide"])
def test_moments_lie_under_the_paths_of_their_parameters_and_are_sharded_like_them(name, config):
    tx, _ = optimizers.make_optimizer(optimizer(name=name), 10, params(config))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    paths = {sharding.path_name(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(params(config))}
    specs = {
        sharding.path_name(k): s.spec
        for k, s in jax.tree_util.tree_leaves_with_path(sharding.tree_sharding(params(config), mesh))
    }
    state = jax.eval_shape(tx.init, params(config))
    layout = jax.tree.leaves(sharding.tree_sharding(state, mesh))
    mirrored = set()
    for (keys, x), s in zip(jax.tree_util.tree_leaves_with_path(state), layout, strict=True):
        owner = next((p for p in paths if sharding.path_name(keys).endswith("/" + p)), None)
        assert owner or x.size <= 3, sharding.path_name(keys)  # counters, Newton-Schulz coefficients
        if owner and x.shape == paths[owner]:
            assert s.spec == specs[owner]
            mirrored.add(owner)
    assert mirrored == set(paths) or (name == "adafactor" and config == WIDE)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_sharded_update_is_the_update(name):
    tx, _ = optimizers.make_optimizer(optimizer(name=name), 10, params(WIDE))
    gradient = gradients(WIDE, 1)[0]
    mesh = sharding.make_mesh(1, 4, 2, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        layout = sharding.tree_sharding(params(WIDE), mesh)
        p, g = jax.device_put((params(WIDE), gradient), (layout, layout))
        state_layout = sharding.tree_sharding(jax.eval_shape(tx.init, p), mesh)
        state = quick_jit(tx.init, out_shardings=state_layout)(p)
        updates, state = quick_jit(tx.update, out_shardings=(layout, state_layout))(g, state, p)
    expected = quick_jit(tx.update)(gradient, quick_jit(tx.init)(params(WIDE)), params(WIDE))
    close(jax.device_get((updates, state)), jax.device_get(expected), rtol=1e-3)


def test_stacks_of_unequal_depth_are_handled_one_by_one():
    stacks = {
        "0": {"mlp": {"up": {"kernel": jnp.ones((2, 3, 6))}}},
        "1": {"mlp": {"up": {"kernel": jnp.ones((4, 3, 5))}}},
    }
    tree = {"model": {"layers": stacks}}
    tx, _ = optimizers.make_optimizer(optimizer(name="adafactor"), 10, tree)
    after = train(tx, tree, [tree])
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"name": "adamW"},
            r"optimizer.name='adamW' is not known \(did you mean 'adamw'\?\): expected one of adamw, ada",
        ),
        ({"b1": 1.0}, "optimizer.b1=1.0 is out of range: expected at least 0 and below 1"),
        ({"b2": -0.1}, "optimizer.b2=-0.1 is out of range"),
        ({"eps": -1e-8}, "optimizer.eps=-1e-08 is out of range"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm=-1.0 is out of range: expected a finite number, at least 0"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay=nan is out of range"),
        ({"warmup_steps": 100}, "optimizer.warmup_steps=100 does not fit"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        optimizers.make_optimizer(optimizer(**fields), 10, params())
