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
from lmboost.data.loader import DataInfo
from lmboost.errors import UserError, one_of
from lmboost.models import transformer
from lmboost.models.model_config import QUANTIZED, ModelConfig
from lmboost.run.processes import say


@dataclasses.dataclass(frozen=True)
class Helper:
    """A model that helps.

    Attributes:
      saved: where it is; None where steps are compiled that nobody runs.
      model: what it is, ready to compute.
    """

    saved: Saved | None
    model: ModelConfig


def find(
    field: str,
    path: str,
    step: int,
    *,
    helps: Iterable[str],
    data: DataInfo,
    seq_len: int,
    dtype: str,
    quantize: str,
    platform: str,
) -> Helper:
    """The helper that `field` names, for the `helps` that the objective asks for.

    Raises a UserError, naming `field`, where there is none, or its tokens are not the data's, or it cannot compute rows
    of `seq_len` tokens.
    """
    if not path:
        raise UserError(
            f"{field} is empty, but the objective asks for help ({', '.join(sorted(helps))}): give a run or a "
            "checkpoint, or set the weights to 0."
        )
    saved = Saved.find(path, step, field)
    model = saved.model_for(seq_len, dtype, platform, quantize)
    saved.check_tokenizer(data)
    return Helper(saved, model)


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
