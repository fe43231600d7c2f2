"""The floor: a step as one writes it by hand in JAX, in one file, with a dense loss and nothing beside."""

import functools
import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import optax

from benchmarks.peers.shapes import BETAS, DECAY, EPSILON, KD_WEIGHT, LEARNING_RATE, Shape, Sizes, serve


def parameters(key: jax.Array, sizes: Sizes, vocab: int) -> dict:
    layers, width, _, mlp = sizes
    shapes = {
        "embed": (vocab, width), "head": (width, vocab), "q": (layers, width, width), "k": (layers, width, width),
        "v": (layers, width, width), "o": (layers, width, width), "up": (layers, width, mlp),
        "gate": (layers, width, mlp), "down": (layers, mlp, width),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    drawn = {name: 0.02 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return drawn | {"norms": jnp.ones((layers, 2, width)), "last": jnp.ones(width)}


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def rotate(x):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits_of(params: dict, tokens, heads: int):
    def layer(x, p):
        y = norm(x, p["norms"][0])
        q, k, v = (jnp.reshape(y @ p[name], (*y.shape[:2], heads, -1)) for name in "qkv")
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + y.reshape(x.shape) @ p["o"]
        y = norm(x, p["norms"][1])
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

    stacks = {name: x for name, x in params.items() if name not in ("embed", "head", "last")}
    x, _ = jax.lax.scan(layer, params["embed"][tokens], stacks)
    return norm(x, params["last"]) @ params["head"]


def build(shape: Shape, kd: bool, threads: int) -> Callable[[int], float]:
    del threads  # jax takes the cores that the process is given
    keys = jax.random.split(jax.random.key(0), 3)
    params = parameters(keys[0], shape.student, shape.vocab)
    teacher = parameters(keys[1], shape.teacher, shape.vocab)
    tokens = jax.random.randint(keys[2], (shape.rows, shape.tokens + 1), 0, shape.vocab)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, *BETAS, eps=EPSILON, weight_decay=DECAY)
    )

    def loss_of(params, teacher, tokens):
        log_p = jax.nn.log_softmax(logits_of(params, tokens[:, :-1], shape.student.heads))
        loss = -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], -1))
        if not kd:
            return loss
        log_q = jax.nn.log_softmax(logits_of(teacher, tokens[:, :-1], shape.teacher.heads))
        divergence = jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), -1))
        return (1 - KD_WEIGHT) * loss + KD_WEIGHT * divergence

    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state, teacher, tokens):
        params, moments = state
        loss, gradient = jax.value_and_grad(loss_of)(params, teacher, tokens)
        updates, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    state = params, tx.init(params)

    def steps(n: int) -> float:
        nonlocal state
        for _ in range(n):
            state, loss = step(state, teacher, tokens)
        return float(loss)

    return steps


if __name__ == "__main__":
    serve(build)
