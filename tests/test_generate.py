"""Generation: the cache changes nothing, nor do padding, company or devices; draws follow their distribution."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lmboost import checkpoint, generate, sharding
from lmboost.data import tokenizer as tokenizers
from lmboost.errors import UserError
from lmboost.generate import Generator, Sampling
from lmboost.models import transformer
from lmboost.models.presets import PRESETS, tiny
from tests import runs

FAMILIES = ("gpt2", "pythia-160m", "smollm2-135m", "llama-3.2-1b", "opt-125m")
DRAWN = Sampling(1.0, top_k=200, top_p=0.9)
PROMPTS = [[5, 3, 8], [7] * 11, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [250]]


@functools.cache
def model_of(name, **changes):
    """A tiny model whose parameters are all drawn at random, so that its tokens vary."""
    config = dataclasses.replace(tiny(PRESETS[name], layers=2), vocab_multiple=128, **changes)
    shapes = jax.eval_shape(functools.partial(transformer.init, config), jax.random.key(0))
    rng = np.random.default_rng(1)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        scale = 0.02 if "embed" in name else 0.2  # a large embedding that is tied would repeat the last token
        return np.asarray(name.endswith("['scale']") + scale * rng.normal(size=x.shape), np.float32)

    return config, jax.tree_util.tree_map_with_path(draw, shapes)


def mesh_of(sizes):
    return sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def run(name, prompts, max_tokens, *, sizes=(1, 1, 1), batch_size=4, vocab_size=0, stop_ids=(), **arguments):
    config, params = model_of(name)
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.tree_sharding(params, mesh))
        generator = Generator(config, params, mesh, vocab_size, stop_ids, batch_size)
        return generator(prompts, max_tokens, **arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def next_token(config, sampling, params, tokens, last, key):
    """The token after place `last` of one whole sequence, by the forward pass without a cache."""
    ids = jnp.ones_like(tokens)
    h, _ = transformer.apply(config, params, tokens, ids, jnp.arange(tokens.shape[1])[None])
    logits = (h @ transformer.head(params))[0, last, : config.vocab_size]
    return generate.sample(logits[None], jax.random.key_data(key)[None], sampling)[0]


def continued(name, prompt, max_tokens, sampling, row):
    config, params = model_of(name)
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), row)
    tokens = list(prompt)
    for i in range(max_tokens):
        whole = np.zeros((1, 64), np.int32)
        whole[0, : len(tokens)] = tokens
        drawn = next_token(config, sampling, params, whole, len(tokens) - 1, jax.random.fold_in(key, i))
        tokens.append(int(drawn))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("name", "sampling"), [*((name, DRAWN) for name in FAMILIES), ("smollm2-135m", Sampling())])
def test_with_a_cache_as_without(name, sampling):
    """Rows of unequal length in one batch, each as if it were alone and read anew for every token."""
    expected = [continued(name, prompt, 20, sampling, row) for row, prompt in enumerate(PROMPTS)]
    assert run(name, PROMPTS, 20, sampling=sampling) == expected
    assert sampling.temperature == 0 or min(len(set(tokens)) for tokens in expected) > 10


@pytest.mark.parametrize(("name", "sizes"), [("gpt2", (2, 2, 2)), ("smollm2-135m", (8, 1, 1)), ("opt-125m", (1, 4, 2))])
def test_on_any_mesh(name, sizes):
    assert run(name, PROMPTS, 20, sizes=sizes, sampling=DRAWN) == run(name, PROMPTS, 20, sampling=DRAWN)


def test_what_is_drawn_depends_on_seed_and_number_alone():
    drawn = Sampling(1.0)
    together = run("pythia-160m", PROMPTS, 12, sampling=drawn, seed=3)
    assert run("pythia-160m", PROMPTS, 12, sampling=drawn, seed=3, batch_size=2) == together
    for i, prompt in enumerate(PROMPTS):
        assert run("pythia-160m", [prompt], 12, sampling=drawn, seed=3, rows=[i]) == [together[i]]
    assert run("pythia-160m", PROMPTS, 12, sampling=drawn, seed=4) != together
    twins = run("pythia-160m", [PROMPTS[0]] * 2, 12, sampling=drawn)
    assert twins[0] != twins[1], "rows have draws of their own"


def test_the_best_of_one_is_greedy():
    greedy = run("gpt2", PROMPTS, 12)
    for narrow in (Sampling(5.0, top_k=1), Sampling(1.0, top_p=1e-6)):
        assert run("gpt2", PROMPTS, 12, sampling=narrow) == greedy


def counts(p, sampling, draws=20000):
    """How often each token is drawn, from logits whose probabilities are `p`."""
    logits = jnp.broadcast_to(jnp.log(jnp.array(p, jnp.float32)), (draws, len(p)))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0, impl="threefry2x32"), draws))
    return np.bincount(generate.sample(logits, keys, sampling), minlength=len(p))


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(1.0), [0.1, 0.4, 0.2, 0.25, 0.05]),
        (Sampling(0.5), [0.01, 0.16, 0.04, 0.0625, 0.0025]),
        (Sampling(1.0, top_k=2), [0, 0.4, 0, 0.25, 0]),
        (Sampling(1.0, top_p=0.39), [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_p=0.41), [0, 0.4, 0, 0.25, 0]),  # the token that reaches p is in
        (Sampling(1.0, top_p=0.66), [0, 0.4, 0.2, 0.25, 0]),
        (Sampling(1.0, top_p=0.94), [0.1, 0.4, 0.2, 0.25, 0]),
        (Sampling(1.0, top_k=3, top_p=0.5), [0, 0.4, 0, 0.25, 0]),  # 0.4 of the 0.85 that are left is below 0.5
        (Sampling(1.0, top_k=3, top_p=0.47), [0, 1, 0, 0, 0]),  # and reaches 0.47
    ],
)
def test_draws_follow_the_distribution(sampling, weights):
    found, p = counts([0.1, 0.4, 0.2, 0.25, 0.05], sampling), np.array(weights) / np.sum(weights)
    assert (found[p == 0] == 0).all()
    spread = np.sqrt(found.sum() * p * (1 - p))
    assert (np.abs(found - found.sum() * p) <= 4 * spread).all()


def test_stop_tokens_end_a_row_and_are_left_out():
    free = run("gpt2", PROMPTS, 20)
    stop = free[1][4]
    cut = [list(itertools.takewhile(lambda t: t != stop, tokens)) for tokens in free]
    assert run("gpt2", PROMPTS, 20, stop_ids=(stop,)) == cut
    assert run("gpt2", PROMPTS, 20, stop_ids=(299, stop)) == cut


def test_text_may_end_a_row_early():
    free = run("gpt2", PROMPTS, 50)
    asked = []

    def ended(tokens):
        asked.append(len(tokens))
        return len(tokens) >= 10

    made = run("gpt2", PROMPTS, 50, ended=ended)
    assert all(10 <= len(m) < 50 and m == f[: len(m)] for m, f in zip(made, free, strict=True)) and max(asked) < 50
    assert run("gpt2", PROMPTS, 50, ended=lambda _: False) == free


def test_tokens_beyond_the_vocabulary_are_never_made():
    hot = Sampling(100.0)  # nearly uniform
    made = np.array(run("gpt2", PROMPTS * 8, 50, sampling=hot, batch_size=32))
    assert made.max() < 300 and made.max() > 250  # of 384 rows
    assert np.array(run("gpt2", PROMPTS * 8, 50, sampling=hot, batch_size=32, vocab_size=100)).max() == 99


def test_few_programs_for_many_requests():
    config, params = model_of("gpt2", norm_eps=2e-5)
    mesh = mesh_of((2, 2, 2))
    before = [f._cache_size() for f in (generate._prefill, generate._decode)]
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.tree_sharding(params, mesh))
        generator = Generator(config, params, mesh, batch_size=4)
        for length in range(1, 33):
            generator([[1] * length] * (1 + length % 5), 1 + length % 32, seed=length, ended=lambda _: False)
        after = [f._cache_size() for f in (generate._prefill, generate._decode)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "arguments", "message"),
    [
        ([[1] * 60], 5, {}, "prompt 0 has 60 tokens, and max_tokens=5 more .* 64 learned positions"),
        ([[1], []], 5, {}, "prompt 1 has no tokens"),
        ([[300]], 5, {}, "prompt 0 has token 300, but the model's vocabulary ends at 299"),
        ([[1]], 0, {}, "max_tokens=0 must be at least 1"),
        ([[1]], 5, {"sampling": Sampling(-1.0)}, "--temperature=-1.0 must be at least 0"),
        ([[1]], 5, {"sampling": Sampling(1.0, top_k=-1)}, "--top_k=-1 must be at least 0"),
        ([[1]], 5, {"sampling": Sampling(1.0, top_p=0.0)}, "--top_p=0.0 must be above 0"),
        ([[1]], 5, {"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_what_is_refused(prompts, max_tokens, arguments, message):
    with pytest.raises(UserError, match=message):
        run("gpt2", prompts, max_tokens, **arguments)


# The verb


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    data = runs.write_data(home)
    runs.run(runs.write_recipe(home), home / "run", f"--config.data.train={data}", "--config.log.tensorboard=false")
    return home


def test_the_verb_continues_text(trained, capsys, monkeypatch):
    (trained / "prompts.txt").write_text("1 ab\n2 ba\n")
    flags = [f"--checkpoint={trained / 'run'}", "--prompt=7 ", f"--prompts={trained / 'prompts.txt'}", "--max_tokens=9"]
    monkeypatch.setattr("sys.argv", ["generate", *flags])
    generate.main()
    texts = capsys.readouterr().out.split(f"\n{'-' * 40}\n")
    assert [text[:4] for text in texts[1:]] == ["1 ab", "2 ba"] and texts[0].startswith("7 ")
    assert all(len(text) > 8 for text in texts)
    again = generate.generate(str(trained / "run"), ["7 ", "1 ab", "2 ba"], 9, fsdp=2, tensor=2)
    assert again == [text.removesuffix("\n") for text in texts]
    drawn = functools.partial(generate.generate, str(trained / "run"), ["1 ab"], 20, temperature=1.0)
    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)


def test_the_tokenizer_is_found(trained, tmp_path):
    saved = checkpoint.Saved.find(str(trained / "run"))
    in_data = saved.tokenizer()
    assert in_data.path.parent == trained / "data0" / "tokenizer"
    manifest = saved.manifest | {"config": {"data": {"train": str(tmp_path / "gone")}}}
    homeless = dataclasses.replace(saved, manifest=manifest)
    with pytest.raises(UserError, match="--tokenizer is empty, and no tokenizer was found: neither tokenizer.json"):
        homeless.tokenizer()
    assert homeless.tokenizer(str(in_data.path)).fingerprint == in_data.fingerprint
    other = tokenizers.train(
        ["other text than the model was trained with, and more of it " * 50], 300, tmp_path / "other.model"
    )
    with pytest.raises(UserError, match="is not the one that the model in .* was trained with"):
        saved.tokenizer(str(other.path))
    in_data.save(tmp_path / "run")
    beside = dataclasses.replace(homeless, directory=epath.Path(tmp_path / "run" / "checkpoints" / "8"))
    assert beside.tokenizer().path.parent == tmp_path / "run"
    with pytest.raises(UserError, match="has 320 pieces, more than the model's vocab_size=319"):
        dataclasses.replace(saved, model=dataclasses.replace(saved.model, vocab_size=319)).tokenizer()


def test_an_empty_prompt_is_the_begin_of_a_document(trained, tmp_path):
    coder = tokenizers.load(trained / "data0" / "tokenizer")
    assert generate.encode_prompt("", coder) == [coder.bos_id]
    assert generate.encode_prompt("a", coder) == [coder.bos_id, *coder.encode("a")]
    assert generate.encode_prompt("a", coder, bos="never") == coder.encode("a").tolist()
    with pytest.raises(UserError, match="--prompt='' has no tokens"):
        generate.encode_prompt("", coder, bos="never")
    coder.special = coder.special._replace(bos_id=None)
    for prompt, bos in (("", "auto"), ("a", "always")):
        with pytest.raises(UserError, match="needs the token that begins a document"):
            generate.encode_prompt(prompt, coder, bos)


def test_prompts_of_a_file_end_at_line_feeds_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts").write_bytes("one\x0b\x0ctwo\u2028\x85three\r\n\nfour".encode())
    assert generate._read_prompts("~/prompts") == ["one\x0b\x0ctwo\u2028\x85three", "", "four"]
    (tmp_path / "prompts").write_bytes(b"\xff")
    with pytest.raises(UserError, match="--prompts='~/prompts' can't be read"):
        generate._read_prompts("~/prompts")
