"""Layers of several kinds in one model: which layer is of which, and how they are scanned.

A kind says what a layer's queries see and how they know where: all earlier tokens or a window of them, with rotary
positions or without. Kinds change no parameter, so layers of all kinds lie in one stack. What is traced and compiled is
one period of a pattern (a layer with a window and a full one in Gemma 2, five and one in Gemma 3), which is scanned:
a kernel's window is a constant of its program, so that one layer's body can't stand for all kinds of them.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lmboost.errors import UserError, one_of


class Kind(NamedTuple):
    """What the layers of a kind have."""

    windowed: bool  # queries see the model's `sliding_window`, and turn by its `rope_local_theta` if it has one
    positions: bool


KINDS = {"full": Kind(False, True), "window": Kind(True, True), "nope": Kind(False, False)}
MAX_PERIOD = 8  # layers of a body: beyond it (Gemma 3 has 6) compiling takes longer than such a pattern is worth


def parse(text: str, num_layers: int, field: str = "model.layer_kinds") -> tuple[str, ...]:
    """The kind of each layer by a pattern, "5*window,full", that is repeated, and cut off behind the last layer.

    Raises a UserError where a word is no kind.
    """
    pattern: list[str] = []
    for word in text.split(","):
        match = re.fullmatch(r"(?:([1-9]\d{0,4})\*)?(\w+)", word.strip())
        if not match:
            raise UserError(
                f"{field}={text[:200]!r}: {word.strip()[:80]!r} is not of the form COUNT*KIND; as in '5*window,full', "
                f"of the kinds {', '.join(KINDS)}."
            )
        count = min(int(match[1] or 1), num_layers - len(pattern))
        pattern += [one_of(field, match[2], KINDS)] * count
    return tuple(itertools.islice(itertools.cycle(pattern), num_layers))


def write(kinds: Sequence[str]) -> str:
    """The shortest pattern that `parse` reads as these kinds."""
    period = next(n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))
    runs = [(len(list(run)), kind) for kind, run in itertools.groupby(kinds[:period])]
    return ",".join((f"{count}*" if count > 1 else "") + kind for count, kind in runs)


def periods(kinds: Sequence[str]) -> list[tuple[tuple[str, ...], int]]:
    """Layers of these kinds as (kinds of a period, how often it is repeated), from the first to the last.

    Each is the period that covers the most of the layers to come, of those that cover as many the shortest.
    """
    found, start = [], 0
    while start < len(kinds):
        left = kinds[start:]

        def times(length, left=left) -> int:
            same = itertools.takewhile(lambda i: left[i] == left[i % length], range(len(left)))
            return sum(1 for _ in same) // length

        longest = range(1, min(MAX_PERIOD, len(left)) + 1)
        # A period that is not repeated saves nothing over its layers one by one.
        length = max(longest, key=lambda n: (times(n) * n if times(n) > 1 or n == 1 else 0, -n))
        found.append((tuple(left[:length]), times(length)))
        start += length * found[-1][1]
    return found


def scan(step_of: Callable[[str], Callable], carry: Any, kinds: Sequence[str], layers: jax.Array, stack: Any):
    """`carry, out = step_of(kind)(carry, (layer, params))` for each layer, one after the other.

    Args:
      kinds: of the layers.
      layers: their numbers, int32 [L].
      stack: their parameters, stacked [L, ...].

    Returns: the last carry, and what was given out, stacked [L, ...].
    """
    outs, start = [], 0
    for period, times in periods(kinds):
        stop = start + len(period) * times
        xs = layers, stack
        if stop - start < len(kinds):
            xs = jax.tree.map(lambda a, i=start, j=stop: a[i:j], xs)
        if len(period) == 1:
            carry, out = jax.lax.scan(step_of(period[0]), carry, xs)
        else:
            carry, out = _scan_periods([step_of(kind) for kind in period], carry, xs, times)
        outs.append(out)
        start = stop
    return carry, outs[0] if len(outs) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def _scan_periods(steps: Sequence[Callable], carry: Any, xs: Any, times: int):
    """A scan whose body is one step after the other."""
    length = len(steps)

    def body(carry, period):
        # Split, not indexed: so the gradients of a period's layers are put together once, and not added up.
        parts = jax.tree.map(lambda a: jax.lax.split(a, [1] * length), period)
        outs = []
        for place, step in enumerate(steps):
            one = jax.tree.map(lambda _, split, i=place: split[i][0], period, parts)
            carry, out = step(carry, one)
            outs.append(out)
        return carry, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *outs)

    carry, outs = jax.lax.scan(body, carry, jax.tree.map(lambda a: a.reshape(times, length, *a.shape[1:]), xs))
    return carry, jax.tree.map(lambda a: a.reshape(times * length, *a.shape[2:]), outs)
