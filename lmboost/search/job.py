"""The search of a cut: which part of a trained model is the best start of a small one ("Where to Begin").

    WORKDIR/search.json        what is searched: config, parent, data, versions
    WORKDIR/candidates.jsonl   every cut that was evaluated, in order: validation loss, parameters, what it keeps
    WORKDIR/best.png           the best loss so far
    WORKDIR/winner             the best cut as a checkpoint
    WORKDIR/winner.py          the config of its training

The order of candidates depends on the seed and on the losses before, on nothing else: the same command in the same
directory goes on where it stopped, and comes to the same end.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import pprint
import secrets
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lmboost import checkpoint, places, sharding, standalone
from lmboost import config as configs
from lmboost.data import loader, tokenizer
from lmboost.errors import UserError, count
from lmboost.hf.reader import PREFIX
from lmboost.models.model_config import NEUTRAL, ModelConfig
from lmboost.run import lock
from lmboost.search import evolution, fitness, notation, plot
from lmboost.search.log import Log
from lmboost.search.space import Orders, Space
from lmboost.surgery import importance, subnet, view
from lmboost.surgery.subnet import Cut

# Fields of the config that change which candidates come, or their losses; all of `search` does, too.
FIELDS = "seed seq_len init.path init.step data.train data.validation model.vocab_multiple model.dtype".split()

RECIPE = '''\
"""A cut of PARENT: {params:,} parameters, validation loss {loss:.4f} before it is trained.

    python -m lmboost.train --config=winner.py --workdir=DIR
"""

from lmboost import config

PARENT = {parent}
VALUES = {values}


def get_config():
    c = config.base()
    c.update(VALUES)
    return c
'''


@dataclasses.dataclass(frozen=True)
class Parent:
    """The model that is cut, on the mesh in use."""

    saved: checkpoint.Saved
    name: str  # as a config gives it, with an absolute path
    model: ModelConfig  # ready to compute
    params: Any


def search(config: ConfigDict, workdir: str, say: Callable[[str], None] = print) -> tuple[Cut, float]:
    """Runs the search of a config to its end, from wherever the workdir stands; returns (the best cut, its loss)."""
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: expected a local directory.")
    c, out = config.search, pathlib.Path(places.find(workdir))
    count("search.candidates", c.candidates)
    count("search.batch", c.batch)
    spec = config.data.validation or config.data.train
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
        parent = load_parent(config, spec, mesh)
        rows = fitness.read_rows(spec, config.seq_len, c.rows, mesh)
        cuts = Space.from_config(c, parent.model, _orders(c.sort, parent, rows, mesh))
        cuts.sample(np.random.default_rng(config.seed))  # an empty bin is an error before anything is written
        names = ("method", "population", "elites", "mutation", "crossover", "fresh")
        method = evolution.Search(space=cuts, seed=config.seed, **{name: c[name] for name in names})
        hull = view.hull_config(parent.model, largest(cuts))
        evaluate = fitness.Fitness(
            parent.model, parent.params, hull, fitness.put_rows(rows, mesh), c.batch, config.objective.block_tokens
        )
        say(
            f"parent: {parent.model.num_params():,} parameters; cuts of {cuts.low:,} to {cuts.high:,}, each computed "
            f"in {hull.num_params():,}"
        )
        stack.enter_context(contextlib.closing(lock.Lock(workdir)))
        log = Log(out, _about(config, parent, spec), c.batch)
        _run(c.candidates, method, evaluate, cuts, log, say)
        plot.plot(log.path, out / "best.png")
        cut, loss = method.best
        alone = evaluate.alone(cut)
        say(f"the best of {log.written}: {loss:.4f}, as a model of its own {alone:.4f}")
        if abs(alone - loss) > 0.02 * abs(loss):
            raise RuntimeError(f"the cut's loss is {loss} in the hull, but {alone} as a model of its own.")
        _write_winner(out, config, parent, cut, loss)
        say(f"to train it: python -m lmboost.train --config={out / 'winner.py'} --workdir=DIR")
        return cut, loss


def _run(
    candidates: int,
    method: evolution.Search,
    evaluate: fitness.Fitness,
    cuts: Space,
    log: Log,
    say: Callable[[str], None],
) -> None:
    """Generation after generation, until so many candidates have losses or no new cut is left."""
    done = generation = 0
    while done < candidates and (asked := method.ask()[: candidates - done]):
        losses: list[float] = []
        while len(losses) < len(asked):
            part = asked[len(losses) : len(losses) + log.at_once]
            losses += log.replay(done + len(losses), part) or log.write(
                done + len(losses), generation, part, evaluate(part), [cuts.num_params(cut) for cut in part]
            )
        method.tell(asked, losses)
        done, generation = done + len(asked), generation + 1
        cut, loss = method.best
        say(
            f"generation {generation}: {done} candidates, the best {loss:.4f} ({cuts.num_params(cut):,} parameters, "
            f"{len(cut.layers)} layers of width {len(cut.width)})"
        )


def largest(cuts: Space) -> dict[str, int]:
    """The largest choice of each size."""
    names = ("d_model", "num_kv_heads", "group_heads", "head_dim", "mlp_dim")
    return {name: getattr(cuts, name)[-1] for name in names} | {"num_layers": cuts.layers[-1]}


def load_parent(config: ConfigDict, spec: str, mesh: Mesh) -> Parent:
    """The model of `init.path`; a UserError where there is none, or where its tokens are not the data's."""
    if not config.init.path:
        raise UserError("init.path is empty: give the model to cut, a run, a checkpoint or hf:DIR.")
    if not spec:
        raise UserError("data.train is empty: give a directory that lmboost.prepare wrote.")
    saved = checkpoint.Saved.find(config.init.path, config.init.step, "init.path")
    saved.check_tokenizer(loader.info(spec, "validation"))
    model = saved.model_for(config.seq_len, config.model.dtype)
    model = dataclasses.replace(model, vocab_multiple=config.model.vocab_multiple)
    params = saved.load(mesh, model=model)
    path = config.init.path
    name = os.path.abspath(path.removeprefix(PREFIX)) if "://" not in path else path
    return Parent(saved, PREFIX * path.startswith(PREFIX) + name, model, params)


def _orders(sort: str, parent: Parent, rows: Sequence[Any], mesh: Mesh) -> Orders:
    """The orders of a parent's entries that coarse cuts take the first ones of."""
    if sort != "activation":
        return Orders.natural(parent.model)
    return Orders(**importance.measure(parent.model, parent.params, rows, mesh).orders())


def _about(config: ConfigDict, parent: Parent, spec: str) -> dict[str, Any]:
    """What search.json says."""
    fields = {n: x for n, x in configs.flatten(config).items() if n in FIELDS or n.startswith("search.")}
    return {
        "config": fields,
        "parent": {"directory": str(parent.saved.directory), "tokenizer": parent.saved.tokenizer_fingerprint},
        "data": loader.info(spec, "validation").fingerprint,
        "versions": checkpoint.versions(),
    }


def _write_winner(out: pathlib.Path, config: ConfigDict, parent: Parent, cut: Cut, loss: float) -> None:
    """The best cut as a checkpoint with its tokenizer, and the config of its training."""
    child = subnet.child_config(parent.model, cut)
    child = dataclasses.replace(child, **{name: config.model[name] for name in NEUTRAL}).validate()
    params = jax.jit(lambda params: subnet.extract(parent.model, params, cut))(parent.params)
    source = {"parent": parent.name, "cut": notation.to_json(cut), "val_loss": loss}
    data = {"tokenizer": parent.saved.tokenizer_fingerprint}
    manifest = {"model": dataclasses.asdict(child), "data": data, "source": source}
    info = loader.info(config.data.validation or config.data.train, "validation")
    if (out / "winner").exists():  # of an earlier start, or one that had fewer candidates
        old = out / f"winner.{secrets.token_hex(4)}.partial"
        os.rename(out / "winner", old)
        shutil.rmtree(old)
    with standalone.whole(out / "winner") as partial:
        standalone.write_checkpoint(partial, params, manifest, tokenizer.load(info.tokenizer_path))
    with places.whole_file(out / "winner.py") as partial:
        partial.write_text(_recipe(out, config, parent, child, loss))


def _recipe(out: pathlib.Path, config: ConfigDict, parent: Parent, child: ModelConfig, loss: float) -> str:
    """The source of winner.py: the searched config, with the winner as its model and start."""
    c = ConfigDict(config)
    c.model = configs.model(child)
    c.init.update(path=str(out / "winner"), step=-1, kind="copy", layers="", fresh="")
    if c.objective.kd.weight and not c.teacher.path:
        c.teacher.path, c.teacher.step = parent.name, config.init.step
    return RECIPE.format(
        parent=ascii(parent.name),
        params=child.num_params(),
        loss=loss,
        values=_literal(c.to_dict()),
    )


class _Float(float):
    """A float that is written so that it can be read, infinities too."""

    def __repr__(self) -> str:
        return super().__repr__() if math.isfinite(self) else f"float({str(float(self))!r})"


def _literal(tree: dict[str, Any]) -> str:
    """The source of a tree of plain values, in ASCII: whatever its texts are, they are data."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(plain, value))
        return _Float(value) if isinstance(value, float) else value

    source = pprint.pformat(plain(tree), width=110, sort_dicts=False)
    return source.encode("ascii", "backslashreplace").decode()  # what is not ASCII stands in strings alone
