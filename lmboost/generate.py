"""Text from a trained model.

    python -m lmboost.generate --checkpoint=RUN_OR_CHECKPOINT_OR_hf:DIR --prompt="def fibonacci" --max_tokens=64

Prompts of a batch are padded on the left, so that all rows write their next token to the same slot of the cache. Two
programs do the work: one reads the prompts, one makes tokens in a loop on the device. Both are compiled per size of
batch and per bucket of lengths, not per request.

Shape suffixes: B rows, P slots of the prompts, N slots for new tokens, S = P + N, V vocabulary rows.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lmboost import sharding
from lmboost.checkpoint import Saved
from lmboost.data import tokenizer as tokenizers
from lmboost.errors import UserError, count, one_of, run_flags
from lmboost.models import attention, transformer, vocabulary
from lmboost.models.model_config import DTYPES, ModelConfig

_LOOK_EVERY = 32  # tokens between two looks at the text, where text decides when to stop


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from the logits over `temperature`, cut to the best k, then to the nucleus of p."""

    temperature: float = 0.0  # 0 takes the best token; of several equal ones the first
    top_k: int = 0  # 0 is all
    top_p: float = 1.0  # the fewest tokens that hold this probability, among the best k

    def validate(self, field: str = "--") -> "Sampling":
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"{field}temperature={self.temperature} must be at least 0; 0 takes the best token.")
        if self.top_k < 0:
            raise UserError(f"{field}top_k={self.top_k} must be at least 0; 0 is all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"{field}top_p={self.top_p} must be above 0 and at most 1; 1 is all tokens.")
        return self


def sample(logits_BxV: jax.Array, keys_Bx2: jax.Array, sampling: Sampling) -> jax.Array:
    """A token for each row, int32 [B], from float32 logits; keys are threefry key data, uint32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    keys_B = jax.random.wrap_key_data(keys_Bx2, impl="threefry2x32")
    logits, vocab = logits_BxV / sampling.temperature, logits_BxV.shape[-1]
    ids = None
    if sampling.top_k or sampling.top_p < 1:
        logits, ids = jax.lax.top_k(logits, min(sampling.top_k or vocab, vocab))
        p = jax.nn.softmax(logits)
        logits = jnp.where(jnp.cumsum(p, axis=-1) - p < sampling.top_p, logits, vocabulary.NEGATIVE)
    choice_B = jax.vmap(jax.random.categorical)(keys_B, logits)
    return choice_B.astype(jnp.int32) if ids is None else jnp.take_along_axis(ids, choice_B[:, None], axis=1)[:, 0]


class Program(NamedTuple):
    """What the compiled programs are made for."""

    model: ModelConfig
    sampling: Sampling
    vocab_size: int  # tokens from here on are never made
    stop_ids: tuple[int, ...]  # a row ends with the first of these


class State(NamedTuple):
    """Between two tokens. What `tokens_BxN` holds after a row's end is -1."""

    cache: attention.Cache
    segment_ids_BxS: jax.Array  # 0 padding, 1 text
    lengths_Bx1: jax.Array  # of the prompts
    keys_Bx2: jax.Array
    tokens_BxN: jax.Array
    done_Bx1: jax.Array
    count: jax.Array  # tokens made so far


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(program: Program, new: int, params, prompts: Mapping[str, jax.Array], seed) -> State:
    """Reads the prompts and makes the first token; room for `new` of them."""
    tokens_BxP, lengths_Bx1 = prompts["tokens"], prompts["lengths"]
    rows, slots = tokens_BxP.shape
    places_BxS = jnp.arange(slots + new)[None] - (slots - lengths_Bx1)  # 0 at the first token of the prompt
    segment_ids_BxS = (places_BxS >= 0).astype(jnp.int32)
    cache = transformer.init_cache(program.model, rows, slots + new)
    h_BxPxD, cache = transformer.apply_cached(
        program.model, params, tokens_BxP, segment_ids_BxS, jnp.maximum(places_BxS[:, :slots], 0), cache
    )
    key = jax.random.key(seed, impl="threefry2x32")
    keys_Bx2 = jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(prompts["rows"][:, 0])
    empty_BxN = jnp.full((rows, new), -1, jnp.int32)
    state = State(cache, segment_ids_BxS, lengths_Bx1, keys_Bx2, empty_BxN, lengths_Bx1 == 0, jnp.int32(0))
    return _pinned(_append(program, params, state, h_BxPxD[:, -1]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(program: Program, params, state: State, until, ended_Bx1) -> State:
    """Makes tokens until each row has ended or there are `until` of them; rows in `ended_Bx1` make none."""

    def step(state: State) -> State:
        last_Bx1 = jax.lax.dynamic_slice_in_dim(state.tokens_BxN, state.count - 1, 1, axis=1)
        positions_Bx1 = state.lengths_Bx1 + state.count - 1
        h_Bx1xD, cache = transformer.apply_cached(
            program.model, params, jnp.maximum(last_Bx1, 0), state.segment_ids_BxS, positions_Bx1, state.cache
        )
        return _append(program, params, state._replace(cache=cache), h_Bx1xD[:, 0])

    state = state._replace(done_Bx1=state.done_Bx1 | ended_Bx1)
    return _pinned(jax.lax.while_loop(lambda s: (s.count < until) & ~jnp.all(s.done_Bx1), step, state))


def _append(program: Program, params, state: State, h_BxD) -> State:
    """The state with one more token, drawn from the last hidden state."""
    head = vocabulary.Head.of(program.model, params)._replace(vocab_size=program.vocab_size)
    logits_BxV = vocabulary.project(h_BxD, head)
    logits_BxV = sharding.constrain(logits_BxV, ("batch", None))

    def draw(logits_BxV, keys_Bx2):
        keys_B = jax.random.wrap_key_data(keys_Bx2, impl="threefry2x32")
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.count))(keys_B)
        return sample(logits_BxV, jax.random.key_data(keys_B), program.sampling)[:, None]

    rows = ("batch", None)
    token_Bx1 = sharding.per_device(draw, (rows, rows), rows)(logits_BxV, state.keys_Bx2)
    token_Bx1 = jnp.where(state.done_Bx1, -1, token_Bx1)
    return state._replace(
        tokens_BxN=jax.lax.dynamic_update_slice_in_dim(state.tokens_BxN, token_Bx1, state.count, axis=1),
        done_Bx1=state.done_Bx1 | jnp.isin(token_Bx1, jnp.array(program.stop_ids, jnp.int32)),
        count=state.count + 1,
    )


def _pinned(state: State) -> State:
    """Leaves no layout to the compiler, so that one program's result is not another program's input of a new kind.

    Tokens are copied to every device: each host reads all of them.
    """
    rows, slots = ("batch", None), (None, "batch", None, "kv_heads", None)
    layouts = dict.fromkeys(("segment_ids_BxS", "lengths_Bx1", "keys_Bx2", "tokens_BxN", "done_Bx1"), rows)
    layouts["tokens_BxN"] = (None, None)
    cache = {name: sharding.constrain(getattr(state.cache, name), slots) for name in state.cache._fields[:2]}
    pinned = {name: sharding.constrain(getattr(state, name), axes) for name, axes in layouts.items()}
    return state._replace(cache=state.cache._replace(**cache), **pinned)


def bucket(length: int, smallest: int = 32) -> int:
    """The next of 32, 64, 96, 128, 192, 256, 384, ...: few sizes, at most half of one in vain."""
    size = smallest
    while size < length:
        size *= 2
    return size * 3 // 4 if size > 2 * smallest and length <= size * 3 // 4 else size


class Generator:
    """Continues sequences of tokens with one model.

    Args:
      model, params, mesh: the parameters lie on `mesh`, which is in use (`jax.set_mesh`) when this is called.
      vocab_size: tokens from here on are never made; 0 is the model's own.
      stop_ids: tokens that end a row.
      batch_size: rows at a time, rounded up to what the mesh divides.
    """

    def __init__(
        self, model: ModelConfig, params, mesh: Mesh, vocab_size: int = 0, stop_ids: Sequence[int] = (), batch_size=16
    ):
        count("batch_size", batch_size)
        self._model = dataclasses.replace(model, attention="xla", remat="none")
        self._params, self._mesh = params, mesh
        self._stop_ids = tuple(stop_ids)
        self._vocab_size = min(vocab_size or model.vocab_size, model.vocab_size)
        self._rows = -(-batch_size // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        ended: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, without the stop token.

        What is drawn depends on the seed, the prompt and its number in `rows` (default: its place in `prompts`), and
        not on which other prompts there are. `ended` says of the tokens so far whether a row may end; it is asked
        every few tokens.
        """
        sampling = (sampling or Sampling()).validate()
        self._check(prompts, max_tokens, seed)
        program = Program(self._model, sampling, self._vocab_size, self._stop_ids)
        rows = range(len(prompts)) if rows is None else rows
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self._rows):
            part = order[start : start + self._rows]
            made = self._batch(program, [prompts[i] for i in part], [rows[i] for i in part], max_tokens, seed, ended)
            for i, tokens in zip(part, made, strict=True):
                out[i] = tokens
        return out

    def _batch(self, program, prompts, rows, max_tokens, seed, ended) -> list[list[int]]:
        slots, left = bucket(max(map(len, prompts))), self._rows - len(prompts)
        padded = [[0] * (slots - len(prompt)) + list(prompt) for prompt in prompts] + [[0] * slots] * left
        columns = {"lengths": [len(p) for p in prompts] + [0] * left, "rows": [*rows] + [0] * left}
        arrays = {"tokens": np.array(padded, np.int32)}
        arrays |= {name: np.array(values, np.int32)[:, None] for name, values in columns.items()}
        arrays = sharding.put_rows(arrays, self._mesh)
        state = _prefill(program, bucket(max_tokens), self._params, arrays, np.uint32(seed))
        over, count = np.zeros((self._rows, 1), bool), 1
        while True:
            until = max_tokens if ended is None else min(count + _LOOK_EVERY, max_tokens)
            if until > count:
                over_Bx1 = sharding.put_rows({"over": over}, self._mesh)["over"]
                state = _decode(program, self._params, state, np.int32(until), over_Bx1)
            made = [self._cut(row) for row in np.asarray(state.tokens_BxN)[: len(prompts)]]
            over[: len(prompts), 0] = [done or (ended is not None and ended(tokens)) for tokens, done in made]
            if until == max_tokens or over[: len(prompts)].all():
                return [tokens for tokens, _ in made]
            count = until

    def _cut(self, row: np.ndarray) -> tuple[list[int], bool]:
        """(tokens up to the stop token, whether there was one)."""
        tokens = row[row >= 0].tolist()
        stopped = bool(tokens) and tokens[-1] in self._stop_ids
        return tokens[:-1] if stopped else tokens, stopped

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int, seed: int) -> None:
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens} must be at least 1.")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed} must be at least 0 and below 2**32.")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {i} has no tokens: give at least one, such as the begin of a document.")
            if max(prompt) >= self._model.vocab_size or min(prompt) < 0:
                raise UserError(
                    f"prompt {i} has token {max(prompt)}, but the model's vocabulary ends at "
                    f"{self._model.vocab_size - 1}: use the tokenizer that the model was trained with."
                )
            if self._model.position == "learned" and len(prompt) + max_tokens > self._model.max_seq_len:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens, and max_tokens={max_tokens} more are asked for, but the "
                    f"model has {self._model.max_seq_len} learned positions: shorten the prompt or lower max_tokens."
                )


def encode_prompt(text: str, tokenizer: tokenizers.Tokenizer, bos: str = "auto") -> list[int]:
    """A prompt's tokens. bos: before the text "always", "never", or if the tokenizer's makers put it there ("auto").

    An empty prompt is the begin of a document, and is a UserError where the tokenizer has no token for that.
    """
    first = bos == "always" or (bos == "auto" and (tokenizer.adds_bos or not text))
    if first and tokenizer.bos_id is None:
        raise UserError(
            f"--prompt={text!r} needs the token that begins a document, and {tokenizer.path} has none: give a prompt "
            "with text, and not --bos=always."
        )
    ids = [tokenizer.bos_id] * first + tokenizer.encode(text).tolist()
    if not ids:
        raise UserError(f"--prompt={text!r} has no tokens: give a prompt with text, or not --bos=never.")
    return ids


def generate(
    checkpoint: str,
    prompts: Sequence[str],
    max_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    tokenizer: str = "",
    step: int = -1,
    batch_size: int = 16,
    bos: str = "auto",
    dtype: str = "",
    fsdp: int = 1,
    tensor: int = 1,
) -> list[str]:
    """Each prompt with its continuation, which ends before the token that ends a document.

    The arguments are the flags of the verb, which say what they are.
    """
    saved = Saved.find(checkpoint, step)
    model = saved.model_for(dtype=dtype and one_of("--dtype", dtype, DTYPES))
    coder = saved.tokenizer(tokenizer)
    ids = [encode_prompt(prompt, coder, bos) for prompt in prompts]
    mesh = sharding.make_mesh(-1, fsdp, tensor)
    with jax.set_mesh(mesh):
        generator = Generator(
            model, saved.load(mesh, model.dtype), mesh, coder.vocab_size, coder.special.stop_ids, batch_size
        )
        made = generator(ids, max_tokens, Sampling(temperature, top_k, top_p), seed)
    # A piece may read differently at the beginning of a text: the prompt's tokens are decoded along.
    return [
        prompt + coder.decode(before + after)[len(coder.decode(before)) :]
        for prompt, before, after in zip(prompts, ids, made, strict=True)
    ]


def _read_prompts(path: str) -> list[str]:
    """The lines of a file. Only a line feed ends one, with a carriage return before it or not; the last may lack it."""
    try:
        text = pathlib.Path(os.path.expanduser(path)).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path!r} can't be read: {error}.") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def _print(prompt: Sequence[str], prompts: str, **flags) -> None:
    """The verb: prints each prompt, those of the file `prompts` last, with its continuation."""
    texts = [*prompt, *(_read_prompts(prompts) if prompts else ())]
    if not texts:
        raise UserError("--prompt is missing: give a prompt, or a file of prompts with --prompts.")
    print(f"\n{'-' * 40}\n".join(generate(prompts=texts, **flags)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run, one of its checkpoints, or hf:DIR")
    parser.add_argument("--step", type=int, default=-1, help="of a run: which checkpoint; -1 is the last")
    parser.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    parser.add_argument("--prompts", default="", help="a file with one prompt in each line")
    parser.add_argument("--max_tokens", type=int, default=64, help="new tokens of each prompt, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the best k tokens; 0 is all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the fewest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts")
    parser.add_argument("--tokenizer", default="", help="empty: the model's own, beside it or in its data")
    when = ("auto", "always", "never")
    parser.add_argument("--bos", default="auto", choices=when, help="begin token before a prompt")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    parser.add_argument("--dtype", default="", help="of compute; empty is the model's own")
    parser.add_argument("--fsdp", type=int, default=1, help="devices over which parameters are spread")
    parser.add_argument("--tensor", type=int, default=1, help="devices over which heads and vocabulary are spread")
    run_flags(_print, parser, prints=True)


if __name__ == "__main__":
    main()
