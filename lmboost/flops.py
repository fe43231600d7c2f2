"""FLOPs of a model, of a training step with its helpers, and the peak of a device.

Model FLOPs: what the mathematics asks for. Rematerialised activations and padded vocabulary rows are not
counted, so a utilisation computed from them is MFU in the sense of PaLM (arXiv 2204.02311, appendix B).
"""

from collections.abc import Iterable
from typing import NamedTuple

from lmboost.models.layer_kinds import KINDS
from lmboost.models.model_config import ModelConfig

# Dense bfloat16 FLOP/s of one jax device, by the start of its `device_kind`. Vendors' specifications:
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and NVIDIA's data sheets (without sparsity).
# A TPU7x chip (2307e12) is two jax devices.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p names itself "TPU v5" or "TPU v5p"
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
}


def forward_flops(config: ModelConfig, seq_len: int, num_layers: int | None = None, vocabulary: bool = True) -> float:
    """FLOPs of a forward pass per token, a multiplication and an addition counted as two.

        sum over layers of (2 * (2 D H N + 2 D K N + m D F) + 4 H N s) + 2 D V

    with m = 3 for a gated MLP, else 2. The first part is the projections, the second the two attention products
    over the s positions that a token sees on average (T / 2, or W - W^2 / 2T in a layer with a window W < T), the last
    the vocabulary projection. Looking an embedding up, norms and nonlinearities are not
    counted. Documents packed into a row count as one.

    Args:
      num_layers: how many of the first layers are computed; None is all of them.
      vocabulary: whether the vocabulary projection is computed.
    """
    c, total = config, 0.0
    windows = [c.sliding_window if KINDS[kind].windowed else 0 for kind in c.kinds]
    for (heads, kv_heads, head_dim, mlp_dim), window in list(zip(c.sizes, windows, strict=True))[:num_layers]:
        window = min(window or seq_len, seq_len)
        projections = 2 * (heads + kv_heads) * head_dim + (3 if c.is_gated else 2) * mlp_dim
        total += 2 * c.d_model * projections + 4 * heads * head_dim * (window - window**2 / (2 * seq_len))
    return total + (2 * c.d_model * c.vocab_size if vocabulary else 0)


class Forward(NamedTuple):
    """What a helper computes in a step; see `objective.terms.forwards`."""

    model: ModelConfig
    layers: int | None = None  # how many of the first ones; None is all of them
    rows: int = 1  # for each row of the batch
    vocabulary: float = 1.0  # share of the tokens that are projected to the vocabulary
    seq_len: int = 0  # tokens of its rows; 0 is the student's


def step_flops(student: ModelConfig, batch_size: int, seq_len: int, helpers: Iterable[Forward] = ()) -> float:
    """FLOPs of one training step over all devices: three forward passes of the student, and its helpers' one.

    The learned maps of an alignment are not counted (under a thousandth of a step).
    """
    per_token = 3 * forward_flops(student, seq_len)
    for model, layers, rows, vocabulary, own_seq_len in helpers:
        projection, tokens = 2 * model.d_model * model.vocab_size, own_seq_len or seq_len
        forward = forward_flops(model, tokens, layers, vocabulary=False) + vocabulary * projection
        per_token += rows * forward * (tokens / seq_len)
    return per_token * batch_size * seq_len


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one jax device, or None for a kind that is not in the table (a CPU)."""
    known = [kind for kind in PEAK_FLOPS if device_kind.lower().startswith(kind.lower())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def mfu(flops_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Share of the devices' peak that a rate of model FLOPs is, 0 to 1; None where the peak is not known."""
    peak = peak_flops(device_kind)
    return flops_per_second / (peak * num_devices) if peak else None
