"""The models that help, teacher and scorer: found when a run is planned, read when it needs them.

One model may be both; it is then in memory once. Neither is ever in a checkpoint. Where they have answered before the
run (lmboost.score) only what they are is known of them.
"""

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import sharding
from lmboost.checkpoint import Saved
from lmboost.data import bytes_of, retokenize
from lmboost.data import tokenizer as tokenizers
from lmboost.data.loader import DataInfo
from lmboost.data.retokenize import Retokenizer
from lmboost.data.windows import Windows
from lmboost.errors import UserError, one_of
from lmboost.models import transformer
from lmboost.models.model_config import QUANTIZED, ModelConfig
from lmboost.run.processes import say

_MEASURED_ROWS = 64  # of the data, by which the length of rows of another tokenizer is chosen
_MULTIPLE = 128  # of which that length is one, as attention kernels ask for


@dataclasses.dataclass(frozen=True)
class Helper:
    """A model that helps.

    Attributes:
      saved: where it is; None where steps are compiled that nobody runs.
      model: what it is, ready to compute.
      retokenizer: makes its rows, where its tokens are others than the data's.
    """

    saved: Saved | None
    model: ModelConfig
    retokenizer: Retokenizer | None = None


def find(
    field: str,
    path: str,
    step: int,
    *,
    helps: Iterable[str],
    data: DataInfo,
    name: str,
    seq_len: int,
    own_seq_len: int,
    dtype: str,
    quantize: str,
    platform: str,
) -> Helper:
    """The helper that `field` names, for the `helps` that the objective asks for.

    Args:
      name: "teacher" or "scorer".
      seq_len: tokens of the data's rows.
      own_seq_len: of its own rows, where its tokenizer is another one than the data's; 0 chooses.

    Raises a UserError, naming `field`, where there is none, or nothing says which bytes its tokens are, or it cannot
    compute rows of so many tokens.
    """
    if not path:
        raise UserError(
            f"{field} is empty, but the objective asks for help ({', '.join(sorted(helps))}): give a run or a "
            "checkpoint, or set the weights to 0."
        )
    saved = Saved.find(path, step, field)
    retokenizer = None
    if tokenizer := _other_tokenizer(saved, data):
        retokenizer = _retokenizer(saved, data, tokenizer, name, seq_len, own_seq_len)
    elif own_seq_len:
        raise UserError(
            f"teacher.seq_len={own_seq_len}: the model of {field} reads the data's own tokens, in rows of seq_len="
            f"{seq_len}; set it to 0."
        )
    length = retokenizer.seq_len if retokenizer else seq_len
    return Helper(saved, saved.model_for(length, dtype, platform, quantize), retokenizer)


def _other_tokenizer(saved: Saved, data: DataInfo) -> str | None:
    """Where the model's tokenizer is, if its tokens are others than the data's.

    Raises a UserError where it has none, or none that could be found.
    """
    path, known = None, saved.tokenizer_fingerprint
    if known not in (None, data.tokenizer_fingerprint) and (path := saved.tokenizer_path):
        own = tokenizers.load(path)
        if own.fingerprint == known and tokenizers.load(data.tokenizer_path).disagreement(own):
            return str(saved.tokenizer(str(path), saved.field).path)
    saved.check_tokenizer(data)
    return None


def _retokenizer(saved: Saved, data: DataInfo, path: str, name: str, seq_len: int, own_seq_len: int) -> Retokenizer:
    """What makes the rows of a helper with the tokenizer in `path`; says what is measured on the data's first rows."""
    where = f"{saved.field}={saved.path!r}"
    saved.model.check_positions(own_seq_len, "teacher.seq_len", f"the model of {where}")
    for each, remedy in ((data.tokenizer_path, "Prepare the data with the model's."), (path, "Choose another model.")):
        try:
            bytes_of.load(each)
        except UserError as error:
            raise UserError(f"{where} has another tokenizer than the data, but {error} {remedy}") from error
    found = retokenize.measure(_first_rows(data, seq_len), data.tokenizer_path, path)
    if found.same < 0.5:
        raise UserError(
            f"{where}: its tokenizer {path} changes the text: only {found.same:.0%} of the bytes of the data's first "
            "rows lie before or after what it changes, and only these can be helped with. Choose a model whose "
            "tokenizer leaves text as it is."
        )
    length = own_seq_len or -(-found.longest // _MULTIPLE) * _MULTIPLE
    if saved.model.position == "learned":
        length = min(length, saved.model.max_seq_len)
    say(f"{name}: reads the text in its own tokens, {found.ratio:.2f} for each of the data's, in rows of {length}")
    for there, what in (
        (found.longest > length, f"rows have up to {found.longest} of its tokens, and are cut: help ends there"),
        (found.same < 1, f"its tokenizer changes {1 - found.same:.2%} of the text; there is no help in between"),
        (found.unknown, f"the data has {found.unknown} tokens that stand for unknown characters, as U+FFFD to it"),
    ):
        if there:
            say(f"{name}: {what} (of the data's first rows)")
    return Retokenizer(name, data.tokenizer_path, path, length)


def _first_rows(data: DataInfo, seq_len: int) -> list:
    """The first rows of each data set, in stored order."""
    sources = [Windows(directory, "train", seq_len) for directory in data.directories]
    each = -(-_MEASURED_ROWS // len(sources))
    return [source[row] for source in sources for row in range(min(each, len(source)))]


def quantized(config: ConfigDict) -> str:
    """teacher.quantize, checked: what the dense layers of helpers multiply."""
    kind = one_of("teacher.quantize", config.teacher.quantize, QUANTIZED)
    if kind != "none" and not importlib.util.find_spec("qwix"):
        raise UserError(f"teacher.quantize={kind!r} needs qwix: pip install 'lmboost[int8]', or set it to 'none'.")
    return kind


def load(helpers: Mapping[str, Helper], mesh: Mesh, dtype: str, seed: int | None = None) -> dict[str, Any]:
    """The parameters of helpers by their names, in `dtype`, spread over the mesh. One copy if they are one model.

    seed: draws parameters at random, instead of reading them.
    """
    loaded: dict[str, Any] = {}
    for name, helper in sorted(helpers.items()):
        same = [other for other in loaded if helpers[other].saved.directory == helper.saved.directory]
        if same:
            loaded[name] = loaded[same[0]]
            say(f"{name}: the same parameters as the {same[0]}")
            continue
        loaded[name] = helper.saved.load(mesh, dtype) if seed is None else _random(helper.model, mesh, dtype, seed)
        origin = helper.saved.directory if seed is None else "random parameters"
        say(f"{name}: {helper.model.num_params():,} parameters in {dtype}, {origin}")
    return loaded


def _random(model: ModelConfig, mesh: Mesh, dtype: str, seed: int) -> Any:
    params = transformer.init(model, jax.random.key(seed))
    cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))
    return jax.device_put(cast(params), sharding.tree_sharding(params, mesh))
