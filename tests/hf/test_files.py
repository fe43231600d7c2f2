"""What of a Hub directory cannot be read is one clear error, and reading one holds little more than the model."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmboost import checkpoint
from lmboost.errors import UserError
from lmboost.hf import files, weights, writer
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig
from tests import hub


@pytest.fixture
def directory(tmp_path):
    """A whole directory, to be damaged."""
    hub.write(tmp_path / "hub")
    return tmp_path / "hub"


def load(directory):
    return checkpoint.Saved.find(f"hf:{directory}").load(hub.one_device())


def set_keys(directory, **keys):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def rewrite(directory, change):
    """The same file with its tensors as `change` makes them of {name: array}."""
    path = directory / "model.safetensors"
    found = {name: t.rows(0, t.shape[0]) for name, t in files.read_header(path).items()}
    entries = [files.Entry(n, x.shape, lambda x=x: iter([x])) for n, x in change(found).items()]
    files.write_tensors(directory, entries, "F32", 10**9)


def test_what_is_written_is_what_is_read(tmp_path):
    params = hub.write(tmp_path / "hub")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(load(tmp_path / "hub")), jax.device_get(params))


@pytest.mark.parametrize("limit", [1, 2050, 10**9])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_any_tensors_in_any_shards(dtype, limit, tmp_path):
    """A tensor is in one file, however large it is."""
    draw = np.random.default_rng(0)
    shapes = {"a": (3,), "b.c": (40, 25), "d": (2, 3, 4)}
    arrays = {n: draw.standard_normal(s).astype(files.DTYPES[dtype]) for n, s in shapes.items()}
    blocks = {n: lambda x=x: iter([x[:1], x[1:]]) for n, x in arrays.items()}
    files.write_tensors(tmp_path, [files.Entry(n, x.shape, blocks[n]) for n, x in arrays.items()], dtype, limit)
    assert len(list(tmp_path.glob("*.safetensors"))) == {1: 3, 2050: 2 if dtype == "BF16" else 3, 10**9: 1}[limit]
    found = files.open_tensors(tmp_path)
    assert {n: t.shape for n, t in found.items()} == shapes
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.rows(0, tensor.shape[0]), arrays[name])
        np.testing.assert_array_equal(tensor.rows(1, 2)[:1], arrays[name][1:2])


# ---------------------------------------------------------------- files


def cut(path, to):
    path.write_bytes(path.read_bytes()[:to])


def with_index(directory, **weight_map):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    names = files.read_header(directory / "model-00001-of-00002.safetensors")
    index = dict.fromkeys(names, "model-00001-of-00002.safetensors") | weight_map
    (directory / files.INDEX).write_text(json.dumps({"weight_map": index}))


DAMAGE = {
    "truncated": (lambda d: cut(d / "model.safetensors", -100), "is damaged: it has .* bytes, and its header tells of"),
    "header cut": (lambda d: cut(d / "model.safetensors", 100), "damaged: 100 bytes cannot hold its header"),
    "empty": (lambda d: cut(d / "model.safetensors", 0), "damaged: 0 bytes cannot hold"),
    "not safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"x" * 100),
        "header of .* is not readable JSON",
    ),
    "null for a tensor": (
        lambda d: (d / "model.safetensors").write_bytes((14).to_bytes(8, "little") + b'{"what?":null}'),
        r"header of .*: what\? is None, expected an object",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not readable JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: the whole is a list, expected"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor model"),
    "pickles": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        r"pickles alone \(pytorch_model.bin\).*python -c .*save_pretrained",
    ),
    "shard missing": (lambda d: with_index(d, x="model-00002-of-00002.safetensors"), "shard 'model-00002-of-00002"),
    "shard elsewhere": (lambda d: with_index(d, x="../model.safetensors"), "names the shard '../model.safetensors'"),
    "index is wrong": (lambda d: with_index(d, x="model-00001-of-00002.safetensors"), "no tensor 'x', which"),
    "index is nothing": (
        lambda d: (with_index(d), (d / files.INDEX).write_text("{}")), "the field weight_map is missing",
    ),
    "left over": (
        lambda d: rewrite(d, lambda x: x | {"model.layers.2.mlp.up_proj.weight": x["model.norm.weight"]}),
        "'layers.2.mlp.up_proj.weight' is left over",
    ),
    "missing": (
        lambda d: rewrite(d, lambda x: {k: v for k, v in x.items() if "1.self_attn.o_proj" not in k}),
        "'model.layers.1.self_attn.o_proj.weight' is missing in",
    ),
    "misshapen": (
        lambda d: rewrite(d, lambda x: x | {"model.layers.0.mlp.up_proj.weight": x["lm_head.weight"]}),
        r"'model.layers.0.mlp.up_proj.weight' in .* has shape \[301, 32\], but config.json makes it \[48, 32\]",
    ),
    "tied but not equal": (lambda d: set_keys(d, tie_word_embeddings=True), "'lm_head.weight' in .* is not the emb"),
    "head missing": (
        lambda d: rewrite(d, lambda x: {k: v for k, v in x.items() if k != "lm_head.weight"}),
        "'lm_head.weight' is missing",
    ),
    "another vocabulary": (lambda d: set_keys(d, vocab_size=300), r"embed_tokens.*\[301, 32\], but .*\[300, 32\]"),
    "tokenizer too large": (lambda d: hub.write_tokenizer(d, 305), "has 305 pieces, but config.json .* vocab_size=301"),
    "tokenizer is nothing": (lambda d: (d / "tokenizer.json").write_text("{}"), "not a readable tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, directory):
    damage, message = DAMAGE[name]
    damage(directory)
    with pytest.raises(UserError, match=message):
        load(directory)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F64"])
def test_other_dtypes_are_named(dtype, directory):
    """Quantized, or wider than anything that is trained."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = dtype
    width = {"I8": 1, "F8_E4M3": 1, "F64": 8}[dtype]
    header["model.norm.weight"]["shape"] = [128 // width]
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    with pytest.raises(UserError, match=f"'model.norm.weight' .* is of dtype {dtype}, expected one of F32, F16, BF16"):
        load(directory)


def test_layouts_are_read_in_blocks_of_any_size(tmp_path, monkeypatch):
    """One parameter of three in a tensor, in runs of rows that do not divide it."""
    model = dataclasses.replace(
        hub.LLAMA, num_kv_heads=4, norm="layernorm", mlp="gelu", qkv_bias=True, attn_out_bias=True, mlp_bias=True,
        rope_fraction=0.5,
    )  # fmt: skip
    params = jax.device_get(hub.write(tmp_path / "hub", model))
    for size in (1, 1000, 5000):
        monkeypatch.setattr(weights, "BLOCK_BYTES", size)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(load(tmp_path / "hub")), params)


# ---------------------------------------------------------------- memory

LARGE = ModelConfig(
    vocab_size=32000, num_layers=4, d_model=1024, num_heads=16, num_kv_heads=16, head_dim=64, mlp_dim=4096
)
PEAK = """
import os, sys, threading, time
import jax, numpy as np
from lmboost import checkpoint
from tests import hub

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], held())
        time.sleep(0.001)

saved = checkpoint.Saved.find("hf:" + sys.argv[1])
jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8)))
before = held()
threading.Thread(target=watch, daemon=True).start()
params = saved.load(hub.one_device(), sys.argv[2])
print(peak[0] - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("stored, wanted", [("F32", "float32"), ("BF16", "float32"), ("F32", "bfloat16")])
def test_reading_a_model_holds_little_more_than_the_model(stored, wanted, tmp_path):
    """Anonymous memory at its peak: at most the parameters and 1.2 times the largest published tensor."""
    hub.write_config(tmp_path, LARGE)
    shapes = jax.eval_shape(lambda: transformer.init(LARGE, jax.random.key(0)))
    paths = {checkpoint.sharding.path_name(k): x.shape for k, x in jax.tree_util.tree_leaves_with_path(shapes)}
    tensors = weights.tensors(writer.family_of(LARGE), paths, LARGE.vocab_size)
    row = np.full(4096, 0.5, files.DTYPES[stored])
    entries = [
        files.Entry(t.name, t.shape, lambda t=t: (row[: t.shape[-1]] for _ in range(math.prod(t.shape[:-1]))))
        for t in tensors
    ]
    files.write_tensors(tmp_path, entries, stored, 5 * 10**9)
    largest = max(math.prod(e.shape) for e in entries) * files.DTYPES[stored].itemsize
    command = [sys.executable, "-c", PEAK, str(tmp_path), wanted]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    peak, target = map(int, done.stdout.split())
    print(
        f"{stored} -> {wanted}: {peak / 1e9:.3f} GB for parameters of {target / 1e9:.3f} GB, tensor {largest / 1e9:.3f}"
    )
    assert peak <= target + 1.2 * largest
