"""Named models have exactly the published number of parameters."""

import pytest

from lmboost.errors import UserError
from lmboost.models.presets import PRESETS, preset, tiny

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "openllama-3b": 3_426_473_600,
    "opt-125m": 125_239_296,
}

# Only the rounded size is published.
ROUNDED = {"let-1.4b": 1.4e9, "let-3b": 3e9, "let-7b": 7e9, "salt-1.5b": 1.5e9, "salt-2.8b": 2.8e9, "salt-8.6b": 8.6e9}


def test_every_preset_is_counted():
    assert {*PUBLISHED, *ROUNDED} == {*PRESETS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert preset(name).num_params() == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_parameter_count_rounds_to_the_name(name):
    assert preset(name).num_params() == pytest.approx(ROUNDED[name], rel=0.011)


def test_padding_the_vocabulary_does_not_change_the_count():
    assert preset("gpt2", vocab_multiple=128).num_params() == PUBLISHED["gpt2"]


def test_unknown_names_show_the_nearest():
    with pytest.raises(UserError, match=r"no model 'gpt2-mediun' \(did you mean 'gpt2-medium'\?\)"):
        preset("gpt2-mediun")
    with pytest.raises(UserError, match=r"no field 'num_layer' \(did you mean 'num_layers'\?\)"):
        preset("gpt2", num_layer=2)


def test_changes_are_validated():
    with pytest.raises(UserError, match="num_kv_heads=5"):
        preset("gpt2", num_kv_heads=5)


def test_tiny_models_differ_in_sizes_alone():
    sizes = {"vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_seq_len"}
    for full in PRESETS.values():
        small = tiny(full).validate()
        changed = {name for name, value in vars(full).items() if getattr(small, name) != value}
        assert changed <= sizes | {"dtype"}, changed
        assert (small.num_kv_heads < small.num_heads) == (full.num_kv_heads < full.num_heads)
        assert small.num_params() < 500_000
