"""The sizes of the track: a tier is a student, its helpers, and how long they are trained."""

import dataclasses

from ml_collections import ConfigDict

from lmboost import config
from lmboost.models.model_config import ModelConfig


def decoder(
    layers: int, width: int, heads: int, mlp: int, head_dim: int = 0, vocabulary: int = 512, tokens: int = 128
) -> ModelConfig:
    """A small Llama with query and key norms, for rows of so many tokens."""
    return ModelConfig(
        vocab_size=vocabulary, num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=heads,
        head_dim=head_dim or width // heads, mlp_dim=mlp, max_seq_len=tokens, qk_norm="head", tie_embeddings=True,
        dtype="float32", remat="none",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tier:
    """Models by their names: the student, at so many tokens a parameter, and others that help it."""

    name: str
    models: dict[str, ModelConfig]
    search: dict[str, str | int] = dataclasses.field(default_factory=dict)  # of a cut of "large", of the student's size
    data: str = "data"  # where in the track's directory its texts are
    per_parameter: int = 20  # tokens of a run of length 1
    hub_seq_len: int = 0  # tokens of the rows of a teacher with another tokenizer
    batch_size: int = 8
    seq_len: int = 128
    accumulation: int = 2  # the same step, faster on a core whose cache it then fits into
    evaluations: int = 20  # on the way
    validation_batches: int = 48  # of each of them
    final_batches: int = 256  # of each text that is asked about at the end

    @property
    def student(self) -> ModelConfig:
        return self.models["student"]

    def steps_of(self, model: ModelConfig, length: float = 1.0) -> int:
        """Those in which a model sees its tokens a parameter, times `length`, as a multiple of the evaluations."""
        tokens = self.per_parameter * length * model.num_params()
        return round(tokens / (self.batch_size * self.seq_len * self.evaluations)) * self.evaluations


NANO = Tier(
    "nano",
    {
        "student": decoder(4, 48, 3, 128),
        "tenth": decoder(1, 16, 2, 40),
        "fifth": decoder(2, 24, 3, 64),
        "half": decoder(3, 40, 5, 104),
        "deep": decoder(6, 48, 3, 128),
        "half-depth": decoder(3, 48, 3, 128),
        "two-layers": decoder(2, 48, 3, 128),
        "one-layer": decoder(1, 48, 3, 128),
        "half-width": decoder(6, 24, 3, 64),
        "large": decoder(6, 72, 3, 192),
        "first": decoder(4, 48, 3, 144, head_dim=12),
    },
    {
        "params": "0.129M-0.142M",
        "layers": "3-6",
        "d_model": "32-72:8",
        "num_kv_heads": "1-3",
        "head_dim": "12,24",
        "mlp_dim": "64-192:32",
    },
)
MICRO = Tier(
    "micro",
    {
        "student": decoder(6, 72, 3, 192),
        "tenth": decoder(1, 32, 2, 88),
        "fifth": decoder(3, 40, 5, 104),
        "half": decoder(4, 56, 7, 152),
        "deep": decoder(9, 72, 3, 192),
        "half-depth": decoder(5, 72, 3, 192),
        "two-layers": decoder(3, 72, 3, 192),
        "one-layer": decoder(1, 72, 3, 192),
        "half-width": decoder(9, 36, 3, 96),
        "large": decoder(8, 108, 3, 288),
        "first": decoder(6, 72, 3, 216, head_dim=18),
    },
    {
        "params": "0.391M-0.432M",
        "layers": "4-8",
        "d_model": "48-108:12",
        "num_kv_heads": "1-3",
        "head_dim": "18,36",
        "mlp_dim": "96-288:48",
    },
)
# The same layers for other tokens: 4,096 pieces, and bytes (257 with the end of a document). Rows are longer, as who is
# asked about a text that begins anew every 30 words knows little of it. SmolLM2 reads a row in about as many tokens of
# its own, or in a fourth as many.
_LONG = {"per_parameter": 6, "batch_size": 2, "seq_len": 512, "accumulation": 1}
PIECES = Tier("pieces", {"student": decoder(4, 48, 3, 128, 0, 4096, 512)}, data="data-4096", hub_seq_len=640, **_LONG)
BYTES = Tier("bytes", {"student": decoder(4, 48, 3, 128, 0, 257, 512)}, data="data-257", hub_seq_len=256, **_LONG)
TIERS = {tier.name: tier for tier in (NANO, MICRO, PIECES, BYTES)}


def recipe(tier: Tier, model: ModelConfig, steps: int) -> ConfigDict:
    """A plain run of a model of the tier."""
    c = config.base()
    c.steps, c.batch_size, c.seq_len, c.accumulation = steps, tier.batch_size, tier.seq_len, tier.accumulation
    c.objective.block_tokens = tier.batch_size * tier.seq_len // tier.accumulation
    c.model = config.model(model)
    c.teacher.dtype = "float32"
    c.optimizer.update({"learning_rate": 4e-3, "b2": 0.98, "warmup_steps": round(0.05 * steps)})
    c.checkpoint.every, c.checkpoint.keep = steps // 4, 1
    c.eval.every, c.eval.batches = steps // tier.evaluations, tier.validation_batches
    c.log.every, c.log.tensorboard = 50, False
    return c
