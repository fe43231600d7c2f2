"""Validation loss, perplexity and bits per byte of a checkpoint, or its results in lm-evaluation-harness tasks.

    python -m lmboost.evaluate --checkpoint=RUN_OR_CHECKPOINT [--data=DIR] [--batches=-1]
    python -m lmboost.evaluate --checkpoint=RUN_OR_CHECKPOINT_OR_hf:DIR --tasks=arc_easy,hellaswag [--out=FILE.json]

Inside training the same passes run every `eval.every` and `eval.tasks_every` steps.
"""

import argparse
import inspect
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lmboost import sharding
from lmboost.checkpoint import Saved
from lmboost.data import loader
from lmboost.errors import UserError, count, one_of, run_flags
from lmboost.models.model_config import DTYPES, ModelConfig
from lmboost.train_step import make_eval_step


class Validation:
    """Evaluates parameters on a fixed part of a validation split.

    batches: of `batch_size` rows, from the beginning of the split; -1 is all of it.
    """

    def __init__(
        self, model: ModelConfig, spec: str, seq_len: int, batch_size: int, batches: int, mesh: Mesh, block_tokens: int
    ):
        self._mesh, self._batch_size = mesh, batch_size
        self._batches = None if batches == -1 else batches
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
    checkpoint: str,
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
    count("--batches", batches, 1 if batches != -1 else -1)
    count("--batch_size", batch_size)
    count("--seq_len", seq_len, 0)
    saved = Saved.find(checkpoint, step)
    spec = saved.data_or_own(data)
    info = loader.info(spec, "validation")
    saved.check_tokenizer(info)
    fits = (n for n in range(min(saved.model.max_seq_len, info.record_tokens), 0, -1) if info.record_tokens % n == 0)
    seq_len = seq_len or saved.config.get("seq_len") or next(fits)
    model = saved.model_for(seq_len)
    mesh = sharding.make_mesh(-1, fsdp, tensor)
    rows = -(-batch_size // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    with jax.set_mesh(mesh):
        block = saved.config["objective"]["block_tokens"] if saved.config else 1024
        return Validation(model, spec, seq_len, rows, batches, mesh, block)(saved.load(mesh))


def evaluate_tasks(
    checkpoint: str,
    tasks: str,
    include_path: str = "",
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

    max_length 0 is the length of the rows that the model was trained on, or what its config says. `include_path` is a
    directory with tasks of one's own.
    """
    from lmboost import harness  # needs a package that is not always there

    count("--batch_size", batch_size)
    count("--max_length", max_length, 0)
    count("--num_fewshot", num_fewshot or 0, 0)
    if limit is not None and not limit > 0:
        raise UserError(f"--limit={limit} must be above 0: so many examples of each task, or below 1 a fraction.")
    names = harness.names_of(tasks)
    harness.find_tasks(names, include_path)
    saved = Saved.find(checkpoint, step)
    model = saved.model_for(dtype=dtype and one_of("--dtype", dtype, DTYPES))
    coder = saved.tokenizer(tokenizer)
    length = max_length or min(saved.config.get("seq_len", model.max_seq_len), model.max_seq_len)
    mesh = sharding.make_mesh(-1, fsdp, tensor)
    with jax.set_mesh(mesh):
        lm = harness.LanguageModel(model, saved.load(mesh), mesh, coder, batch_size, length, progress=True)
        return harness.run_tasks(lm, names, include_path, num_fewshot, limit)


def _run(out: str, **flags) -> None:
    """The verb: prints the numbers, and writes them to the file `out`."""
    file = pathlib.Path(out)
    if out:
        file.parent.mkdir(parents=True, exist_ok=True)
    verb = evaluate_tasks if flags["tasks"] else evaluate
    values = verb(**{name: flags[name] for name in inspect.signature(verb).parameters})
    if flags["tasks"]:
        from lmboost import harness

        print(harness.table(values))
        kept = ("results", "groups", "versions", "n-shot", "n-samples")
        values = {name: values[name] for name in kept if name in values}
    else:
        print("\n".join(f"{name} {value:.6f}" for name, value in values.items()))
    if out:
        about = {name: flags[name] for name in ("checkpoint", "step")}
        file.write_text(json.dumps(about | values, indent=1, default=str), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or hf:DIR")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--data", default="", help="prepared data; empty is what the model was trained on")
    parser.add_argument("--batches", type=int, default=-1, help="-1 is the whole validation split")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a batch")
    parser.add_argument("--seq_len", type=int, default=0, help="tokens of a row; 0 is what the model was trained on")
    parser.add_argument("--out", default="", type=os.path.expanduser, help="a file to write the numbers to, as JSON")
    parser.add_argument("--tasks", default="", help="tasks of the lm-evaluation-harness, comma between them")
    parser.add_argument(
        "--include_path", default="", type=os.path.expanduser, help="a directory with tasks of your own (YAML)"
    )
    parser.add_argument("--num_fewshot", type=int, help="examples in the context; empty is what each task says")
    parser.add_argument("--limit", type=float, help="only so many examples of each task, or this fraction of them")
    parser.add_argument("--tokenizer", default="", help="for tasks; empty: the model's own, beside it or in its data")
    parser.add_argument("--max_length", type=int, default=0, help="for tasks: tokens that the model reads at most")
    parser.add_argument("--dtype", default="", help="for tasks: of compute; empty is the model's own")
    parser.add_argument("--fsdp", type=int, default=1, help="devices over which parameters are spread")
    parser.add_argument("--tensor", type=int, default=1, help="devices over which heads and vocabulary are spread")
    run_flags(_run, parser, prints=True)


if __name__ == "__main__":
    main()
