"""PyTorch with the Llama of transformers and fused AdamW; run in an environment that has both, by the conductor."""

import os
import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.shapes import BETAS, DECAY, EPSILON, KD_WEIGHT, LEARNING_RATE, Shape, Sizes, serve


def model(sizes: Sizes, shape: Shape) -> torch.nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab, hidden_size=sizes.width, intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads,
            max_position_embeddings=shape.tokens,
            tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
        )
    )  # fmt: skip


def build(shape: Shape, kd: bool, threads: int) -> Callable[[int], float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    student, teacher = model(shape.student, shape), model(shape.teacher, shape).eval()
    optimizer = torch.optim.AdamW(
        student.parameters(), LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY, fused=True
    )
    tokens = torch.randint(0, shape.vocab, (shape.rows, shape.tokens + 1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)

    def loss_of() -> torch.Tensor:
        logits = student(inputs).logits.reshape(-1, shape.vocab)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        if not kd:
            return loss
        with torch.no_grad():
            probabilities = teacher(inputs).logits.reshape(-1, shape.vocab).softmax(-1)
        divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), probabilities, reduction="batchmean")
        return (1 - KD_WEIGHT) * loss + KD_WEIGHT * divergence

    loss_of = torch.compile(loss_of) if os.environ.get("COMPILED") == "1" else loss_of

    def steps(n: int) -> float:
        for _ in range(n):
            loss = loss_of()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return steps


if __name__ == "__main__":
    serve(build)
