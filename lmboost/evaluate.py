"""Validation loss, perplexity and bits per byte of a checkpoint, or its results in lm-evaluation-harness tasks.

    python -m lmboost.evaluate --checkpoint=RUN_OR_CHECKPOINT [--data=DIR] [--batches=-1]
    python -m lmboost.evaluate --checkpoint=RUN_OR_CHECKPOINT_OR_hf:DIR --tasks=arc_easy,hellaswag [--out=FILE.json]

Inside training the same passes run every `eval.every` and `eval.tasks_every` steps.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lmboost import checkpoint, generate, sharding
from lmboost.data import loader
from lmboost.data.tokenizer import find_for
from lmboost.errors import UserError, exit_on_user_error
from lmboost.models import attention, transformer
from lmboost.models.model_config import ModelConfig
from lmboost.train_step import make_eval_step


class Validation:
    """Evaluates parameters on a fixed part of a validation split.

    batches: of `batch_size` rows, from the beginning of the split; -1 is all of it.
    """

    def __init__(
        self, model: ModelConfig, spec: str, seq_len: int, batch_size: int, batches: int, mesh: Mesh, block_tokens: int
    ):
        self._mesh, self._batch_size, self._batches = mesh, batch_size, None if batches == -1 else batches
        self._data = loader.Loader(spec, "validation", seq_len, 0, *sharding.host_share(mesh))
        self._info = loader.info(spec, "validation")
        self._step = jax.jit(make_eval_step(model, block_tokens))

    def __call__(self, params, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """{"val_loss": nats per token, "val_perplexity", "val_bits_per_byte"}; None if `stop` said so on the way.

        Bits per byte takes the bytes per token of the whole split.
        """
        sums = []
        for batch in self._data.eval_batches(self._batch_size, self._batches):
            if stop():
                return None
            sums.append(self._step(params, sharding.put_batch(batch, self._mesh)))
        loss, count = (float(sum(x)) for x in zip(*jax.device_get(sums), strict=True))
        nats = loss / count
        return {
            "val_loss": nats,
            "val_perplexity": math.exp(min(nats, 700.0)),
            "val_bits_per_byte": nats / math.log(2) / self._info.bytes_per_token,
        }


def evaluate(
    path: str,
    data: str = "",
    step: int = -1,
    batches: int = -1,
    batch_size: int = 32,
    *,
    seq_len: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
) -> dict[str, float]:
    """The validation numbers of a checkpoint.

    data, seq_len: empty and 0 are those that it was trained with. A model from the Hub needs `data`; its rows are by
    default as long as both allow.
    """
    directory = checkpoint.find(path, step, "--checkpoint")
    manifest = checkpoint.read_manifest(directory)
    config, model = manifest.get("config") or {}, ModelConfig(**manifest["model"])
    spec = data or (config and (config["data"]["validation"] or config["data"]["train"]))
    if not spec:
        raise UserError(f"--data is empty, and nothing in {directory} says which data to take: give a prepared one.")
    info = loader.info(spec, "validation")
    if info.tokenizer_fingerprint != manifest["data"]["tokenizer"]:
        raise UserError(f"--data={spec!r} was prepared with another tokenizer than the model in {directory}.")
    fits = (n for n in range(min(model.max_seq_len, info.record_tokens), 0, -1) if info.record_tokens % n == 0)
    seq_len = seq_len or config.get("seq_len") or next(fits)
    if model.position == "learned" and seq_len > model.max_seq_len:
        raise UserError(f"--seq_len={seq_len}: the model has {model.max_seq_len} learned positions.")
    heads = {sizes.head_dim for sizes in model.sizes}
    kernel = attention.resolve("auto", jax.default_backend(), seq_len, heads, model.dtype)
    model = dataclasses.replace(model, attention=kernel, remat="none")
    mesh = sharding.make_mesh(-1, fsdp, tensor)
    rows = -(-batch_size // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
        params = checkpoint.load_params(directory, like, mesh)
        block = config["objective"]["block_tokens"] if config else 1024
        return Validation(model, spec, seq_len, rows, batches, mesh, block)(params)


def evaluate_tasks(
    path: str,
    tasks: str,
    include: str = "",
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    step: int = -1,
    batch_size: int = 32,
    tokenizer: str = "",
    max_length: int = 0,
    dtype: str = "",
    fsdp: int = 1,
    tensor: int = 1,
) -> dict[str, Any]:
    """Results of lm-evaluation-harness tasks "a,b", as `harness.run_tasks` returns them.

    max_length 0 is the length of the rows that the model was trained on, or what its config says. `include` is a
    directory with tasks of one's own.
    """
    from lmboost import harness  # needs a package that is not always there

    names = harness.names_of(tasks)
    harness.find_tasks(names, include)
    mesh = sharding.make_mesh(-1, fsdp, tensor)
    with jax.set_mesh(mesh):
        loaded = generate.load_model(path, step, mesh, dtype, params_dtype="float32")
        coder = find_for(loaded.directory, loaded.manifest, tokenizer)
        trained_on = (loaded.manifest.get("config") or {}).get("seq_len", loaded.model.max_seq_len)
        length = max_length or min(trained_on, loaded.model.max_seq_len)
        lm = harness.LanguageModel(loaded.model, loaded.params, mesh, coder, batch_size, length, progress=True)
        return harness.run_tasks(lm, names, include, num_fewshot, limit)


def _print_tasks(flags: argparse.Namespace) -> dict[str, Any]:
    from lmboost import harness

    results = evaluate_tasks(
        flags.checkpoint, flags.tasks, flags.include_path, num_fewshot=flags.num_fewshot, limit=flags.limit,
        step=flags.step, batch_size=flags.batch_size, tokenizer=flags.tokenizer, max_length=flags.max_length,
        dtype=flags.dtype, fsdp=flags.fsdp, tensor=flags.tensor,
    )  # fmt: skip
    print(harness.table(results))
    return {name: results[name] for name in ("results", "groups", "versions", "n-shot", "n-samples") if name in results}


def _print_validation(flags: argparse.Namespace) -> dict[str, float]:
    values = evaluate(
        flags.checkpoint, flags.data, flags.step, flags.batches, flags.batch_size,
        seq_len=flags.seq_len, fsdp=flags.fsdp, tensor=flags.tensor,
    )  # fmt: skip
    for name, value in values.items():
        print(f"{name} {value:.6f}")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or hf:DIR")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--data", default="", help="prepared data; empty is what the model was trained on")
    parser.add_argument("--batches", type=int, default=-1, help="-1 is the whole validation split")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a batch")
    parser.add_argument("--seq_len", type=int, default=0, help="tokens of a row; 0 is what the model was trained on")
    parser.add_argument("--out", default="", help="a file to write the numbers to, as JSON")
    parser.add_argument("--tasks", default="", help="tasks of the lm-evaluation-harness, comma between them")
    parser.add_argument("--include_path", default="", help="a directory with tasks of your own (YAML)")
    parser.add_argument("--num_fewshot", type=int, help="examples in the context; empty is what each task says")
    parser.add_argument("--limit", type=float, help="only so many examples of each task, or this fraction of them")
    parser.add_argument("--tokenizer", default="", help="for tasks; empty: the model's own, beside it or in its data")
    parser.add_argument("--max_length", type=int, default=0, help="for tasks: tokens that the model reads at most")
    parser.add_argument("--dtype", default="", help="for tasks: of compute; empty is the model's own")
    parser.add_argument("--fsdp", type=int, default=1, help="devices over which parameters are spread")
    parser.add_argument("--tensor", type=int, default=1, help="devices over which heads and vocabulary are spread")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    flags = parser.parse_args()

    def run():
        if flags.out:
            os.makedirs(os.path.dirname(os.path.abspath(flags.out)), exist_ok=True)
        values = _print_tasks(flags) if flags.tasks else _print_validation(flags)
        if flags.out:
            with open(flags.out, "w", encoding="utf-8") as file:
                json.dump({"checkpoint": flags.checkpoint, "step": flags.step} | values, file, indent=1, default=str)

    exit_on_user_error(run, flags.traceback)


if __name__ == "__main__":
    sys.exit(main())
