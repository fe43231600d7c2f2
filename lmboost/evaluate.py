"""Validation loss, perplexity and bits per byte of a checkpoint.

    python -m lmboost.evaluate --checkpoint=RUN_OR_CHECKPOINT [--data=DIR] [--batches=-1]

Inside training the same pass runs every `eval.every` steps.
"""

import argparse
import math
import sys

import jax
from jax.sharding import Mesh

from lmboost import checkpoint, sharding
from lmboost.data import loader
from lmboost.errors import UserError, exit_on_user_error
from lmboost.models import attention, transformer
from lmboost.models.transformer import ModelConfig
from lmboost.train_step import make_eval_step


class Validation:
    """Evaluates parameters on a fixed part of a validation split.

    batches: of `batch_size` rows, from the beginning of the split; -1 is all of it.
    """

    def __init__(
        self, model: ModelConfig, spec: str, seq_len: int, batch_size: int, batches: int, mesh: Mesh, block_tokens: int
    ):
        index, count = sharding.host_share(mesh)
        self._mesh, self._batch_size, self._batches = mesh, batch_size, None if batches == -1 else batches
        self._data = loader.Loader(spec, "validation", seq_len, 0, index, count)
        self._info = loader.info(spec, "validation")
        self._step = jax.jit(make_eval_step(model, block_tokens))

    def __call__(self, params) -> dict[str, float]:
        """{"val_loss": nats per token, "val_perplexity", "val_bits_per_byte"}.

        Bits per byte takes the bytes per token of the whole split.
        """
        sums = []
        for batch in self._data.eval_batches(self._batch_size, self._batches):
            sums.append(self._step(params, sharding.put_batch(batch, self._mesh)))
        loss, count = (float(sum(x)) for x in zip(*jax.device_get(sums), strict=True))
        nats = loss / count
        return {
            "val_loss": nats,
            "val_perplexity": math.exp(min(nats, 700.0)),
            "val_bits_per_byte": nats / math.log(2) / self._info.bytes_per_token,
        }


def evaluate(path: str, data: str = "", step: int = -1, batches: int = -1, batch_size: int = 32) -> dict[str, float]:
    """The validation numbers of a checkpoint; `data` empty is the data it was trained on."""
    directory = checkpoint.find(path, step, "--checkpoint")
    manifest = checkpoint.read_manifest(directory)
    config = manifest["config"]
    spec = data or config["data"]["validation"] or config["data"]["train"]
    if loader.info(spec, "validation").tokenizer_fingerprint != manifest["data"]["tokenizer"]:
        raise UserError(f"--data={spec!r} was prepared with another tokenizer than the model in {directory}.")
    model = ModelConfig(**manifest["model"])
    kernel = attention.resolve("auto", jax.default_backend(), config["seq_len"], model.head_dim, model.dtype)
    model = ModelConfig(**manifest["model"] | {"attention": kernel, "remat": "none"})
    mesh = sharding.make_mesh()
    rows = -(-batch_size // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))
        params = checkpoint.load_params(directory, like, mesh)
        block = config["objective"]["block_tokens"]
        return Validation(model, spec, config["seq_len"], rows, batches, mesh, block)(params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run's directory, or one of its checkpoints")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--data", default="", help="prepared data; empty is what the model was trained on")
    parser.add_argument("--batches", type=int, default=-1, help="-1 is the whole validation split")
    parser.add_argument("--batch_size", type=int, default=32, help="rows of a batch")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    flags = parser.parse_args()

    def run():
        for name, value in evaluate(flags.checkpoint, flags.data, flags.step, flags.batches, flags.batch_size).items():
            print(f"{name} {value:.6f}")

    exit_on_user_error(run, flags.traceback)


if __name__ == "__main__":
    sys.exit(main())
