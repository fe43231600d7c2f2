"""A helper of another tokenizer than the data's: the step against dense oracles, whole runs, what is refused."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmboost import checkpoint, score, sharding
from lmboost.config import read
from lmboost.data import tokenizer as tokenizer_lib
from lmboost.errors import UserError
from lmboost.objective import auto, chunks
from lmboost.objective.align import Alignment
from lmboost.objective.auto import Auto
from lmboost.objective.kd import Distillation
from lmboost.objective.select import Selection
from tests import dense, hub, runs
from tests.compare import assert_same, lines
from tests.test_train_step import MESHES, STUDENT, TEACHER, TOKENS, assert_close, make_batch, models, run_step
from tests.test_train_step import objective as make_objective

OWN = TOKENS + 16  # tokens of the teacher's rows


def with_teacher_rows(batch, seed=1):
    """The batch with rows of other tokens and chunks of both at random, those of a row in the same order."""
    rng = np.random.default_rng(seed)
    rows = len(batch["tokens"])
    other = {k: np.pad(v, [(0, 0), (0, OWN - TOKENS)]) for k, v in make_batch(rows, seed + 1).items()}
    number = lambda weights: (1 + np.cumsum(rng.random(weights.shape) < 0.4, axis=1)) * (weights > 0)  # noqa: E731
    own, theirs = number(batch["weights"]), number(other["weights"])
    both = [set(a) & set(b) for a, b in zip(own, theirs, strict=True)]
    own, theirs = (
        np.array([[n if n in there else 0 for n in row] for row, there in zip(x, both, strict=True)], np.int32)
        for x in (own, theirs)
    )
    index = np.where(rng.random(own.shape) < 0.8, rng.integers(0, TOKENS, own.shape), -1).astype(np.int32)
    other |= {"chunks": own, "own_chunks": theirs, "index": index}
    return batch | {f"teacher_{name}": value for name, value in other.items()}


# A step by a teacher that reads its own rows.
one_step = functools.partial(run_step, rows="teacher")


def losses_on(model, params, batch):
    """-log p(target) [B, T], from all logits."""
    logits, *_ = dense.forward(model, params, batch)
    return -jnp.log(jnp.take_along_axis(dense.probabilities(logits), batch["targets"][..., None], -1))[..., 0]


def teacher_rows_of(batch):
    return {name.removeprefix("teacher_"): x for name, x in batch.items() if name.startswith("teacher_")}


def by_hand(params, teacher, batch, weight, temperature):
    """(mean loss, lead) with the members of all chunks [B, chunks, tokens]."""
    own, theirs = losses_on(STUDENT, params, batch), losses_on(TEACHER, teacher, teacher_rows_of(batch))
    numbers = np.arange(1, TOKENS + 1)[None, :, None]
    members = (batch["teacher_chunks"][:, None] == numbers).astype(np.float32)
    others = (batch["teacher_own_chunks"][:, None] == numbers).astype(np.float32)
    there = members.max(-1)
    a, b = (jnp.where(there > 0, jnp.einsum("bct,bt->bc", *x), 1.0) for x in ((members, own), (others, theirs)))
    p, q = jnp.exp(-b / temperature), jnp.exp(-a / temperature)
    kl = p * (a - b) / temperature + (1 - p) * jnp.log((1 - p) / (1 - q))
    alone = batch["weights"] * (batch["teacher_chunks"] == 0)
    kd = temperature * jnp.sum(there * kl) + jnp.sum(alone * own)
    total = (1 - weight) * jnp.sum(batch["weights"] * own) + weight * kd
    return total / batch["weights"].sum(), jnp.sum(there * (a - b)) / members.sum()


@pytest.mark.parametrize("temperature, mesh", [(1.0, None), (20.0, "all")])
def test_kd_by_chunks_equals_the_dense_oracle(temperature, mesh):
    batch = with_teacher_rows(make_batch(8))
    params, teacher = models()
    oracle = jax.jit(jax.value_and_grad(lambda p: by_hand(p, teacher, batch, 0.6, temperature), has_aux=True))
    (expected, lead), gradient = oracle(params["model"])
    kd = Distillation(temperature=temperature, temperature_on="both")
    obj = make_objective(0.6, kd=kd, auto=Auto(frozenset({"kd"})))
    obj = dataclasses.replace(obj, block_tokens=32)
    mesh = mesh and sharding.make_mesh(*MESHES[mesh])
    found, metrics = one_step(obj, {"kd"}, batch, mesh=mesh)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert metrics["lead"] == pytest.approx(float(lead), rel=1e-4)
    assert_close(found["model"], gradient, 2e-5)


def test_the_divergence_is_nothing_where_they_agree_and_the_loss_where_the_teacher_is_sure():
    own, its = jnp.float32([0.0, 0.3, 5.0, 90.0, 2.5]), jnp.float32([0.0, 0.3, 5.0, 90.0, 0.0])
    for temperature in (1.0, 100.0):
        value, slope = chunks.divergence(own, its, temperature)
        np.testing.assert_allclose(value, [0, 0, 0, 0, 2.5], atol=1e-3)
        np.testing.assert_allclose(slope, [0, 0, 0, 0, 1], atol=1e-3)
    many = jnp.float32([0.2, 1.0, 7.0])[:, None], jnp.float32([0.1, 1.5, 40.0])
    slopes = jax.grad(lambda s: chunks.divergence(s, many[1], 10.0)[0].sum())(jnp.broadcast_to(many[0], (3, 3)))
    np.testing.assert_allclose(chunks.divergence(*many, 10.0)[1], slopes, rtol=1e-3, atol=1e-5)


def same_rows(batch):
    """The batch with the student's own rows as the teacher's, each token a chunk and at its own place."""
    rows = {f"teacher_{name}": x for name, x in batch.items()}
    alone = (np.cumsum(batch["weights"] > 0, axis=1) * (batch["weights"] > 0)).astype(np.int32)
    index = np.where(batch["segment_ids"] > 0, np.arange(TOKENS), -1).astype(np.int32)
    rows["teacher_bytes"] = np.ones_like(alone)
    return batch | rows | {"teacher_chunks": alone, "teacher_own_chunks": alone, "teacher_index": index}


@pytest.mark.parametrize("mesh", [None, "all"])
def test_a_teacher_that_happens_to_read_the_same_tokens_guides_and_leads_as_usual(mesh):
    batch = make_batch(8)
    weights = {"kd": lambda *_: 0.0, "align": lambda *_: 0.5}
    obj = make_objective(align=Alignment(((2, 2),), centre=True), weights=weights, auto=Auto(frozenset({"align"})))
    usual, expected = run_step(obj, {"align"}, batch)
    found, metrics = one_step(obj, {"align"}, same_rows(batch), mesh=mesh and sharding.make_mesh(*MESHES[mesh]))
    assert_close(found["model"], usual["model"])
    assert metrics == pytest.approx(expected, rel=1e-5) and metrics["align_ratio"] > 0.1 and abs(metrics["lead"]) > 0.1


@pytest.mark.parametrize("others, mesh", [("drop", "all"), ("zero", None)])
def test_rows_are_chosen_by_the_loss_a_byte_of_what_the_scorer_has_learnt(others, mesh):
    batch, selection = with_teacher_rows(make_batch(16)), Selection(2, 0.5, k=30, others=others)
    rows, (_, teacher) = teacher_rows_of(batch), models()
    sizes = np.random.default_rng(3).integers(1, 9, rows["targets"].shape) * (rows["weights"] > 0)
    logits, *_ = dense.forward(TEACHER, teacher, rows)
    label = np.take_along_axis(logits, rows["targets"][..., None], -1)
    learnt = ((logits > label).sum(-1) < 30) & (rows["weights"] > 0)
    loss, counted = losses_on(TEACHER, teacher, rows), learnt if others == "drop" else rows["weights"] > 0
    scores = (loss * learnt).sum(1) / (sizes * counted).sum(1)
    best = np.sort(np.argsort(-scores)[:8])
    obj = make_objective(0.5, 0.4, align=Alignment(((2, 2),), centre=True), select=selection)
    whole = batch | {"teacher_bytes": sizes.astype(np.int32)}
    mesh = mesh and sharding.make_mesh(*MESHES[mesh])
    found, metrics = one_step(obj, {"kd", "align", "select"}, whole, mesh=mesh)
    expected, others = one_step(obj, {"kd", "align"}, {name: x[best] for name, x in batch.items()})
    assert_close(found["model"], expected["model"])
    assert metrics.pop("kept_fraction") == 0.5 and metrics == pytest.approx(others, rel=1e-5)


def test_tokens_without_a_place_in_the_teacher_s_row_are_not_guided():
    batch, alignment = same_rows(make_batch(8)), Alignment(((2, 2),), scale="plain")
    batch["teacher_index"] = np.where(np.arange(TOKENS) % 3 == 0, -1, batch["teacher_index"])
    obj = make_objective(lam=0.7, align=alignment)
    found, metrics = one_step(obj, {"align"}, batch)
    params, teacher = models()

    def loss(p):
        logits, _, seen = dense.forward(STUDENT, p, batch, (2,))
        _, last, _ = dense.forward(TEACHER, teacher, batch)
        ce = losses_on(STUDENT, p, batch)
        cosine = dense.negative_cosine(seen[2], last, False, batch["weights"], "teacher_to_student")
        guided = batch["weights"] * (batch["teacher_index"] >= 0)
        return (jnp.sum(batch["weights"] * ce) + 0.7 * jnp.sum(guided * cosine)) / batch["weights"].sum()

    assert_close(found["model"], jax.jit(jax.grad(loss))(params["model"]), 2e-5)


@pytest.mark.slow
def test_padding_and_accumulation_change_nothing():
    batch = with_teacher_rows(make_batch(8))
    more = lambda name: 8 if name in ("teacher_chunks", "teacher_index") or "teacher" not in name else 24  # noqa: E731
    padded = {
        name: np.pad(x, [(0, 0), (0, more(name))], constant_values=-1 if name == "teacher_index" else 0)
        for name, x in batch.items()
    }
    obj = make_objective(0.5, 0.4, align=Alignment(((2, 2),), centre=True), auto=Auto(frozenset({"kd"})))
    short, metrics = one_step(obj, {"kd", "align"}, batch)
    for changed, parts in ((padded, 1), (batch, 4)):
        found, others = one_step(obj, {"kd", "align"}, changed, accumulation=parts)
        assert_close(found["model"], short["model"])
        assert others == pytest.approx(metrics, rel=1e-5)


# ---------------------------------------------------------------------- whole runs


def test_a_run_with_every_help_of_other_tokens_goes_on_exactly(home, recipe, data, other):
    arguments = (f"{recipe}:helped", home / "whole", data, other)
    whole = runs.run(*arguments, "--config.checkpoint.keep=9")
    metrics = [line for line in lines(home / "whole") if "loss" in line]
    assert {"kd", "teacher_ce", "align_cosine", "kept_fraction"} <= metrics[0].keys()
    assert metrics[0]["kd"] and metrics[0]["teacher_ce"] > metrics[0]["ce"] / 2 and not metrics[-1]["kd"]
    rows = checkpoint.Run(home / "whole").manifest()["teacher"]["rows"]
    assert rows["seq_len"] % 128 == 0 and rows["aligned_by"] == "bytes"
    assert rows["tokenizer"] == checkpoint.Saved.find(other.partition("=")[2]).tokenizer_fingerprint
    shutil.copytree(home / "whole", home / "part")
    for step in (4, 6, 8):
        shutil.rmtree(home / "part" / "checkpoints" / str(step))
    assert_same(runs.run(arguments[0], home / "part", data, other, "--config.checkpoint.keep=9"), whole)
    flops = np.diff([0, *(line["flops"] for line in metrics)])
    assert flops[0] > flops[2] > flops[-1], "candidates' rows, then kd and align, then none"


@pytest.mark.slow
def test_a_scorer_of_other_tokens_and_help_that_ends_itself(home, recipe, data, teacher, other):
    ends = ("kd.weight=0.5", "kd.stop=auto", "kd.handover=linear", "align.weight=0.5", "align.stop=auto", "auto.end=-9")
    chosen = ("select.candidates=2", "select.stop=1", f"select.scorer={other.partition('=')[2]}")
    flags = [f"--config.objective.{flag}" for flag in (*ends, *chosen)]
    runs.run(recipe, home / "scored", data, teacher, *flags)
    manifest = checkpoint.Run(home / "scored").manifest()
    assert "rows" in manifest["scorer"] and "rows" not in manifest["teacher"]
    state = runs.run(recipe, home / "ends", data, other, *flags[:5], "--config.objective.auto.end=0.9")
    assert int(state.watch.ended) != auto.NEVER


def test_another_way_to_read_the_text_is_refused_on_resume(home, tmp_path, recipe, data, other):
    shutil.copytree(home / "whole", tmp_path / "run")
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["teacher"]["rows"]["tokenizer"] = "0"
    path.write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    with pytest.raises(UserError, match="the teacher in .* reads the text otherwise than that of the run in"):
        runs.run(f"{recipe}:helped", tmp_path / "run", data, other, "--config.checkpoint.keep=9")


KD = "--config.objective.kd.weight=0.5"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["kd.top_k=5"], "objective.kd.top_k=5: the teacher's tokenizer is another one than the data's"),
        (["kd.gate=soft"], "objective.kd.gate='soft': the teacher's tokenizer is another one"),
        (["kd.temperature=2"], "objective.kd.temperature_on='teacher': .*set it to 'both'"),
        (["scatter_head=true"], "objective.scatter_head=True: the teacher's tokenizer is another one"),
    ],
)
def test_what_chunks_do_not_have_is_refused(tmp_path, recipe, data, other, flags, message):
    with pytest.raises(UserError, match=message):
        runs.run(recipe, tmp_path / "run", data, other, KD, *(f"--config.objective.{flag}" for flag in flags))


def hub_teacher(directory, tokenizer, **changes):
    """A Hub directory as the helper, of which the tokenizer is this one, or none."""
    hub.write(directory, dataclasses.replace(hub.LLAMA, **changes))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink(missing_ok=True)
    if tokenizer:
        shutil.copy(tokenizer, directory / "tokenizer.json")
    return f"--config.teacher.path=hf:{directory}"


def test_helpers_whose_tokens_have_no_bytes_are_named(tmp_path, recipe, data):
    words = hub_teacher(tmp_path / "words", hub.write_words(tmp_path / "wordpiece"))
    with pytest.raises(UserError, match=r"teacher.path='hf:.*words' .*does not say which bytes its tokens are"):
        runs.run(recipe, tmp_path / "run", data, words, KD)
    none = hub_teacher(tmp_path / "none", None)
    with pytest.raises(UserError, match="teacher.path: the model in .* has neither a tokenizer.json nor"):
        runs.run(recipe, tmp_path / "run", data, none, KD)
    upper = tokenizer_lib.tokenizers.Tokenizer.from_file(str(hub.write_tokenizer(tmp_path / "upper")))
    upper.normalizer = tokenizer_lib.tokenizers.normalizers.Replace("a", "A")
    upper.save(str(tmp_path / "upper" / "tokenizer.json"))
    with pytest.raises(UserError, match="its tokenizer .* changes the text: only .* of the bytes of the data's first"):
        runs.run(
            recipe, tmp_path / "run", data, hub_teacher(tmp_path / "changes", tmp_path / "upper/tokenizer.json"), KD
        )


def test_rows_longer_than_the_teacher_s_positions_are_refused(tmp_path, recipe, data, teacher):
    short = hub_teacher(
        tmp_path / "gpt2", hub.write_tokenizer(tmp_path / "tokenizer"), num_kv_heads=4, mlp_bias=True, qkv_bias=True,
        tie_embeddings=True, position="learned", norm="layernorm", mlp="gelu_tanh", attn_out_bias=True,
    )  # fmt: skip
    with pytest.raises(UserError, match="teacher.seq_len=65 is longer than the 64 learned positions of the model of"):
        runs.run(recipe, tmp_path / "run", data, short, KD, "--config.teacher.seq_len=65")
    with pytest.raises(UserError, match="teacher.seq_len=-1 must be at least 0"):
        runs.run(recipe, tmp_path / "run", data, short, KD, "--config.teacher.seq_len=-1")
    with pytest.raises(UserError, match="teacher.seq_len=64: the model of teacher.path reads the data's own tokens"):
        runs.run(recipe, tmp_path / "run", data, teacher, KD, "--config.teacher.seq_len=64")


def test_what_a_helper_of_other_tokens_says_is_not_written_down(tmp_path, recipe, data, other):
    argv = [f"--config={recipe}:helped", f"--out={tmp_path / 'answers'}", data, other]
    with pytest.raises(UserError, match="has another tokenizer than the data in"):
        score.score(*read(argv, score.Flags))
