"""What holds for every decoder, over the switches of its config."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import sharding
from lmboost.errors import UserError
from lmboost.models import block, model_config, transformer
from lmboost.models.model_config import ModelConfig
from lmboost.models.presets import PRESETS, tiny

BASE = ModelConfig(
    vocab_size=97, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_seq_len=32,
    dtype="float32", init_std=0.2,
)  # fmt: skip
GPT2 = {
    "norm": "layernorm", "position": "learned", "num_kv_heads": 4, "mlp": "gelu_tanh", "qkv_bias": True,
    "attn_out_bias": True, "mlp_bias": True, "tie_embeddings": True,
}  # fmt: skip
GRID = {
    "llama": {},
    "gpt2": GPT2,
    "opt": {**GPT2, "mlp": "relu", "position_offset": 2},
    "pythia": {
        "norm": "layernorm", "rope_fraction": 0.25, "mlp": "gelu", "parallel_residual": True, "qkv_bias": True,
        "attn_out_bias": True, "mlp_bias": True, "num_kv_heads": 4,
    },
    "qk norm": {"qk_norm": "head", "norm": "layernorm_nobias"},
    "full qk norm": {"qk_norm": "full", "final_norm": False},
    "by layer": {"scale_attn_by_layer": True, "num_kv_heads": 1, "rope_scaling_factor": 8.0},
    "post norm": {"norm_placement": "post", "qk_norm": "full"},
    "sliding window": {"sliding_window": 5},
    "gemma": {
        "layer_kinds": "window,full", "sliding_window": 5, "rope_local_theta": 100.0, "norm_placement": "both",
        "zero_centred_norm": True, "mlp": "gelu_tanh_gated", "qk_norm": "head", "embed_scale": 3.0,
        "attn_scale": 0.4, "attn_softcap": 2.0, "logit_softcap": 3.0,
    },
    "granite, nope": {
        "layer_kinds": "full,nope", "residual_scale": 0.3, "logit_divisor": 4.0, "rope_scaling": "yarn",
        "rope_scaling_factor": 4.0, "rope_original_seq_len": 16, "rope_high_freq_factor": 32.0,
        "rope_attention_factor": 1.2,
    },
    "remat": {"remat": "dots", "vocab_multiple": 128, "tie_embeddings": True},
}  # fmt: skip
CONFIGS = {name: dataclasses.replace(BASE, **changes) for name, changes in GRID.items()}
grid = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
B, T = 2, 16


@functools.cache
def params_of(config, scale=0.2):
    """Every parameter drawn at random, biases and scales too, so that none of them goes unseen."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))

    def draw(path, x):
        ones = jax.tree_util.keystr(path).endswith("['scale']") and not config.zero_centred_norm
        return np.asarray(ones + scale * rng.normal(size=x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capture")
def apply(config, params, tokens, segment_ids, positions, capture=()):
    return transformer.apply(config, params, tokens, segment_ids, positions, capture=capture)


def batch(rows=B, length=T, seed=0):
    """One segment in each row."""
    tokens = np.random.default_rng(seed).integers(0, BASE.vocab_size, (rows, length), dtype=np.int32)
    return tokens, np.ones_like(tokens), np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(a).max())), rtol=0)


def trees_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: close(x, y, tolerance), a, b)


@grid
def test_a_later_token_changes_no_earlier_state(config):
    tokens, segment_ids, positions = batch()
    other = tokens.copy()
    other[:, T // 2] = (other[:, T // 2] + 1) % BASE.vocab_size
    a, _ = apply(config, params_of(config), tokens, segment_ids, positions)
    b, _ = apply(config, params_of(config), other, segment_ids, positions)
    np.testing.assert_array_equal(a[:, : T // 2], b[:, : T // 2])
    assert (np.abs(a - b).max(-1)[:, T // 2 :] > 1e-4).all(), "and all later states"


@grid
def test_a_document_in_a_row_is_the_document_alone(config):
    tokens, ids, positions = batch(rows=4, length=T // 2)
    alone, _ = apply(config, params_of(config), tokens, ids, positions)
    segment_ids = (ids * np.array([[1], [2], [1], [2]])).astype(np.int32)
    together, _ = apply(config, params_of(config), *(x.reshape(B, T) for x in (tokens, segment_ids, positions)))
    close(alone.reshape(B, T, -1), together)


@grid
def test_padding_changes_nothing(config):
    """Padding is segment 0 at position 0, after a document or in front of it."""
    tokens, ids, positions = batch(rows=4, length=T // 2)
    alone, _ = apply(config, params_of(config), tokens, ids, positions)
    for front, pad in ((0, ((0, 0), (0, T // 2))), (T // 2, ((0, 0), (T // 2, 0)))):
        padded, _ = apply(config, params_of(config), *(np.pad(x[:B], pad) for x in (tokens, ids, positions)))
        close(alone[:B], padded[:, front : front + T // 2])


@grid
def test_rows_do_not_see_each_other(config):
    tokens, segment_ids, positions = batch()
    other = np.stack([tokens[0], tokens[1][::-1]])
    a, _ = apply(config, params_of(config), tokens, segment_ids, positions)
    b, _ = apply(config, params_of(config), other, segment_ids, positions)
    np.testing.assert_array_equal(a[0], b[0])


@grid
@pytest.mark.parametrize("padding", [0, 3])
def test_a_cache_fed_in_pieces_gives_the_states_of_the_whole(config, padding):
    """Padding on the left, as rows have that are shorter than others."""
    tokens, segment_ids, positions = (np.pad(x, ((0, 0), (padding, 0))) for x in batch())
    whole, _ = apply(config, params_of(config), *batch())
    slots = np.pad(segment_ids, ((0, 0), (0, 7 - padding)))  # and slots that are never filled
    cache, parts = transformer.init_cache(config, B, slots.shape[1]), []
    for part in np.split(np.arange(padding + T), [7, 8, 9, *range(T, T + padding)]):  # of 7 or of 1: two programs
        h, cache = cached(config, params_of(config), tokens[:, part], slots, positions[:, part], cache)
        parts.append(h)
    assert cache.index == padding + T
    close(whole, np.concatenate(parts, 1)[:, padding:])


@functools.partial(jax.jit, static_argnums=0)
def cached(config, params, tokens, segment_ids, positions, cache):
    return transformer.apply_cached(config, params, tokens, segment_ids, positions, cache)


def test_a_sliding_window_hides_what_is_farther():
    config = dataclasses.replace(BASE, num_layers=1, sliding_window=5)
    tokens, segment_ids, positions = batch()
    other = tokens.copy()
    other[:, 3] = (other[:, 3] + 1) % BASE.vocab_size
    a, b = (apply(config, params_of(config), x, segment_ids, positions)[0] for x in (tokens, other))
    changed = np.abs(a - b).max((0, 2)) > 1e-4
    np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(3, 3 + 5))


def test_grouped_queries_are_repeated_key_value_heads():
    grouped, full = CONFIGS["llama"], dataclasses.replace(CONFIGS["llama"], num_kv_heads=4)
    params = params_of(grouped)

    def repeat(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.repeat(x, 2, axis=-2) if name.endswith(("k/kernel", "v/kernel")) else x

    a, _ = apply(grouped, params, *batch())
    b, _ = apply(full, jax.tree_util.tree_map_with_path(repeat, params), *batch())
    close(a, b)


@pytest.mark.parametrize("name", ["gpt2", "by layer", "full qk norm"])
def test_captured_states_are_those_of_the_truncated_stack(name):
    config, params = CONFIGS[name], params_of(CONFIGS[name])
    h, captured = apply(config, params, *batch(), capture=(0, 1, 2, 3))
    plain, none = apply(config, params, *batch())
    close(h, plain)
    assert set(captured) == {0, 1, 2, 3} and none == {}
    fewer = dataclasses.replace(config, num_layers=2, final_norm=False)
    first = {**params, "layers": jax.tree.map(lambda a: a[:2], params["layers"])}
    close(captured[2], apply(fewer, first, *batch())[0])
    embedded = params["embed"]["embedding"][batch()[0]]
    if config.position == "rope":
        close(captured[0], embedded)
    else:
        close(captured[0], embedded + params["position_embed"]["embedding"][batch()[2] + config.position_offset])
    if not config.final_norm:
        close(captured[3], h)


def test_an_identity_tap_changes_neither_result_nor_gradient():
    config, params, data = CONFIGS["by layer"], params_of(CONFIGS["by layer"]), batch()

    @functools.partial(jax.jit, static_argnums=0)
    def run(tapped, params):
        taps = {k: (lambda x: x) for k in (0, 2, 3)} if tapped else None

        def total(params):
            return (transformer.apply(config, params, *data, taps=taps)[0] ** 2).mean()

        return jax.value_and_grad(total)(params)

    trees_close(run(False, params), run(True, params))


def test_a_tap_sees_the_captured_state_and_guides_what_follows():
    config, params, data = BASE, params_of(BASE), batch()
    seen = {}

    def double(x):
        seen["x"] = x
        return 2 * x

    h, captured = transformer.apply(config, params, *data, capture=(1, 2), taps={1: double})
    np.testing.assert_array_equal(seen["x"], captured[1])
    one = {**params, "layers": jax.tree.map(lambda a: a[:1], params["layers"])}
    close(captured[1], apply(dataclasses.replace(config, num_layers=1, final_norm=False), one, *data)[0])
    assert np.abs(h - apply(config, params, *data)[0]).max() > 1e-3


def test_remat_changes_no_gradient():
    def gradient(remat):
        config = dataclasses.replace(BASE, remat=remat)
        return jax.jit(jax.grad(lambda p: (transformer.apply(config, p, *batch())[0] ** 2).mean()))(params_of(BASE))

    none = gradient("none")
    trees_close(none, gradient("dots"))
    trees_close(none, gradient("full"))


def test_remat_recomputes_what_it_says():
    def products(remat):
        config = dataclasses.replace(BASE, remat=remat, attention="xla")
        gradient = jax.grad(lambda p: (transformer.apply(config, p, *batch())[0] ** 2).mean())
        return str(jax.make_jaxpr(gradient)(params_of(BASE))).count("dot_general[")

    dense = 6 + (BASE.mlp == "silu_gated")
    assert products("dots") == products("none") + 2  # attention's own two
    assert products("full") == products("dots") + dense - 1  # nothing needs the last one's output


# Norms, scaling, precision, vocabulary


@pytest.mark.parametrize("kind", model_config.NORMS)
def test_norm_is_its_formula(kind):
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(3, 2, (4, 5, 32)), rng.normal(size=32), rng.normal(size=32)
    params = {"scale": jnp.asarray(scale, jnp.float32)} | (
        {"bias": jnp.asarray(bias, jnp.float32)} if kind == "layernorm" else {}
    )
    eps = 0.1
    if kind == "rmsnorm":
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    else:
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale
        expected = expected + (bias if kind == "layernorm" else 0)
    norm = block.Norm(dataclasses.replace(BASE, norm=kind, norm_eps=eps))
    close(expected, norm.apply({"params": params}, jnp.asarray(x, jnp.float32)))
    assert norm.apply({"params": params}, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_logits_of_layer_i_are_divided_by_its_number():
    """Scaling by layer is the same as dividing the query projection of layer i by i + 1."""
    config = CONFIGS["by layer"]
    params = params_of(config)
    layers = jax.tree.map(lambda a: a, params["layers"])
    kernel = layers["attn"]["q"]["kernel"]
    layers["attn"]["q"] = {"kernel": kernel / jnp.arange(1, config.num_layers + 1).reshape(-1, 1, 1, 1)}
    scaled, _ = apply(config, params, *batch())
    unscaled = dataclasses.replace(config, scale_attn_by_layer=False)
    divided, _ = apply(unscaled, {**params, "layers": layers}, *batch())
    close(scaled, divided)
    assert np.abs(scaled - apply(unscaled, params, *batch())[0]).max() > 1e-3
    _, captured = apply(config, params, *batch(), capture=(1, 2))  # layers keep their number in a cut scan
    close(captured[2], apply(unscaled, {**params, "layers": layers}, *batch(), capture=(2,))[1][2])


@grid
def test_bfloat16_is_close_to_float32(config):
    params = params_of(config, scale=0.05)
    exact, _ = apply(config, params, *batch())
    rough, captured = apply(dataclasses.replace(config, dtype="bfloat16"), params, *batch(), capture=(1,))
    assert rough.dtype == captured[1].dtype == jnp.bfloat16
    error = np.linalg.norm(exact - rough.astype(np.float32)) / np.linalg.norm(exact)
    assert error < 0.03, error


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary_only_adds_rows(tied):
    config = dataclasses.replace(BASE, vocab_multiple=64, tie_embeddings=tied)
    assert config.vocab_rows == 128 and config.num_params() == BASE.num_params() - (97 * 32 if tied else 0)
    params = params_of(config)
    assert params["embed"]["embedding"].shape == (128, 32) and transformer.head(params).shape == (32, 128)
    cut = {**params, "embed": {"embedding": params["embed"]["embedding"][:97]}}
    if not tied:
        cut["head"] = params["head"][:, :97]
    plain = dataclasses.replace(config, vocab_multiple=1)
    np.testing.assert_array_equal(apply(config, params, *batch())[0], apply(plain, cut, *batch())[0])
    np.testing.assert_array_equal(transformer.head(cut), transformer.head(params)[:, :97])


def test_zero_centred_norms_begin_as_others_do():
    """Their scales are zeros, and the model computes what one with ones does."""
    config = dataclasses.replace(CONFIGS["gemma"], num_layers=1)
    params = transformer.init(config, jax.random.key(0))
    scales = [x for keys, x in jax.tree_util.tree_leaves_with_path(params) if "scale" in str(keys)]
    assert len(scales) == 7 and not any(x.any() for x in scales)
    others = transformer.init(plain := dataclasses.replace(config, zero_centred_norm=False), jax.random.key(0))
    np.testing.assert_array_equal(apply(config, params, *batch())[0], apply(plain, others, *batch())[0])


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m"])
def test_initial_scale(name):
    """Weights start at init_std; what writes to the residual stream at init_std / sqrt(2 L)."""
    config = tiny(PRESETS[name])
    params = jax.jit(functools.partial(transformer.init, config))(jax.random.key(1))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    layers = params["layers"]
    assert np.std(layers["mlp"]["up"]["kernel"]) == pytest.approx(config.init_std, rel=0.05)
    for kernel in (layers["mlp"]["down"]["kernel"], layers["attn"]["o"]["kernel"]):
        assert np.std(kernel) == pytest.approx(config.init_std / math.sqrt(2 * config.num_layers), rel=0.05)
    first, second = layers["mlp"]["up"]["kernel"][:2]
    assert np.abs(first - second).max() > 0.01, "each layer has its own draw"


# Devices and the compiler


@functools.partial(jax.jit, static_argnums=0)
def state_and_gradient(config, params, data):
    def total(params):
        h, captured = transformer.apply(config, params, *data, capture=(1,))
        return (h**2).mean() + captured[1].mean(), h

    gradient, h = jax.grad(total, has_aux=True)(params)
    return h, jax.tree.map(lambda g, p: sharding.constrain(g, (None,) * p.ndim), gradient, params)


@pytest.mark.parametrize(
    ("name", "sizes"), [("llama", (8, 1, 1)), ("llama", (2, 2, 2)), ("gpt2", (1, 2, 4))], ids=["data", "all", "tensor"]
)
def test_one_device_equals_eight(name, sizes):
    config, params, data = CONFIGS[name], params_of(CONFIGS[name]), batch(rows=8)
    expected = state_and_gradient(config, params, data)
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.tree_sharding(params, mesh))
        assert sizes == (8, 1, 1) or not params["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
        data = jax.device_put(data, sharding.batch_sharding(mesh))
        got = state_and_gradient(config, params, data)
    trees_close(expected, jax.tree.map(np.asarray, got))


@pytest.mark.parametrize("kinds", ["", "window,full", "5*window,full", "3*full,nope"])
def test_program_does_not_grow_with_depth(kinds):
    def length(layers):
        config = dataclasses.replace(BASE, num_layers=layers, remat="dots", layer_kinds=kinds, sliding_window=5)
        params = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
        loss = lambda p: transformer.apply(config, p, *batch(), capture=(2,))[0].sum()  # noqa: E731
        return len(jax.jit(jax.grad(loss)).lower(params).as_text())

    assert length(50) < 1.02 * length(26)  # two layers before the captured state, whole periods after it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "rms"}, r"model.norm='rms' is not known \(did you mean 'rmsnorm'\?\)"),
        ({"mlp": "swiglu"}, "model.mlp='swiglu' is not known.*: expected one of gelu, gelu_tanh, relu, silu"),
        ({"num_layers": -1}, "model.num_layers=-1: expected a number from 0 to"),
        ({"num_kv_heads": 3}, "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
        ({"attention": "flash"}, "model.attention='flash' is not known"),
        ({"dtype": "float16"}, "model.dtype='float16' is not known"),
    ],
)
def test_validate_names_the_field(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **change).validate()


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ([0, 6], [0, 6]), ([0, 1, 2], [0, 1, 2]), ([0, 12, 24], [0, 12, 23, 24]), ([0, 2, 4], [0, 2, 3, 4]),
        ([0, 8, 16, 24], [0, 8, 15, 16, 22, 24]), ([3, 4, 10], [3, 4, 10]),
    ],
)  # fmt: skip
def test_parts_of_layers_are_of_unequal_length(edges, found):
    assert transformer._unequal(edges) == found
    assert set(edges) <= set(found)
    lengths = [stop - start for start, stop in itertools.pairwise(found) if stop - start > 1]
    assert len(lengths) == len(set(lengths))
