"""The lm-evaluation-harness on a model of lmboost: the only file that imports lm_eval.

Requests are answered in batches of like length, whose shapes come from few buckets. Of a text's hidden states only
those that predict the asked-for continuation are projected to the vocabulary, a block of tokens at a time.

Shape suffixes: B rows, T tokens, C tokens of the longest continuation, D width, V vocabulary rows.
"""

import dataclasses
import functools
import json
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmboost import sharding
from lmboost.data.tokenizer import Tokenizer
from lmboost.errors import UserError, nearest
from lmboost.generate import Generator, Sampling, bucket
from lmboost.models import attention, transformer, vocabulary
from lmboost.models.model_config import ModelConfig
from lmboost.places import brief

# The harness estimates some errors by bootstrap, in processes that it forks: with jax running, these may hang.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
    from tqdm import tqdm
except ImportError as error:
    raise UserError(
        f'tasks need the lm-evaluation-harness, and importing it failed ({error}): pip install "lmboost[eval]".'
    ) from error

_GENERATED = 256  # tokens, where a task does not say; as the harness's own models have it
_BOOTSTRAPS = 1000
_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one option


class Row(NamedTuple):
    """What is asked for: the probability of `targets` after the last of `tokens` that the model reads."""

    tokens: list[int]
    targets: list[int]  # the last one follows the last of `tokens`, the others precede it


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(model: ModelConfig, block_tokens: int, params, rows: Mapping[str, jax.Array]):
    """(log-probability, whether it is the best token) of each target: float32 and bool [B, C].

    rows: tokens [B, T], of which `lengths` [B, 1] count; targets [B, C] and the places [B, C] of the tokens that
    predict them. Of equal logits the first is the best.
    """
    tokens_BxT, lengths_Bx1 = rows["tokens"], rows["lengths"]
    places_1xT = jnp.arange(tokens_BxT.shape[1])[None]
    segment_ids_BxT = (places_1xT < lengths_Bx1).astype(jnp.int32)
    positions_BxT = jnp.clip(places_1xT, 0, jnp.maximum(lengths_Bx1 - 1, 0))
    h_BxTxD, _ = transformer.apply(model, params, tokens_BxT, segment_ids_BxT, positions_BxT)
    h_BxCxD = jnp.take_along_axis(h_BxTxD, rows["places"][..., None], axis=1)
    h_BxCxD = sharding.constrain(h_BxCxD, ("batch", "length", "act_embed"))

    def one_block(_, logits, h, labels):
        label_logits = vocabulary.pick(logits, labels)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        labels, least = labels[..., None], label_logits[..., None]
        better = (logits > least) | ((logits == least) & (ids < labels))
        return None, (label_logits - jax.nn.logsumexp(logits, axis=-1), ~jnp.any(better, axis=-1))

    head = vocabulary.Head.of(model, params).laid_out(h_BxCxD.dtype)
    _, found = vocabulary.over_blocks(one_block, head, h_BxCxD, rows["targets"], block_tokens)
    return tuple(sharding.constrain(x, (None, None)) for x in found)


class LanguageModel(TemplateLM):
    """A model of lmboost as the harness asks for it.

    Args:
      model, params, mesh: the parameters lie on `mesh`, which is in use (`jax.set_mesh`) during an evaluation.
      tokenizer: begins texts with bos where its makers do, as the harness's `hf` model does.
      batch_size: rows at a time, rounded up to what the mesh divides.
      max_length: tokens that the model reads at most; 0 is the model's max_seq_len.
      block_tokens: tokens, per device, projected to the vocabulary at a time.
      progress: whether to show a bar on the console.

    `params` may be replaced between evaluations. In a run of several processes each one gives every answer.
    """

    def __init__(
        self,
        model: ModelConfig,
        params,
        mesh: Mesh,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        max_length: int = 0,
        block_tokens: int = 1024,
        progress: bool = False,
    ):
        super().__init__()
        self.params = params
        self._model, self._mesh = model, mesh
        self._coder, self._block_tokens = tokenizer, block_tokens
        self._progress = progress and jax.process_index() == 0
        self._rows = -(-batch_size // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
        self.max_length = max_length or model.max_seq_len
        model.check_positions(self.max_length, "--max_length")
        first = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
        if not first:
            raise UserError(f"the tokenizer in {tokenizer.path} has neither a begin nor an end token; tasks need one.")
        self._prefix = first[0]
        self._prefix_piece = tokenizer.pieces()[self._prefix]

    @property
    def eot_token_id(self) -> int:
        return self._prefix if self._coder.eos_id is None else self._coder.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self._coder.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Tokens of `string`; a begin token that the string spells out is that token."""
        if add_special_tokens is None and self._prefix_piece and string.startswith(self._prefix_piece):
            return [self._prefix, *self._coder.encode(string[len(self._prefix_piece) :]).tolist()]
        first = [self._coder.bos_id] if self._coder.adds_bos and add_special_tokens is not False else []
        return first + self._coder.encode(string).tolist()

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; the begin and the end of a document are no text."""
        return self._coder.decode([t for t in tokens if t not in (self._coder.bos_id, self._coder.eos_id)])

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # a bar for the tokenizer alone

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        answers = self._score_rows([self._row(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        rows, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self._prefix, self.max_length, context_len=1)
            for context, predicted in map(make_disjoint_window, windows):
                rows.append(self._row(context, predicted))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._score_rows(rows), strict=True):
            sums[i] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        stops = self._coder.special.stop_ids
        generator = Generator(self._model, self.params, self._mesh, self._coder.vocab_size, stops, self._rows)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=not self._progress) as bar:
            for group in alike.values():
                max_tokens, until, sampling = _generation(requests[group[0]].args[1])
                prompts = {i: self._prompt(requests[i].args[0], max_tokens) for i in group}
                group.sort(key=lambda i, prompts=prompts: -len(prompts[i]))
                for part in (group[start : start + self._rows] for start in range(0, len(group), self._rows)):
                    ended = functools.partial(self._ended, until)
                    made = generator([prompts[i] for i in part], max_tokens, sampling, rows=part, ended=ended)
                    for i, tokens in zip(part, made, strict=True):
                        texts[i] = functools.reduce(lambda t, stop: t.split(stop)[0], until, self.tok_decode(tokens))
                        self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(len(part))
        return texts

    def _prompt(self, text: str, max_tokens: int) -> list[int]:
        """The end of a prompt that leaves room for `max_tokens` more."""
        room = self.max_length - max_tokens
        if room < 1:
            raise UserError(
                f"a task generates up to {max_tokens} tokens, but the model reads at most {self.max_length}: "
                "lower max_gen_toks in the task's generation_kwargs, or raise --max_length."
            )
        return (self.tok_encode(text) or [self._prefix])[-room:]

    def _ended(self, until: Sequence[str], tokens: list[int]) -> bool:
        text = self.tok_decode(tokens) if until else ""
        return any(stop in text for stop in until)

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        """The end of the two that the model can read."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a task asks for the probability of {len(continuation)} tokens, but the model reads at most "
                f"{self.max_length}: leave the task out, or raise --max_length."
            )
        return Row((context + continuation)[-self.max_length - 1 : -1], continuation)

    def _score_rows(self, rows: list[Row]) -> list[tuple[float, bool]]:
        """(log-probability, is it the greedy choice) of each row's targets.

        The model reads equal tokens once, such as a question whose answers are of one token. Batches are sorted by
        length, and fetched while the next one is computed.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault(tuple(row.tokens), []).append(i)
        groups = sorted(alike.values(), key=lambda group: -len(rows[group[0]].tokens))
        answers, pending = [(0.0, True)] * len(rows), None
        with tqdm(total=len(rows), desc="scoring", disable=not self._progress) as bar:
            for start in (*range(0, len(groups), self._rows), None):
                part = None if start is None else groups[start : start + self._rows]
                dispatched = part and (part, self._score_batch([[rows[i] for i in group] for group in part]))
                if pending:
                    bar.update(self._take(*pending, rows, answers))
                pending = dispatched
        return answers

    def _take(self, groups: list[list[int]], scores, rows: list[Row], answers: list[tuple[float, bool]]) -> int:
        """Fetches the scores of a batch into `answers`; returns how many those are."""
        for group, logprobs, best in zip(groups, *(np.asarray(x)[: len(groups)] for x in scores), strict=True):
            start = 0
            for i in group:
                part = slice(start, start + len(rows[i].targets))
                answers[i] = (float(logprobs[part].sum(dtype=np.float64)), bool(best[part].all()))
                start = part.stop
        return sum(map(len, groups))

    def _score_batch(self, groups: list[list[Row]]):
        length = bucket(max(len(group[0].tokens) for group in groups))
        columns = 8
        while columns < max(sum(len(row.targets) for row in group) for group in groups):
            columns *= 4
        widths = {"tokens": length, "lengths": 1, "targets": columns, "places": columns}
        arrays = {name: np.zeros((self._rows, width), np.int32) for name, width in widths.items()}
        for i, group in enumerate(groups):
            tokens, targets = group[0].tokens, [t for row in group for t in row.targets]
            places = [p for row in group for p in range(len(tokens) - len(row.targets), len(tokens))]
            arrays["tokens"][i, : len(tokens)], arrays["lengths"][i] = tokens, len(tokens)
            arrays["targets"][i, : len(targets)], arrays["places"][i, : len(places)] = targets, places
        m = self._model
        backend, soft = jax.default_backend(), bool(m.attn_softcap)
        kernel = attention.resolve("auto", backend, length, m.head_dims, m.dtype, softcap=soft)
        model = dataclasses.replace(m, attention=kernel, remat="none")
        return _score(model, self._block_tokens, self.params, sharding.put_rows(arrays, self._mesh))


def _generation(options: Mapping[str, Any]) -> tuple[int, list[str], Sampling]:
    """(most tokens, strings that end the text, how tokens are drawn) of a task's generation_kwargs."""
    until = options.get("until") or []
    until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    max_tokens = next((options[name] for name in _TOKENS if options.get(name) is not None), _GENERATED)
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") and "temperature" not in options:
        temperature = 1.0
    if options.get("do_sample") is False or temperature == 0.0:
        return int(max_tokens), until, Sampling()
    top_k, top_p = options.get("top_k") or 0, options.get("top_p")
    return int(max_tokens), until, Sampling(temperature, int(top_k), 1.0 if top_p is None else float(top_p))


def names_of(tasks: str) -> tuple[str, ...]:
    """The task names in "a,b"."""
    return tuple(name for name in (part.strip() for part in tasks.split(",")) if name)


def find_tasks(names: tuple[str, ...], include: str = "", field: str = "--tasks") -> TaskManager:
    """The manager that knows all of `names`; they may be groups, tags or patterns.

    Args:
      include: a directory with tasks of one's own (YAML). The harness's many files are read only if these are not
        enough.
      field: how the user gave the names.

    Raises a UserError on a name that is not known, with the nearest one.
    """
    include = os.path.expanduser(include)
    if include and not os.path.isdir(include):
        raise UserError(f"the tasks of {field} should be in {include!r}, and there is no such directory.")
    if not names:
        raise UserError(f"{field} names no task: expected names with commas between them.")
    for own in (True, False) if include else (False,):
        manager = _manager(include, own)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise UserError(
        f"{field}: there is no task {unknown[0]!r}{nearest(unknown[0], manager.all_tasks)}. "
        "`lm_eval ls tasks` lists those of the harness; tasks of your own come from a directory of YAML files."
    )


@functools.cache
def _manager(include: str, own: bool) -> TaskManager:
    """Knows the tasks in `include`, and unless only these are wanted, the harness's, which takes a while to read."""
    return TaskManager(include_path=os.path.expanduser(include) or None, include_defaults=not own)


def run_tasks(
    lm: LanguageModel,
    names: Sequence[str],
    include: str = "",
    num_fewshot: int | None = None,
    limit: float | None = None,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns, without its samples."""
    manager = find_tasks(tuple(names), include)
    return lm_eval.simple_evaluate(
        lm, tasks=manager.match_tasks(list(names)), task_manager=manager, num_fewshot=num_fewshot, limit=limit,
        log_samples=False, bootstrap_iters=_BOOTSTRAPS,
    )  # fmt: skip


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """{"task/NAME/METRIC": value}; a filter other than "none" stays in the metric's name."""
    found = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric = name.removesuffix(",none")
            if "," in name and "_stderr" not in name and isinstance(value, numbers.Real):
                found[f"task/{task}/{metric}"] = float(value)
    return found


def table(results: Mapping[str, Any]) -> str:
    """The harness's table of results, and of groups where there are some."""
    groups = [make_table(results, "groups")] if results.get("groups") else []
    return "\n\n".join([make_table(results), *groups])


def in_training(lm: LanguageModel, names: Sequence[str], include: str = "") -> Callable[[Any], dict[str, float]]:
    """A function from parameters to `metrics`. The tasks' data is read once now: what is missing ends no long run."""
    manager = find_tasks(tuple(names), include, "eval.tasks")
    try:
        getattr(manager, "load", manager.load_task_or_group)(manager.match_tasks(list(names)))
    except Exception as error:  # of the network, the hub, a YAML file, a data set's own code
        raise UserError(
            f"eval.tasks={','.join(names)!r}: the data can't be read ({brief(error)}). Read it once "
            "on a machine with a network, or leave the task out."
        ) from error

    def evaluate(params) -> dict[str, float]:
        lm.params = params
        found = metrics(run_tasks(lm, names, include))
        lm.params = None  # the next step may take their memory
        return found

    return evaluate
