"""The adapter of the lm-evaluation-harness: the numbers of the harness's own model, in few programs."""

import dataclasses
import functools
import json
import pathlib
import random
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import checkpoint, evaluate, sharding
from lmboost.data import tokenizer as tokenizers_of
from lmboost.errors import UserError
from lmboost.models import transformer
from lmboost.models.presets import PRESETS, tiny
from tests import dense, runs

pytestmark = pytest.mark.peers
WORDS = ["".join(random.Random(i).choices("abcdefgh", k=2 + i % 5)) for i in range(60)]
TASKS = {
    "choosing": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
fewshot_split: test
num_fewshot: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "reading": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e", "ab"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


def sentence(draw, low, high):
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def write_tasks(directory: pathlib.Path) -> str:
    """The tasks, with data of their own, in a directory of YAML files."""
    draw = random.Random(0)
    documents = {
        "choosing": [
            {"question": sentence(draw, 2, 12), "choices": [sentence(draw, 1, 4) for _ in range(3)], "answer": i % 3}
            for i in range(12)
        ],
        "reading": [{"text": sentence(draw, 5, 90)} for _ in range(6)],
        "writing": [{"question": sentence(draw, 1, 30), "answer": "a"} for _ in range(8)],
    }
    (directory / "tasks").mkdir()
    for name, rest in TASKS.items():
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(d) + "\n" for d in documents[name]))
        source = {"data_files": {"test": str(file)}, "cache_dir": str(directory / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(source)}\ntest_split: test"
        (directory / "tasks" / f"{name}.yaml").write_text(head + rest)
    gone = {"data_files": {"test": str(directory / "gone.jsonl")}}
    broken = f"task: broken\ndataset_path: json\ndataset_kwargs: {json.dumps(gone)}\ntest_split: test"
    (directory / "tasks" / "broken.yaml").write_text(broken + TASKS["reading"])
    return str(directory / "tasks")


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval")
    from lmboost import harness

    return harness


@pytest.fixture(scope="module")
def tasks(harness, tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    texts = [sentence(random.Random(i), 50, 100) for i in range(20)]
    return tokenizers_of.train(texts, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@functools.cache
def model_of(name):
    config = dataclasses.replace(tiny(PRESETS[name], layers=2), vocab_multiple=128, init_std=0.2)
    return config, jax.device_get(jax.jit(functools.partial(transformer.init, config))(jax.random.key(0)))


def language_model(harness, name, coder, mesh, **arguments):
    config, params = model_of(name)
    params = jax.device_put(params, sharding.tree_sharding(params, mesh))
    return harness.LanguageModel(config, params, mesh, coder, **arguments)


def requests(*arguments):
    return [types.SimpleNamespace(args=a if isinstance(a, tuple) else (a,)) for a in arguments]


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens):
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(tokens.shape[1])[None]}
    return dense.forward(config, params, batch)[0]


def logits_of(config, params, tokens):
    """[T, V] of one row alone; what comes after it changes nothing."""
    padded = np.array([tokens + [0] * (config.max_seq_len - len(tokens))])
    return np.asarray(forward(config, params, padded), np.float64)[0, : len(tokens)]


def expected(name, context, continuation):
    config, params = model_of(name)
    tokens = (context + continuation)[-config.max_seq_len - 1 :]
    logits = logits_of(config, params, tokens[:-1])[-len(continuation) :]
    logprobs = np.log(dense_probabilities(logits))
    return logprobs[np.arange(len(continuation)), continuation].sum(), (logits.argmax(-1) == continuation).all()


def dense_probabilities(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize(("name", "sizes"), [("gpt2", (2, 2, 2)), ("smollm2-135m", (1, 1, 1))])
def test_loglikelihood_is_that_of_the_row_alone(harness, coder, name, sizes):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    draw = random.Random(1)
    pairs = [(sentence(draw, 1, 8), " " + sentence(draw, 1, 4)) for _ in range(10)]
    pairs += [("", sentence(draw, 2, 2)), (sentence(draw, 40, 40), " " + WORDS[0])]
    with jax.set_mesh(mesh):
        lm = language_model(harness, name, coder, mesh, batch_size=8, block_tokens=4)
        found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        whole, before = lm.tok_encode(context + continuation), lm.tok_encode(context)
        wanted = expected(name, before, whole[len(before) :])
        assert logprob == pytest.approx(wanted[0], abs=1e-3) and greedy == wanted[1]


def test_greedy_is_said_of_greedy_continuations(harness, coder):
    mesh, context, best = sharding.make_mesh(), coder.encode("ab cd").tolist(), []
    for _ in range(3):
        best.append(int(logits_of(*model_of("gpt2"), context + best)[-1].argmax()))
    other = [*best[:2], (best[2] + 1) % 300]
    with jax.set_mesh(mesh):
        lm = language_model(harness, "gpt2", coder, mesh)
        found = lm._loglikelihood_tokens([(("", ""), context, part) for part in (best, other, best[:1], [])])
    assert [greedy for _, greedy in found] == [True, False, True, True] and found[3][0] == 0.0


def test_equal_texts_are_read_once(harness, coder, monkeypatch):
    mesh, context, read = sharding.make_mesh(), coder.encode("ab cd ef").tolist(), []
    compiled = harness._score
    monkeypatch.setattr(harness, "_score", lambda *a: read.append(np.asarray(a[3]["lengths"])) or compiled(*a))
    rows = [(("", ""), context, [target]) for target in range(20)] + [(("", ""), context[:-1], [context[-1], 3])]
    with jax.set_mesh(mesh):
        found = language_model(harness, "gpt2", coder, mesh)._loglikelihood_tokens(rows)
    assert np.sum(read[0] > 0) == 1 and len(read) == 1
    assert [p for p, _ in found] == pytest.approx([expected("gpt2", *row[1:])[0] for row in rows], abs=1e-3)


def test_rolling_predicts_every_token_once(harness, coder):
    mesh, text = sharding.make_mesh(), sentence(random.Random(5), 100, 100)
    with jax.set_mesh(mesh):
        lm = language_model(harness, "gpt2", coder, mesh)
        found = lm.loglikelihood_rolling(requests(text, "ab"))
    tokens, total, step = lm.tok_encode(text), 0.0, 64
    assert len(tokens) > 2 * step
    for start in range(0, len(tokens), step):
        stop = min(start + step, len(tokens))
        context = tokens[stop - step - 1 : start] if start else [coder.bos_id]
        total += expected("gpt2", context, tokens[start:stop])[0]
    assert found[0] == pytest.approx(total, abs=1e-2)
    assert found[1] == pytest.approx(expected("gpt2", [coder.bos_id], lm.tok_encode("ab"))[0], abs=1e-3)


def test_few_programs_for_many_requests(harness, coder):
    mesh = sharding.make_mesh()
    draw = random.Random(2)
    pairs = [(sentence(draw, 1, 9), " " + sentence(draw, 1, 2)) for _ in range(100)]
    with jax.set_mesh(mesh):
        lm = language_model(harness, "pythia-160m", coder, mesh, batch_size=8)
        before = harness._score._cache_size()
        lengths = {len(lm.tok_encode(a + b)) for a, b in pairs}
        lm.loglikelihood(requests(*pairs), disable_tqdm=True)
        after = harness._score._cache_size()
    assert len(lengths) > 15 and after - before <= 4


def test_generation_stops_at_strings(harness, coder):
    mesh = sharding.make_mesh()
    draw = random.Random(3)
    prompts = [sentence(draw, 1, 30) for _ in range(6)]
    with jax.set_mesh(mesh):
        lm = language_model(harness, "gpt2", coder, mesh, batch_size=8)
        free = lm.generate_until(requests(*((p, {"until": [], "max_gen_toks": 20}) for p in prompts)))
        stop = free[0][2]
        cut = lm.generate_until(requests(*((p, {"until": [stop, "\0"], "max_gen_toks": 20}) for p in prompts)))
        one = lm.generate_until(requests((prompts[0], {"until": stop, "max_new_tokens": 20})))
        drawn = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8}
        twice = lm.generate_until(requests((prompts[0], drawn), (prompts[0], drawn)))
        with pytest.raises(UserError, match="generates up to 64 tokens, but the model reads at most 64"):
            lm.generate_until(requests((prompts[0], {"max_gen_toks": 64})))
    assert cut == [text.split(stop)[0] for text in free] and one == cut[:1] and cut[0] != free[0]
    assert twice[0] != twice[1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Llama and its tokenizer, as transformers writes them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("hub")
    coder = tokenizers.Tokenizer(tokenizers.models.BPE())
    coder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    coder.train_from_iterator([sentence(random.Random(i), 50, 100) for i in range(20)], trainer)
    coder.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=coder, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(wrapped), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def references(hub, tasks):
    """(metrics, answers by task) of the harness's own model."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    lm = huggingface.HFLM(pretrained=str(hub), device="cpu", batch_size=4, dtype="float32")
    return evaluated(lm, tasks)


def evaluated(lm, tasks):
    import lm_eval

    from lmboost import harness

    manager = harness.find_tasks(tuple(TASKS), tasks)
    results = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=10)
    answers = {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in results["samples"].items()
    }
    return harness.metrics(results), answers


def test_the_numbers_of_the_harness_own_model(harness, hub, tasks, references):
    mesh = sharding.make_mesh(4, 1, 2)
    with jax.set_mesh(mesh):
        saved = checkpoint.Saved.find(f"hf:{hub}")
        model, coder = saved.model_for(dtype="float32"), saved.tokenizer()
        assert coder.adds_bos
        found, answers = evaluated(harness.LanguageModel(model, saved.load(mesh), mesh, coder), tasks)
    assert found == pytest.approx(references[0], rel=1e-3) and len(found) == 5
    for name, per_document in answers.items():
        for ours, theirs in zip(per_document, references[1][name], strict=True):
            if name == "writing":
                assert ours == theirs
            else:
                close(ours, theirs)
    assert len({text for texts in answers["writing"] for text in texts}) > 3


def close(ours, theirs):
    flat = [np.array(jax.tree.leaves(x), float) for x in (ours, theirs)]
    np.testing.assert_allclose(*flat, rtol=1e-4, atol=1e-3)


def test_the_verb_prints_a_table_and_writes_json(harness, hub, tasks, references, tmp_path, capsys, monkeypatch):
    flags = [f"--checkpoint=hf:{hub}", "--tasks=choosing,reading", f"--include_path={tasks}", "--batch_size=8"]
    monkeypatch.setattr("sys.argv", ["evaluate", *flags, f"--out={tmp_path / 'new' / 'out.json'}", "--dtype=float32"])
    evaluate.main()
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["results"]["choosing"]["acc,none"] == references[0]["task/choosing/acc"]
    assert "|choosing|" in (printed := capsys.readouterr().out) and "|bits_per_byte" in printed
    few = evaluate.evaluate_tasks(f"hf:{hub}", "choosing", tasks, num_fewshot=0, limit=2, tensor=2)
    assert few["n-shot"] == {"choosing": 0} and few["n-samples"]["choosing"]["effective"] == 2


def test_validation_loss_of_a_model_from_the_hub(hub, tmp_path):
    data = runs.write_data(tmp_path, tokenizer=str(hub))
    found = evaluate.evaluate(f"hf:{hub}", data, batches=2, batch_size=8, fsdp=4)
    assert found["val_loss"] == pytest.approx(np.log(400), rel=0.2)
    assert found == pytest.approx(evaluate.evaluate(f"hf:{hub}", data, batches=2, batch_size=8, seq_len=64))
    with pytest.raises(UserError, match="--data is empty, and nothing in .* says which data to take"):
        evaluate.evaluate(f"hf:{hub}")
    with pytest.raises(UserError, match="--checkpoint: the model in .* was trained with another tokenizer"):
        evaluate.evaluate(f"hf:{hub}", runs.write_data(tmp_path, seed=1))


# Inside training


def test_tasks_are_evaluated_while_training(harness, home, recipe, data, tasks):
    flags = ["--config.eval.tasks=choosing,reading", f"--config.eval.tasks_include={tasks}", "--config.steps=4"]
    flags += ["--config.eval.tasks_every=2", "--config.log.tensorboard=false"]
    runs.run(recipe, home / "run", data, *flags)
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "task/choosing/acc" in line]
    assert [line["step"] for line in found] == [2, 4]
    assert found[0]["task/reading/bits_per_byte"] > found[1]["task/reading/bits_per_byte"] > 0
    after = harness.metrics(evaluate.evaluate_tasks(str(home / "run"), "choosing,reading", tasks, batch_size=8))
    assert after == pytest.approx({name: found[1][name] for name in after}, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.tasks=choosing,raeding"], r"eval.tasks: there is no task 'raeding' \(did you mean 'reading'\?\)"),
        (["eval.tasks=,"], "eval.tasks names no task"),
        (["eval.tasks=choosing", "eval.tasks_include=/nowhere"], "should be in '/nowhere', and there is no such dir"),
        (["eval.tasks_every=5"], "eval.tasks_every=5, but eval.tasks is empty"),
        (["eval.tasks_every=-5"], "eval.tasks_every=-5 must be at least 0"),
        (["eval.tasks=broken"], "eval.tasks='broken': the data can't be read .*FileNotFoundError: .*gone.jsonl"),
    ],
)
def test_what_is_refused(harness, recipe, data, tasks, monkeypatch, tmp_path, overrides, message):
    manager = harness._manager(tasks, True)
    monkeypatch.setattr(harness, "_manager", lambda include, own: manager)  # the harness's own take long to read
    flags = [f"--config.eval.tasks_include={tasks}", *(f"--config.{override}" for override in overrides)]
    with pytest.raises(UserError, match=message):
        runs.run(recipe, tmp_path, data, *flags)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lmboost.harness", raising=False)
    monkeypatch.delattr("lmboost.harness", raising=False)
    with pytest.raises(UserError, match=r'importing it failed \(.*\): pip install "lmboost\[eval\]"'):
        evaluate.evaluate_tasks("anything", "choosing")
