"""Layers of unequal sizes filled up with zeros to equal ones: the same logits, here and in transformers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from lmboost import checkpoint
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError
from lmboost.hf import writer
from lmboost.models import transformer
from lmboost.surgery import subnet, widen
from tests import dense, hub
from tests.surgery import masked
from tests.surgery.masked import PARENTS


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
    return dense.forward(config, params, batch)[0]


def close(got, expected, tolerance=2e-5):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def unequal(name, sizes, **changes):
    """A parent of PARENTS with layers of these sizes."""
    fields = {"num_layers": len(sizes.split(",")), "layer_sizes": sizes} | changes
    largest = zip(*(map(int, one.split("/")) for one in sizes.split(",")), strict=True)
    fields |= dict(zip(("num_heads", "num_kv_heads", "head_dim", "mlp_dim"), map(max, largest), strict=True))
    return dataclasses.replace(PARENTS[name], **fields).validate()


def check(config, heads):
    """The wide config, after a look at its logits."""
    params, batch = masked.random_params(config), masked.random_batch(config)
    wide = widen.wide_config(config, heads).validate()
    got = jax.jit(lambda params: forward(wide, widen.widen(config, params, wide), batch))(params)
    close(got, forward(config, params, batch))
    return wide


@pytest.mark.parametrize("name", ["gpt2 by layer", "opt", "pythia", "llama3", "qwen3", "olmo1", "olmo2", "others"])
def test_equal_layers_filled_with_zeros_compute_what_the_cut_does(name):
    parent, params, batch = PARENTS[name], masked.random_params(PARENTS[name]), masked.random_batch(PARENTS[name])
    n = parent.head_dim
    cut = masked.random_cut(parent, "fine layerwise", 0, head_sizes=(n // 4, n // 2, n))
    child = subnet.child_config(parent, cut)
    wide = widen.wide_config(child).validate()
    assert child.layer_sizes and not wide.layer_sizes and wide.num_layers == child.num_layers

    @jax.jit
    def run(params):
        own = widen.widen(child, subnet.extract(parent, params, cut), wide)
        return own, forward(wide, own, batch)

    own, got = run(params)
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), own, masked.random_params(wide))
    close(got, masked.logits(parent, params, cut, **batch))


@pytest.mark.parametrize("sizes", ["6/2/8/40,4/2/8/40", "9/3/8/40,4/2/8/40", "2/1/8/40,3/3/8/40", "3/3/8/9,3/3/2/9"])
def test_layers_that_differ_in_heads_or_their_size(sizes):
    check(unequal("olmo2", sizes), heads="any")


@pytest.mark.parametrize(
    ("config", "made"),
    [
        (unequal("gpt2", "3/3/6/9,2/2/8/7", d_model=24), (3, 8)),  # heads times their size are the width already
        (unequal("gpt2", "2/2/6/9,1/1/4/7", d_model=24), (4, 6)),  # more heads
        (unequal("opt", "2/2/5/9,1/1/4/7", d_model=21), (3, 7)),  # more of them, and larger
        (unequal("gpt2", "2/2/6/9,2/2/6/9", d_model=24), (4, 6)),  # equal layers, too
        (unequal("pythia", "2/2/16/9,1/1/8/7", d_model=40), (2, 20)),  # larger: 4 of 20 are rotated
        (unequal("pythia", "2/2/16/9,1/1/5/7", d_model=48), (3, 16)),  # 0 of 5 are
        (unequal("pythia", "2/2/4/9,1/1/4/7", d_model=18, rope_fraction=1.0), (2, 9)),  # 3 of 6 lack frequencies of 4
    ],
)
def test_heads_that_make_up_the_width(config, made):
    wide = check(config, heads="full")
    assert (wide.num_heads, wide.head_dim) == made and wide.num_kv_heads == wide.num_heads


@pytest.mark.parametrize("name", PARENTS)
def test_equal_layers_are_left_as_they_are(name):
    config, params = PARENTS[name], masked.random_params(PARENTS[name])
    assert widen.wide_config(config) == config
    jax.tree.map(np.testing.assert_array_equal, widen.widen(config, params, config), params)


def test_layers_of_the_largest_size_are_left_bitwise():
    config = unequal("qwen3", "6/3/8/40,3/3/4/10,6/3/8/40")
    params = masked.random_params(config)
    got = widen.widen(config, params, widen.wide_config(config))["layers"]
    for layer in (0, 2):
        _, expected = transformer.one_layer(config, params, layer)
        jax.tree.map(lambda x, y, i=layer: np.testing.assert_array_equal(x[i], y), got, expected)


@pytest.mark.parametrize(
    ("config", "heads", "message"),
    [
        (
            unequal("llama", "3/3/8/40,3/3/6/40"),
            "any",
            "head_dim=6 with 6 rotated features has no place in head_dim=8 with 8",
        ),
        (unequal("gpt2", "4/4/8/9,2/2/8/7", d_model=24), "full", "num_heads=4 of head_dim=8.*width d_model=24"),
        (unequal("gpt2", "3/3/7/9,2/2/7/7", d_model=23), "full", "num_heads=3 of head_dim=7.*width d_model=23"),
        (unequal("pythia", "2/2/24/9,1/1/16/7", d_model=48), "full", "head_dim=16 with 4 rotated.*head_dim=24 with 6"),
    ],
)
def test_layers_that_zeros_cannot_make_equal(config, heads, message):
    with pytest.raises(UserError, match=message):
        widen.wide_config(config, heads)


# In the format of the Hub


HUB = {
    "gpt2": unequal("gpt2", "3/3/6/9,2/2/8/7", d_model=24),
    "gpt2-heads": unequal("gpt2", "2/2/6/9,1/1/4/7", d_model=24, scale_attn_by_layer=True),
    "gpt2-equal": unequal("gpt2", "2/2/6/9,2/2/6/9", d_model=24, layer_sizes=""),
    "opt": unequal("opt", "2/2/5/9,1/1/4/7", d_model=21),
    "pythia": unequal("pythia", "2/2/16/9,1/1/8/7", d_model=40),
    "llama": unequal("llama", "6/2/8/40,4/2/4/10,2/1/2/7"),
    "llama-heads": unequal("llama", "6/3/8/40,4/2/4/10,3/1/2/7"),  # 9 of them, which 24 is no multiple of
    "llama3": unequal("llama3", "4/2/8/40,4/1/4/10", vocab_multiple=64),
    "mistral": unequal("mistral", "4/2/8/40,2/2/4/10"),
    "qwen2": unequal("qwen2", "4/2/8/40,4/1/4/10"),
    "qwen3": unequal("qwen3", "6/3/8/40,4/2/4/10,3/1/2/7"),
    "olmo2": unequal("olmo2", "6/3/8/40,4/2/4/10,3/1/2/7"),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, hub.VOCAB, (4, 17)).astype(np.int32)


def export(name, directory):
    """Writes a model of unequal layers; its logits for TOKENS."""
    config = dataclasses.replace(HUB[name], vocab_size=hub.VOCAB)
    params = masked.random_params(config)
    tokenizer = tokenizer_lib.load(hub.write_tokenizer(directory.with_name("tokenizer")))
    directory.mkdir()
    manifest = {"model": vars(config), "data": {"tokenizer": tokenizer.fingerprint}}
    writer.export(directory, config, params, manifest, tokenizer)
    return hub.logits(config, params, TOKENS)


@pytest.mark.parametrize("name", ["gpt2-heads", "pythia", "llama-heads", "olmo2"])
def test_what_is_written_for_the_hub_computes_the_same(name, tmp_path):
    expected = export(name, tmp_path / "out")
    saved = checkpoint.Saved.find(f"hf:{tmp_path / 'out'}")
    close(hub.logits(saved.model_for(dtype="float32"), saved.load(hub.one_device()), TOKENS), expected)


@pytest.mark.peers
@pytest.mark.parametrize("name", HUB)
def test_transformers_computes_the_same(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    expected = export(name, tmp_path / "out")
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes.values())
    with torch.no_grad():
        close(model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy(), expected)


def test_a_model_that_no_architecture_has_room_for_is_refused():
    with pytest.raises(UserError, match="num_heads=4 of head_dim=8.*width d_model=24"):
        writer.family_of(unequal("gpt2", "4/4/8/9,2/2/8/7", d_model=24))
