"""Models on disk, and the runs that they lie in: what is there, how it is found and read (Orbax).

    WORKDIR/manifest.json                 what the run is: config, model, data, tokenizer, teacher, versions
    WORKDIR/checkpoints/STEP/params       the model's parameters, alone: what a teacher or an init is read from
    WORKDIR/checkpoints/STEP/training     optimizer, counters, learned maps of the alignment
    WORKDIR/checkpoints/STEP/position     where in the data the next batch begins; fingerprints of the two above
    WORKDIR/checkpoints/STEP/manifest     as above, so that a checkpoint can be moved by itself

Teacher parameters are in none of them. What lmboost.convert writes has params and manifest alone, with the tokenizer
beside them. Wherever a checkpoint is read, "hf:DIR" stands for a Hugging Face Hub directory in its place. What only a
run that goes on reads and writes, the state of its training, is run/checkpointer.py's.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding

from lmboost import places, sharding, strict_json
from lmboost.data import loader, special_tokens
from lmboost.data import tokenizer as tokenizers
from lmboost.errors import UserError
from lmboost.hf import reader
from lmboost.models import transformer
from lmboost.models.model_config import ModelConfig

# What is read of manifests and positions, see strict_json.
_STAGE = {  # see stages.Stage
    "directory": str, "step": int, "row": int, "order": int, "tokens": float, "flops": float, "changes": [str],
    "evaluated": bool,
}  # fmt: skip
_RUN = {"config": dict, "data?": {"train?": str, "fingerprint?": str}, "stages?": [_STAGE]}
_ITEMS = {
    "manifest": {
        "model": dict,
        "data": {"tokenizer": str | None},
        "config?": {
            "steps": int, "batch_size": int, "seq_len": int, "objective": {"block_tokens": int},
            "data": {"train": str, "validation?": str},
        },
        "stages?": [_STAGE],
    },
    "position": {
        "step": int, "first_row": int, "fingerprints?": dict, "spent?": {"tokens": float, "flops": float},
    },
}  # fmt: skip


class Damaged(UserError):
    """A checkpoint whose files are missing, cut off, or changed."""


class Run:
    """A run on disk, by its workdir, which may not be there yet. Nothing else knows where in it what lies.

    (But launch/slurm.sh, launch/tpu_vm.sh and launch/local.py, which look for the newest checkpoint without Python or
    without its libraries.)
    """

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = places.find(os.fspath(workdir))
        self.checkpoints, self.manifest_path = self.workdir / "checkpoints", self.workdir / "manifest.json"

    @classmethod
    def of(cls, directory: epath.Path) -> "Run | None":
        """The run that a checkpoint lies in, if it does."""
        return cls(directory.parent.parent) if directory.parent.name == "checkpoints" else None

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, in ascending order."""
        return sorted(ocp.utils.checkpoint_steps(self.checkpoints))

    def at(self, step: int) -> epath.Path:
        """The checkpoint of a step."""
        return self.checkpoints / str(step)

    def manifest(self) -> dict[str, Any] | None:
        """What the run is, if it has been started. Raises a UserError where the file is no manifest."""
        if not self.manifest_path.exists():
            return None
        hint = f"It is no run's manifest; a copy of that lies in {self.checkpoints}/STEP/manifest/metadata."
        return strict_json.read(self.manifest_path, _RUN, hint)


def find(path: str, step: int = -1, field: str = "path") -> epath.Path:
    """The checkpoint directory that `path` names: itself, the one of `step` (-1: the last) of a run, or "hf:DIR"."""
    if path.startswith(reader.PREFIX):
        return reader.find(path, step, field)
    root = places.find(path, field)
    if (root / "params").exists() and (root / "manifest").exists() and ocp.utils.is_checkpoint_finalized(root):
        return root
    run = Run(root)
    if not run.checkpoints.exists() and reader.is_directory(root):
        raise UserError(f"{field}={path!r} is a Hugging Face Hub directory: give it as {reader.PREFIX}{path}.")
    if not run.checkpoints.exists():
        raise UserError(
            f"{field}={path!r} is neither a run (there is no {run.checkpoints}) nor a checkpoint. "
            "Give a directory that lmboost.train wrote with --workdir, or one of its checkpoints/STEP."
        )
    steps = run.steps()
    if not steps or step not in (-1, *steps):
        has = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no finished checkpoint"
        raise UserError(f"{field}={path!r}, step {step}: {has}.")
    return run.at(steps[-1] if step == -1 else step)


@dataclasses.dataclass(frozen=True)
class Saved:
    """A model on disk, found and not read.

    Attributes:
      path, field: what the user gave, and the name of the field or flag that it was given as; for messages.
      directory: the checkpoint, or the Hub directory.
      manifest: what it says of itself; it has no "config" where no run of ours made it.
      model: what it is, as it was saved.
    """

    path: str
    field: str
    directory: epath.Path
    manifest: dict[str, Any]
    model: ModelConfig

    @classmethod
    def find(cls, path: str, step: int = -1, field: str = "--checkpoint") -> "Saved":
        """The model that `path` names: a run (its checkpoint of `step`, -1: the last), a checkpoint, or "hf:DIR"."""
        directory = find(path, step, field)
        manifest = read_manifest(directory)
        where = f"{field}={path!r}: the model in the manifest of {directory}"
        model = strict_json.make(ModelConfig, manifest["model"], where, "Install that release, or give another model.")
        return cls(path, field, directory, manifest, model.validate(where))

    @property
    def config(self) -> dict[str, Any]:
        """The config of the run that trained it, as a tree; {} where none did."""
        return self.manifest.get("config") or {}

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer that it was trained with; None where nothing says which that was."""
        return self.manifest["data"]["tokenizer"]

    def data_or_own(self, given: str = "") -> str:
        """The prepared data to measure it on: `given` as --data, else what it was validated on in training."""
        data = self.config.get("data", {})
        if not (spec := given or data.get("validation") or data.get("train")):
            raise UserError(
                f"--data is empty, and nothing in {self.directory} says which data to take: give a prepared one."
            )
        return spec

    def check_tokenizer(self, data: loader.DataInfo, unknown_too: bool = False) -> None:
        """Raises a UserError where the tokens of the model are not those of prepared data.

        unknown_too: whether a model that comes without a tokenizer is taken for one of these tokens.
        """
        own, where = self.tokenizer_fingerprint, f"{self.field}: the model in {self.directory}"
        if own is None and not unknown_too:
            raise UserError(
                f"{where} has neither a tokenizer.json nor a tokenizer.model, so nothing says that its tokens are "
                "those of the data: put the model's tokenizer there, too. For one of vocab.json and merges.txt, "
                "transformers' AutoTokenizer writes the first with save_pretrained."
            )
        if own not in (None, data.tokenizer_fingerprint) and (why := self._disagreement(data)):
            raise UserError(
                f"{where} was trained with another tokenizer ({own[:12]}) than the data in "
                f"{', '.join(data.directories)} ({data.tokenizer_fingerprint[:12]}): {why}. Its embeddings and "
                "predictions are of other tokens. Prepare the data with its tokenizer, or choose another model."
            )
        if self.model.vocab_size < data.vocab_size:  # which may be for tokens that no text has
            needed = tokenizers.load(data.tokenizer_path).text_vocab_size
            if self.model.vocab_size < needed:
                raise UserError(
                    f"{where} has a vocabulary of {self.model.vocab_size}, fewer than the {needed} pieces of the "
                    "data's tokenizer: choose another model."
                )

    def _disagreement(self, data: loader.DataInfo) -> str | None:
        """What of the data's tokens is another one to the model; None where only tokens differ that no text has."""
        if not (path := self.tokenizer_path):
            return "the model's own is not there to compare them"
        own = tokenizers.load(path)
        if own.fingerprint != self.tokenizer_fingerprint:
            return f"the one in {path} is a third"
        return tokenizers.load(data.tokenizer_path).disagreement(own)

    def tokenizer(self, given: str = "", field: str = "--tokenizer") -> tokenizers.Tokenizer:
        """The model's tokenizer; another one, or one of more pieces than the vocabulary has, is a UserError.

        given: what the user gave as `field`, a path for `tokenizer.load`. Empty: the file beside the checkpoint or in
          the run that it lies in, else the one of the data that the model was trained on.
        """
        if not (path := os.path.expanduser(given) or self.tokenizer_path):
            raise UserError(
                f"{field} is empty, and no tokenizer was found: neither {' nor '.join(tokenizers.FILE_NAMES.values())} "
                f"lies beside the model in {self.directory}, nor is the data there that it was trained on. Give the "
                "tokenizer's file."
            )
        found = tokenizers.load(path)
        if self.tokenizer_fingerprint not in (None, found.fingerprint):
            raise UserError(
                f"the tokenizer in {path} ({found.fingerprint[:12]}) is not the one that the model in {self.directory} "
                f"was trained with ({self.tokenizer_fingerprint[:12]}): give that one with {field}."
            )
        if found.text_vocab_size > self.model.vocab_size:
            raise UserError(
                f"the tokenizer in {found.path} has {found.text_vocab_size} pieces, more than the model's "
                f"vocab_size={self.model.vocab_size}: give the one that it was trained with as {field}."
            )
        if reader.is_directory(self.directory):  # whose files say what ends a text, wherever the tokenizer lies
            found.end_also(special_tokens.ends(self.directory))
        return found

    @property
    def tokenizer_path(self) -> epath.Path | str | None:
        """Where the model's tokenizer is to be found: beside it, or in the data that it was trained on."""
        return self._tokenizer_beside() or self._tokenizer_of_data()

    def _tokenizer_beside(self) -> epath.Path | None:
        if "://" in str(self.directory):
            return None
        run = Run.of(self.directory)
        for top in (self.directory, *([run.workdir] if run else [])):
            for place in (top, top / "tokenizer"):
                if any((place / name).is_file() for name in tokenizers.FILE_NAMES.values()):
                    return place
        return None

    def _tokenizer_of_data(self) -> str | None:
        spec = self.config.get("data", {}).get("train")
        try:
            return loader.info(spec).tokenizer_path if spec else None
        except UserError:  # the data is not on this machine
            return None

    def model_for(
        self, seq_len: int | None = None, dtype: str = "", platform: str = "", quantize: str = "none"
    ) -> ModelConfig:
        """The model made ready to compute, without a backward pass; see `ModelConfig.fit` for the errors.

        Args:
          seq_len: tokens of a row, which choose the attention kernel; None is one that takes rows of any length.
          dtype: of compute; empty is its own.
          platform: empty is the one that jax runs on.
          quantize: what its dense layers multiply.
        """
        dtype = dtype or self.model.dtype
        model = dataclasses.replace(self.model, dtype=dtype, quantize=quantize, remat="none", attention="auto")
        if seq_len is None:
            return dataclasses.replace(model, attention="xla")
        return model.fit(seq_len, platform or jax.default_backend(), f"the model of {self.field}")

    def load(
        self,
        mesh: Mesh,
        dtype: str = "float32",
        model: ModelConfig | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> Any:
        """The parameters, read straight to their place on `mesh` in `dtype`.

        Args:
          model: has the shapes that are expected; None is the model itself. Padded rows of the vocabulary that a Hub
            directory does not have are zero.
          report: receives lines that say where a Hub directory's tensors went.

        Raises a UserError that names the first parameter that is missing, left over, of another shape, or not finite.
        """
        like = jax.eval_shape(lambda: transformer.init(model or self.model, jax.random.key(0)))
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), like)
        if reader.is_directory(self.directory):
            check_same(self.directory, reader.shapes(self.directory, like["embed"]["embedding"].shape[0]), like)
            params, lines = reader.load_params(self.directory, like, mesh)
            for line in lines:
                report(line)
        else:
            params = restore_tree(self.directory, "params", like, sharding.tree_sharding(like, mesh))
        check_finite(params, f"{self.field}={self.path!r}: the model in {self.directory}")
        return params


def save_params(directory: str | os.PathLike, params: Any, manifest: dict[str, Any]) -> None:
    """Writes parameters that no run has trained as a checkpoint of their own.

    Not compressed: that would hold a second copy of the model, and parameters hardly shrink.
    """
    handlers = {"params": ocp.PyTreeCheckpointHandler(use_compression=False), "manifest": ocp.JsonCheckpointHandler()}
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(params), manifest=ocp.args.JsonSave(manifest))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(epath.Path(directory), args=items)


def read_manifest(directory: epath.Path) -> dict[str, Any]:
    """The manifest inside a checkpoint. That of a model from the Hub has no "config", as no run of ours made it."""
    if reader.is_directory(directory):
        return reader.read_manifest(directory)
    return read_json(directory, "manifest")


def read_json(directory: epath.Path, item: str) -> dict[str, Any]:
    """A checkpoint's item ("position", "manifest"); a Damaged where the file cannot be read."""
    path = directory / item / "metadata"
    try:
        return strict_json.read(path, _ITEMS[item], "The checkpoint is damaged.")
    except UserError as error:
        raise Damaged(str(error)) from error
    except OSError as error:
        raise _damaged(path, error) from error


def restore_tree(directory: epath.Path, item: str, like: Any, shardings: Any) -> Any:
    """A checkpoint's item ("params", "training"), with the shapes and dtypes of `like`; each process reads its part.

    Raises a UserError on other shapes, a Damaged where the files cannot be read.
    """
    try:
        found = tree_metadata(directory, item)
    except Exception as error:  # what damage shows as is up to Orbax and TensorStore
        raise _damaged(directory / item, error) from error
    check_same(directory, found, like)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
    try:
        return ocp.StandardCheckpointHandler().restore(directory / item, args=ocp.args.StandardRestore(target))
    except (MemoryError, jax.errors.JaxRuntimeError):  # nothing is wrong with the files
        raise
    except Exception as error:
        raise _damaged(directory / item, error) from error


def _damaged(path: epath.Path, error: Exception) -> Damaged:
    while inner := error.__cause__ or error.__context__:  # the innermost says which file
        error = inner
    return Damaged(f"{path} cannot be read ({places.brief(error)}): the checkpoint is damaged.")


def check_same(directory: epath.Path, found: Any, wanted: Any) -> None:
    """Raises a UserError on the first leaf that the tree in a directory has not, has besides, or in another shape."""
    found, wanted = dict(named(found)), dict(named(wanted))
    for name in sorted({*found, *wanted}):
        if name not in found or name not in wanted:
            where = "is missing in" if name in wanted else "is left over in"
            raise UserError(f"parameter {name!r} {where} {directory}: it belongs to another model or optimizer.")
        if tuple(found[name].shape) != tuple(wanted[name].shape):
            raise UserError(
                f"parameter {name!r} has shape {tuple(found[name].shape)} in {directory}, but the config "
                f"asks for {tuple(wanted[name].shape)}: give the config of the checkpoint's model."
            )


def tree_metadata(directory: epath.Path, item: str) -> Any:
    """The tree of a checkpoint's item ("params", "training"), with shapes and dtypes; reads no arrays."""
    return ocp.StandardCheckpointHandler().metadata(directory / item).tree


def named(tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) with every kind of key written alike, as Orbax's own metadata is."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if hasattr(leaf, "shape"):
            yield sharding.path_name(keys), leaf


def check_finite(params: Any, where: str) -> None:
    """Raises a UserError, beginning with `where`, on the first parameter that has a NaN or an infinity."""
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(x.sharding, NamedSharding)), None)
    found = jax.device_get(_are_finite(mesh)(params))
    if wrong := [sharding.path_name(keys) for keys, good in jax.tree_util.tree_leaves_with_path(found) if not good]:
        raise UserError(f"{where} has values that are not finite in parameter {wrong[0]!r}: give another one.")


@functools.lru_cache
def _are_finite(mesh: Mesh | None) -> Callable[[Any], Any]:
    everywhere = {"out_shardings": sharding.replicated(mesh)} if mesh else {}

    def is_finite(x):  # by its extremes, for which no second array of its size is made
        return jnp.isfinite(x.max()) & jnp.isfinite(x.min())

    return jax.jit(lambda tree: jax.tree.map(is_finite, tree), **everywhere)


def fingerprint(params: Any) -> str:
    """sha256 over every parameter's bits, the same on any mesh.

    Bits are reduced on the devices by wrapping integer sums, plain and weighted by place, which no order
    of summation changes.
    """
    shapes = [(name, tuple(x.shape), str(x.dtype)) for name, x in named(params)]
    mesh = next((x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(x.sharding, NamedSharding)), None)
    numbers = [int(n) for n in jax.tree.leaves(jax.device_get(_sums_of_bits(mesh)(params)))]
    return hashlib.sha256(json.dumps([shapes, numbers]).encode()).hexdigest()


@functools.lru_cache  # one compilation for all saves of a run
def _sums_of_bits(mesh: Mesh | None) -> Callable[[Any], Any]:
    def reduce(x):
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        places = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, 0) if bits.ndim else jnp.uint32(0)
        for axis in range(1, bits.ndim):
            places = places * jnp.uint32(31) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * (places * 2 + 1), dtype=jnp.uint32)

    everywhere = {"out_shardings": sharding.replicated(mesh)} if mesh else {}
    return jax.jit(lambda tree: jax.tree.map(reduce, tree), **everywhere)


PACKAGES = ("lmboost", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of PACKAGES; "source" for a package that runs from a checkout."""
    found = {p: next(iter(metadata.distributions(name=p)), None) for p in PACKAGES}  # by name: all others stay unread
    return {p: distribution.version if distribution else "source" for p, distribution in found.items()}
