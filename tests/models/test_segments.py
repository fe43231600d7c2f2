"""Layers of unequal sizes: the decoder is what its layers make one after the other, in every way it is used."""

import dataclasses
import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import checkpoint, evaluate, flops, optimizers, plan, sharding
from lmboost.config import base, load
from lmboost.errors import UserError
from lmboost.generate import Generator
from lmboost.models import attention, transformer
from lmboost.models.block import Block
from lmboost.models.model_config import LayerSizes, ModelConfig, format_sizes, parse_sizes
from lmboost.surgery import attention_rank
from tests import runs
from tests.compare import assert_same, losses
from tests.models.test_transformer import GRID, apply, batch, cached, close, params_of, state_and_gradient, trees_close

SIZES = "2*4/2/8/48,6/3/16/32"
UNEQUAL = ModelConfig(
    vocab_size=97, num_layers=3, d_model=32, num_heads=6, num_kv_heads=3, head_dim=16, mlp_dim=48, layer_sizes=SIZES,
    max_seq_len=32, dtype="float32", init_std=0.2,
)  # fmt: skip
CONFIGS = {
    name: dataclasses.replace(UNEQUAL, **{k: v for k, v in changes.items() if k != "num_kv_heads"}).validate()
    for name, changes in GRID.items()
}
grid = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
STATES = (0, 1, 2, 3)


def some(*names):
    return pytest.mark.parametrize("config", [CONFIGS[name] for name in names], ids=names)


sizes_of_a_layer = st.builds(
    lambda group, kv, *others: LayerSizes(group * kv, kv, *others), *(st.integers(1, 9) for _ in range(4))
)


# ---------------------------------------------------------------- what sizes are and what they may be


@hypothesis.given(st.lists(st.tuples(sizes_of_a_layer, st.integers(1, 4)), min_size=1, max_size=5))
def test_sizes_are_read_as_they_are_written(runs_of_layers):
    sizes = tuple(size for size, count in runs_of_layers for _ in range(count))
    text = format_sizes(sizes)
    assert parse_sizes(text) == parse_sizes(text.replace(",", " , ")) == sizes
    assert text.count(",") == sum(a != b for a, b in zip(sizes, sizes[1:], strict=False)), "neighbours are together"
    config = dataclasses.replace(
        UNEQUAL, num_layers=len(sizes), layer_sizes=text, **LayerSizes(*map(max, zip(*sizes, strict=True)))._asdict()
    ).validate()
    back = [segment.config.sizes[0] for segment in config.segments() for _ in range(segment.start, segment.stop)]
    assert tuple(back) == config.sizes == sizes and all(not s.config.layer_sizes for s in config.segments())


@pytest.mark.parametrize("word", ["", "4/2/8", "4/2/8/48/1", "0*4/2/8/48", "4/2/0/48", "-1*4/2/8/48", "4/2/8/x", "2*"])
@pytest.mark.parametrize("text", ["4/2/8/48,{}", "{},4/2/8/48"])
def test_what_is_not_of_the_form_is_named(word, text):
    with pytest.raises(UserError, match=r"model.layer_sizes='.*': '.*' is not of the form COUNT\*HEADS/KV_HEADS"):
        dataclasses.replace(UNEQUAL, layer_sizes=text.format(word)).validate()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 5}, r"layer_sizes='.*' are 3 layers, but model.num_layers=5: give the sizes of every layer"),
        ({"layer_sizes": SIZES + ",5/3/16/32", "num_layers": 4}, "in layer 3 of model.layer_sizes: 5 heads is not a"),
        ({"num_heads": 8}, "model.num_heads=8, but the largest in model.layer_sizes is 6: set it to that"),
        ({"num_kv_heads": 2}, "model.num_kv_heads=2, but the largest in model.layer_sizes is 3"),
        ({"head_dim": 8}, "model.head_dim=8, but the largest in model.layer_sizes is 16"),
        ({"mlp_dim": 64}, "model.mlp_dim=64, but the largest in model.layer_sizes is 48"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(UNEQUAL, **change).validate()


def test_a_kernel_takes_the_heads_of_every_layer(tmp_path, recipe, data):
    resolve = functools.partial(attention.resolve, platform="gpu", seq_len=1024, dtype="bfloat16")
    assert resolve("auto", head_dims={64, 128}) == resolve("cudnn", head_dims={64, 128}) == "cudnn"
    assert resolve("auto", head_dims={64, 100}) == resolve("auto", head_dims={64, 256}) == "xla"
    with pytest.raises(UserError, match="model.attention='cudnn' needs a GPU.*; here: .* head_dim 64, 100, seq_len"):
        resolve("cudnn", head_dims={100, 64})
    for smaller, kernel in ((8, "cudnn"), (12, "xla")):
        sizes = f"--config.model.layer_sizes=2/1/16/64,1/1/{smaller}/32"
        c, workdir = load([f"--config={recipe}", f"--workdir={tmp_path}", data, sizes, "--config.model.dtype=bfloat16"])
        assert plan.make(c, workdir, "gpu", 8).student.attention == kernel


@grid
def test_parameters_are_counted(config):
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    padding = (config.vocab_rows - config.vocab_size) * config.d_model * (1 if config.tie_embeddings else 2)
    assert config.num_params() == sum(x.size for x in jax.tree.leaves(shapes)) - padding


@pytest.mark.parametrize("change", [{}, {"sliding_window": 5}, {"mlp": "gelu"}])
@pytest.mark.parametrize("layers", [None, 0, 1, 2])
def test_flops_are_those_of_the_layers(change, layers):
    config = dataclasses.replace(UNEQUAL, **change)
    each = [dataclasses.replace(config, layer_sizes="", num_layers=1, **sizes._asdict()) for sizes in config.sizes]
    expected = sum(flops.forward_flops(one, 32, vocabulary=False) for one in each[:layers])
    assert flops.forward_flops(config, 32, layers, vocabulary=False) == pytest.approx(expected)
    assert flops.forward_flops(config, 32, layers) == pytest.approx(expected + 2 * 32 * 97)


# ---------------------------------------------------------------- what is computed


@some("gpt2")
def test_equal_sizes_are_the_plain_model(config):
    plain = dataclasses.replace(config, layer_sizes="")
    written = dataclasses.replace(plain, layer_sizes="6/3/16/48,2*6/3/16/48").validate()
    a, b = (transformer.init(c, jax.random.key(0)) for c in (plain, written))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert written.num_params() == plain.num_params()
    trees_close(apply(plain, a, *batch(), capture=STATES), apply(written, b, *batch(), capture=STATES), 0)


def layer_by_layer(config, params, taps, tokens, segment_ids, positions):
    """(last hidden state, every state): the layers one after the other, each of its own sizes."""
    x = params["embed"]["embedding"][tokens]
    if config.position == "learned":
        x = x + params["position_embed"]["embedding"][positions + config.position_offset]
    states = {0: x}
    for layer, sizes in enumerate(config.sizes):
        own, weights = transformer.one_layer(config, params, layer)
        assert own.sizes[0] == sizes and weights["mlp"]["up"]["kernel"].shape == (32, sizes.mlp_dim)
        x = taps[layer](x) if layer in taps else x
        x, _ = Block(own, parent=None).apply({"params": weights}, x, segment_ids, positions, jnp.int32(layer))
        states[layer + 1] = x
    x = taps[3](x) if 3 in taps else x
    return transformer.Transformer(config).apply({"params": params}, x, method="norm_last"), states


@some("llama", "pythia", "full qk norm", "by layer", "post norm")
def test_it_is_its_layers_one_after_the_other(config):
    """The last state, every captured one, and both with taps on every state."""
    data = batch()

    @functools.partial(jax.jit, static_argnums=0)
    def run(tapped, params):
        taps = {state: lambda x, state=state: x * (1 + 0.1 * state) + 0.1 for state in STATES} if tapped else {}
        expected = layer_by_layer(config, params, taps, *data)
        captured = transformer.apply(config, params, *data, capture=STATES, taps=taps)
        return expected, captured, transformer.apply(config, params, *data, taps=taps)[0]

    for tapped in (False, True):
        expected, captured, last = run(tapped, params_of(config))
        trees_close(expected, captured)
        trees_close(expected[0], last)


def without_zeros(equal, kept):
    """(parameters of a model of equal layers of which all but `kept` writes zeros, the config and the rest of them)."""
    unequal = dataclasses.replace(equal, layer_sizes=format_sizes(kept)).validate()
    params, stacks = jax.tree.map(np.copy, params_of(equal)), []
    for layer, (heads, kv_heads, _, units) in enumerate(kept):
        params["layers"]["attn"]["o"]["kernel"][layer, heads:] = 0
        params["layers"]["mlp"]["down"]["kernel"][layer, units:] = 0
        columns = {"q": heads, "k": kv_heads, "v": kv_heads, "up": units, "gate": units}
        rows = {"o": heads, "down": units}

        def cut(path, x, layer=layer, columns=columns, rows=rows):
            part, leaf = (key.key for key in path[-2:])
            if part in columns:
                return x[layer, :, : columns[part]] if leaf == "kernel" else x[layer, : columns[part]]
            return x[layer, : rows.get(part)] if leaf == "kernel" else x[layer]

        one = jax.tree_util.tree_map_with_path(cut, params["layers"])
        stacks.append((kept[layer], jax.tree.map(lambda x: x[None], one)))
    groups = [[stack for _, stack in group] for _, group in itertools.groupby(stacks, lambda stack: stack[0])]
    joined = [jax.tree.map(lambda *xs: np.concatenate(xs), *group) for group in groups]
    small = params | {"layers": transformer.join_layers(joined)}
    shapes = jax.eval_shape(functools.partial(transformer.init, unequal), jax.random.key(0))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, shapes)
    return params, unequal, small


@some("llama", "pythia")
def test_it_is_the_model_of_equal_layers_in_which_the_rest_is_zero(config):
    """Of heads that write nothing, and of units that write nothing, the rest may be left out."""
    equal = dataclasses.replace(config, layer_sizes="")
    kept = (LayerSizes(6, 3, 16, 48), LayerSizes(4, 2, 16, 20), LayerSizes(4, 2, 16, 20))
    params, unequal, small = without_zeros(equal, kept)
    expected = apply(equal, params, *batch(), capture=STATES)
    trees_close(expected, apply(unequal, small, *batch(), capture=STATES))


def test_attention_is_seen_where_layers_have_equally_many_heads():
    equal = dataclasses.replace(UNEQUAL, layer_sizes="")
    kept = (LayerSizes(6, 3, 16, 20), LayerSizes(6, 3, 16, 48), LayerSizes(6, 3, 16, 48))
    params, unequal, small = without_zeros(equal, kept)
    tokens = batch()[0]
    matrices = attention_rank.attention_matrices(unequal, small, tokens)
    assert matrices.shape == (3, 2, 6, 16, 16)
    trees_close(attention_rank.attention_matrices(equal, params, tokens), matrices)


@some("llama", "gpt2", "sliding window", "by layer")
def test_token_by_token_with_a_cache_it_is_the_whole(config):
    tokens, segment_ids, positions = batch()
    whole, _ = apply(config, params_of(config), tokens, segment_ids, positions)
    cache, parts = transformer.init_cache(config, *tokens.shape), []
    for i in range(tokens.shape[1]):
        part = slice(i, i + 1)
        h, cache = cached(config, params_of(config), tokens[:, part], segment_ids, positions[:, part], cache)
        parts.append(h)
    close(whole, np.concatenate(parts, 1))


def test_text_is_continued_as_without_a_cache():
    params, prompt = params_of(UNEQUAL), [5, 3, 8]
    tokens = list(prompt)
    for _ in range(8):  # the best token by the forward pass of all of them
        rows = np.array([tokens + [0] * (11 - len(tokens))])
        h, _ = apply(UNEQUAL, params, rows, np.ones_like(rows), np.arange(11)[None])
        tokens.append(int(np.argmax((h[0, len(tokens) - 1] @ transformer.head(params))[:97])))
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        there = jax.device_put(params, sharding.tree_sharding(params, mesh))
        assert Generator(UNEQUAL, there, mesh)([prompt], 8) == [tokens[3:]]


@some("gpt2")
def test_eight_devices_equal_one(config):
    params, data = params_of(config), batch(rows=8)
    expected = state_and_gradient(config, params, data)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.tree_sharding(params, mesh))
        for segment in "01":
            spec = params["layers"][segment]["mlp"]["up"]["kernel"].sharding.spec
            assert spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
        got = state_and_gradient(config, params, jax.device_put(data, sharding.batch_sharding(mesh)))
    trees_close(expected, jax.tree.map(np.asarray, got))


def test_gradients_reach_every_parameter_whatever_is_computed_again():
    params = params_of(UNEQUAL)

    def gradient(remat):
        config = dataclasses.replace(UNEQUAL, remat=remat)
        return jax.jit(jax.grad(lambda p: (transformer.apply(config, p, *batch())[0] ** 2).mean()))(params)

    none, dots, full = map(gradient, ("none", "dots", "full"))
    head = {"head": none["head"]}  # is not part of this
    assert all(np.abs(x).max() > 1e-6 for x in jax.tree.leaves({**none, **jax.tree.map(jnp.ones_like, head)}))
    trees_close(none, dots)
    trees_close(none, full)


# ---------------------------------------------------------------- optimizers and runs


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_an_update_of_a_segment_is_that_of_a_model_of_its_layers(name):
    """A statistic over a whole parameter is one of its layer, whatever the other layers are."""
    c = base().optimizer
    c.name, c.clip_norm, c.warmup_steps = name, 0.0, 2

    def update(params, gradient):
        tx, _ = optimizers.make_optimizer(c, 10, {"model": params})
        state = tx.init({"model": params})
        for _ in range(2):
            updates, state = tx.update({"model": gradient}, state, {"model": params})
        return updates["model"]

    wide = dataclasses.replace(  # axes of 128 and more, which Adafactor factors
        UNEQUAL, num_layers=3, d_model=128, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=160,
        layer_sizes="2*2/2/64/160,4/2/64/130",
    ).validate()  # fmt: skip
    params, rng = params_of(wide), np.random.default_rng(2)
    gradient = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    update = jax.jit(update)
    together = update(params, gradient)
    for segment in ("0", "1"):
        alone = [tree | {"layers": tree["layers"][segment]} for tree in (params, gradient)]
        trees_close(together["layers"][segment], update(*alone)["layers"], 1e-6)
    assert min(np.abs(x).max() for x in jax.tree.leaves(together)) > 0


RUN_SIZES = (
    "--config.model.num_layers=3", "--config.model.layer_sizes=2/1/16/64,2*1/1/8/32", "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(home, recipe, data):
    """(workdir, last state) of an uninterrupted run."""
    return home / "unequal", runs.run(recipe, home / "unequal", data, *RUN_SIZES)


@pytest.mark.slow
def test_a_run_learns_and_goes_on_bitwise(trained, tmp_path, recipe, data):
    workdir, state = trained
    loss = list(losses(workdir).values())
    assert loss[-1] < loss[0] - 0.3
    assert {name: jax.tree.leaves(x)[0].shape[0] for name, x in state.params["model"]["layers"].items()} == {
        "0": 1, "1": 2,
    }  # fmt: skip
    resumed = runs.run(recipe, tmp_path, data, *RUN_SIZES, f"--config.resume.path={workdir}/checkpoints/6")
    assert_same(state, resumed)


@pytest.mark.slow
def test_it_is_evaluated_and_teaches(trained, tmp_path, recipe, data):
    workdir, _ = trained
    found = evaluate.evaluate(str(workdir), batches=2, batch_size=8)
    assert found["val_loss"] == pytest.approx([*losses(workdir, "val_loss").values()][-1], rel=1e-5)
    helps = [f"--config.objective.{x}" for x in ("kd.weight=0.5", "kd.stop=1", "align.weight=1", "align.stop=1")]
    runs.run(recipe, tmp_path, data, f"--config.teacher.path={workdir}", *helps, "--config.steps=3")
    assert losses(tmp_path, "kd")[1] > 0 and losses(tmp_path, "align")[1] < 0
    manifest = checkpoint.read_manifest(checkpoint.find(str(tmp_path)))
    assert manifest["teacher"]["model"]["layer_sizes"] == "2/1/16/64,2*1/1/8/32"
