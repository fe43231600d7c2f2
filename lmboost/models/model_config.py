"""What a decoder is: its sizes and switches, checked, and how many parameters they make.

Layers may be of unequal sizes, as those of a model that was cut out of another one are. Neighbours of equal sizes form
a segment, whose parameters are stacked and scanned together; a model of equal layers is one segment.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lmboost.errors import UserError, fraction, number, one_of
from lmboost.models import attention, layer_kinds

NORMS = ("rmsnorm", "layernorm", "layernorm_nobias")
POSITIONS = ("rope", "learned", "none")
ROPE_SCALINGS = ("llama3", "linear", "dynamic", "yarn", "longrope")
MLPS = ("gelu", "gelu_tanh", "relu", "silu_gated", "gelu_tanh_gated")
QK_NORMS = ("none", "head", "full")
NORM_PLACEMENTS = ("pre", "post", "both")
REMATS = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")
QUANTIZED = ("none", "int8", "float8")
# The words that a field can be.
CHOICES = {
    "norm": NORMS, "position": POSITIONS, "mlp": MLPS, "qk_norm": QK_NORMS, "norm_placement": NORM_PLACEMENTS,
    "remat": REMATS, "dtype": DTYPES, "quantize": QUANTIZED, "attention": attention.IMPLEMENTATIONS,
    "rope_scaling": ROPE_SCALINGS,
}  # fmt: skip
# Sizes, and the most that they can be: what an array can have, but of layers less, since each has its place in memory
# before anything else of the model has.
MAX_LAYERS = 10_000
_MOST = {"num_layers": MAX_LAYERS} | dict.fromkeys(
    (
        "vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_seq_len", "vocab_multiple",
        "rope_original_seq_len",
    ),
    2**31 - 1,
)  # fmt: skip
_POSITIVE = (
    "norm_eps", "rope_theta", "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor",
    "rope_attention_factor", "embed_scale", "residual_scale", "logit_divisor",
)  # fmt: skip
# Fields in which a model may differ from the one that it was made of: they change neither its layers nor its function.
NEUTRAL = ("dtype", "quantize", "attention", "remat", "init_std", "vocab_multiple")


class LayerSizes(NamedTuple):
    """The sizes in which layers of one model may differ."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int


class Segment(NamedTuple):
    """Neighbouring layers of equal sizes.

    Attributes:
      start, stop: the first layer, and the one after the last.
      config: the model's, with the sizes of these layers; its num_layers is still the whole model's.
      kinds: of these layers, see `ModelConfig.of_kind`.
    """

    start: int
    stop: int
    config: "ModelConfig"
    kinds: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and switches of a decoder. `validate` raises a UserError on what does not fit together."""

    vocab_size: int = 32000  # rows that stand for a token
    num_layers: int = 12
    d_model: int = 768
    num_heads: int = 12
    num_kv_heads: int = 12  # fewer than num_heads: grouped-query attention
    head_dim: int = 64
    mlp_dim: int = 3072
    # Layers of unequal sizes, from the first to the last: "COUNT*HEADS/KV_HEADS/HEAD_DIM/MLP_DIM,..."; the four fields
    # above are then the largest of each. Empty: all layers have these sizes.
    layer_sizes: str = ""
    # What layers see, and whether they know positions: a pattern of the kinds in layer_kinds.KINDS, "5*window,full",
    # repeated up to the last layer. Empty: all layers have the window below if there is one, and positions.
    layer_kinds: str = ""
    max_seq_len: int = 1024  # with learned positions: rows of their table
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_placement: str = "pre"  # on a sublayer's input; "post": on its output (OLMo-2); "both" (Gemma 2)
    zero_centred_norm: bool = False  # norms multiply by 1 + their scale (Gemma), of which zeros are the beginning
    final_norm: bool = True
    position: str = "rope"
    position_offset: int = 0  # learned positions: unused rows before position 0 (OPT has 2)
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # share of each head that is rotated (Pythia: 0.25)
    rope_local_theta: float = 0.0  # of layers with a window, whose positions are not scaled then; 0: that of the others
    rope_scaling_factor: float = 1.0  # above 1: positions are scaled as `rope_scaling` says, see `rope.frequencies`
    rope_scaling: str = "llama3"  # linear, dynamic, yarn, longrope
    rope_low_freq_factor: float = 1.0  # turns within the original length: slower features are stretched (llama3, yarn)
    rope_high_freq_factor: float = 4.0  # and faster ones kept
    rope_original_seq_len: int = 8192
    rope_attention_factor: float = 1.0  # of what is rotated, queries and keys each (yarn, longrope)
    rope_short_factors: str = ""  # longrope: what each frequency is divided by, "1.0,1.25,..."
    rope_long_factors: str = ""  # the same in sequences longer than the original ones
    mlp: str = "silu_gated"
    parallel_residual: bool = False  # x + attn(norm(x)) + mlp(norm(x)), as GPT-NeoX
    sliding_window: int = 0  # tokens that a query sees, itself included (Mistral); 0 is all before it
    qk_norm: str = "none"  # RMSNorm on queries and keys: per "head" or over the "full" projection
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    attn_scale: float = 0.0  # attention logits are multiplied by it; 0 is 1 / sqrt(head_dim)
    scale_attn_by_layer: bool = False  # attention logits times 1 / (layer + 1)
    attn_softcap: float = 0.0  # c: attention logits become c tanh(logits / c) (Gemma 2); 0 is off
    embed_scale: float = 1.0  # embeddings are multiplied by it (Gemma: the square root of the width)
    residual_scale: float = 1.0  # what a layer adds to the residual stream is multiplied by it (Granite)
    logit_divisor: float = 1.0  # logits are divided by it (Granite)
    logit_softcap: float = 0.0  # as attn_softcap, of the vocabulary's logits
    init_std: float = 0.02
    vocab_multiple: int = 1  # rows are padded up to a multiple of this; padded rows are never predicted
    dtype: str = "bfloat16"  # of compute; parameters are float32
    quantize: str = "none"  # what dense layers multiply, a forward pass alone: teacher.quantize is for helpers
    attention: str = "auto"
    remat: str = "none"

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding and head matrices: vocab_size rounded up to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated; even."""
        return int(self.head_dim * self.rope_fraction) // 2 * 2

    @property
    def sizes(self) -> tuple[LayerSizes, ...]:
        """The sizes of each layer; a UserError where `layer_sizes` can't be read."""
        if not self.layer_sizes:
            return (LayerSizes(*(getattr(self, name) for name in LayerSizes._fields)),) * self.num_layers
        return parse_sizes(self.layer_sizes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer; a UserError where `layer_kinds` can't be read."""
        return layer_kinds.parse(self.layer_kinds or self._kind_of_all, self.num_layers)

    @property
    def _kind_of_all(self) -> str:
        """What empty `layer_kinds` stand for."""
        return "window" if self.sliding_window else "full"

    @property
    def scales_positions(self) -> bool:
        """Whether rotary positions turn otherwise than `rope_theta` says, see `rope.frequencies`."""
        return self.rope_scaling_factor != 1.0 or self.rope_scaling == "longrope"

    @property
    def attention_rule(self) -> "attention.Rule":
        """What attention does with queries and keys, in a model whose layers are all of one kind."""
        return attention.Rule(self.sliding_window, self.attn_scale, self.attn_softcap)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate, a third projection."""
        return self.mlp.endswith("_gated")

    @property
    def norms_per_layer(self) -> int:
        """Norms of the residual stream's width."""
        return 4 if self.norm_placement == "both" else 2

    @property
    def head_dims(self) -> set[int]:
        """The sizes that heads have, of all layers."""
        return {sizes.head_dim for sizes in self.sizes}

    def with_layers(self, sizes: Sequence[LayerSizes], kinds: Sequence[str]) -> "ModelConfig":
        """The same model with layers of these sizes and kinds, each written in the shortest way."""
        largest = LayerSizes(*map(max, zip(*sizes, strict=True)))._asdict() if sizes else {}
        unequal = format_sizes(sizes) if len(set(sizes)) > 1 else ""
        pattern = layer_kinds.write(kinds) if kinds else ""
        pattern = "" if pattern == self._kind_of_all else pattern
        changes = {"num_layers": len(sizes), "layer_sizes": unequal, "layer_kinds": pattern}
        return dataclasses.replace(self, **changes, **largest)

    def of_kind(self, kind: str) -> "ModelConfig":
        """The model as if all of its layers were of a kind of KINDS: what a `Block` of that kind is made from."""
        windowed, positions = layer_kinds.KINDS[kind]
        changes: dict[str, Any] = {"layer_kinds": "", "rope_local_theta": 0.0}
        if not windowed:
            changes["sliding_window"] = 0
        elif self.rope_local_theta:
            changes |= {"rope_theta": self.rope_local_theta, "rope_scaling": "llama3", "rope_scaling_factor": 1.0}
        return dataclasses.replace(self, **changes | ({} if positions else {"position": "none"}))

    def segments(self) -> tuple[Segment, ...]:
        """The runs of layers of equal sizes, from the first to the last."""
        segments, start, kinds = [], 0, self.kinds
        for sizes, run in itertools.groupby(self.sizes):
            stop = start + len(list(run))
            config = dataclasses.replace(self, layer_sizes="", **sizes._asdict())
            segments.append(Segment(start, stop, config, kinds[start:stop]))
            start = stop
        return tuple(segments)

    def num_params(self) -> int:
        """Number of parameters, without padded vocabulary rows.

            D V (2, or 1 where tied) + D P (learned positions) + n D (final norm)
              + sum over layers of D N (2 H + 2 K) + m D F + biases + norms

        with n = 2 for a LayerNorm with bias, else 1, and m = 3 for a gated MLP, else 2. A layer has 2 or 4 norms.
        """
        norm = (2 if self.norm == "layernorm" else 1) * self.d_model
        total = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        total += norm if self.final_norm else 0
        if self.position == "learned":
            total += (self.max_seq_len + self.position_offset) * self.d_model
        return total + sum(self.layer_params(sizes) for sizes in self.sizes)

    def layer_params(self, sizes: LayerSizes) -> int:
        """Number of parameters of a layer of these sizes."""
        heads, kv_heads, head_dim, mlp_dim = sizes
        attn = 2 * (heads + kv_heads) * head_dim * self.d_model
        attn += (heads + 2 * kv_heads) * head_dim if self.qkv_bias else 0
        attn += self.d_model if self.attn_out_bias else 0
        attn += {"none": 0, "head": 2 * head_dim, "full": (heads + kv_heads) * head_dim}[self.qk_norm]
        ups = 2 if self.is_gated else 1
        mlp = (ups + 1) * self.d_model * mlp_dim + (ups * mlp_dim + self.d_model if self.mlp_bias else 0)
        return attn + mlp + self.norms_per_layer * (2 if self.norm == "layernorm" else 1) * self.d_model

    def validate(self, field: str = "model") -> "ModelConfig":
        for name, known in CHOICES.items():
            one_of(f"{field}.{name}", getattr(self, name), known)
        for name, most in _MOST.items():
            least = 0 if name == "num_layers" else 1  # a model without layers is what the shallowest ones grow from
            if not least <= getattr(self, name) <= most:
                raise UserError(f"{field}.{name}={getattr(self, name)}: expected a number from {least} to {most}.")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:  # false for NaN, too
                raise UserError(f"{field}.{name}={getattr(self, name)}: expected a finite number above 0.")
        fraction(f"{field}.rope_fraction", self.rope_fraction)
        for name in ("init_std", "rope_local_theta", "attn_scale", "attn_softcap", "logit_softcap"):
            number(f"{field}.{name}", getattr(self, name))
        self._check_sizes(field)
        if self.sliding_window < 0:
            raise UserError(f"{field}.sliding_window={self.sliding_window} must be 0 (none) or a number of tokens.")
        self._check_kinds(field)
        self._check_rope(field)
        if self.parallel_residual and self.norm_placement != "pre":
            raise UserError(
                f"{field}.parallel_residual=True needs {field}.norm_placement='pre': attention and MLP then read the "
                "same normalised input."
            )
        return self

    def fit(self, seq_len: int, platform: str, field: str = "model") -> "ModelConfig":
        """The model with the attention kernel that computes rows of `seq_len` tokens on a platform.

        Raises a UserError, naming `field`, where it is no model, has too few positions, or names a kernel that is not
        for this.
        """
        self.validate(field).check_positions(seq_len, field=field)
        soft = bool(self.attn_softcap)
        kernel = attention.resolve(self.attention, platform, seq_len, self.head_dims, self.dtype, field, soft)
        return dataclasses.replace(self, attention=kernel)

    def check_positions(self, seq_len: int, length: str = "seq_len", field: str = "the model") -> None:
        """Raises a UserError where rows are longer than the table of learned positions."""
        if self.position == "learned" and seq_len > self.max_seq_len:
            raise UserError(
                f"{length}={seq_len} is longer than the {self.max_seq_len} learned positions of {field}: shorten the "
                "rows, or use a model with more positions."
            )

    def differences(self, other: "ModelConfig") -> list[str]:
        """The fields in which this model is another one than `other`; NEUTRAL ones are none of them."""
        # Rotary positions have no table: a model may be trained at other lengths than its parent.
        free = (*NEUTRAL, "max_seq_len") if self.position == "rope" else NEUTRAL
        names = (f.name for f in dataclasses.fields(self))
        return [n for n in names if n not in free and getattr(self, n) != getattr(other, n)]

    def _check_kinds(self, field: str) -> None:
        kinds = set(layer_kinds.parse(self.layer_kinds or self._kind_of_all, self.num_layers, f"{field}.layer_kinds"))
        if "window" in kinds and not self.sliding_window:
            raise UserError(
                f"{field}.layer_kinds={self.layer_kinds!r} has layers with a window, but {field}.sliding_window=0: set "
                "it to the number of tokens that a query sees there."
            )
        if "nope" in kinds and self.position != "rope":
            raise UserError(
                f"{field}.layer_kinds={self.layer_kinds!r} has layers without rotary positions, but {field}.position="
                f"{self.position!r}: set it to 'rope', or leave 'nope' out."
            )

    def _check_rope(self, field: str) -> None:
        if self.position != "rope" or not self.scales_positions:
            return
        pairs = {dataclasses.replace(self, head_dim=size).rotary_dim // 2 for size in self.head_dims}
        if self.rope_scaling == "dynamic" and min(pairs) < 2:
            raise UserError(
                f"{field}.rope_scaling='dynamic' needs heads of which at least 4 features are rotated; here: "
                f"{2 * min(pairs)}. Choose larger heads, or 'linear'."
            )
        if self.rope_scaling == "yarn" and self.rope_theta <= 1:
            raise UserError(f"{field}.rope_theta={self.rope_theta} with rope_scaling='yarn': expected more than 1.")
        if self.rope_scaling != "longrope":
            return
        for name in ("rope_short_factors", "rope_long_factors"):
            found = parse_factors(getattr(self, name), f"{field}.{name}")
            if pairs != {len(found)}:
                raise UserError(
                    f"{field}.{name} has {len(found)} numbers, but heads of {', '.join(map(str, self.head_dims))} "
                    f"features turn {', '.join(map(str, pairs))} pairs of them: give one number for each pair."
                )

    def _check_sizes(self, field: str) -> None:
        # Without layers, those that it would have.
        sizes = self.sizes if self.num_layers else dataclasses.replace(self, num_layers=1).sizes
        if len(sizes) != max(self.num_layers, 1):
            raise UserError(
                f"{field}.layer_sizes={self.layer_sizes!r} are {len(sizes)} layers, but {field}.num_layers="
                f"{self.num_layers}: give the sizes of every layer."
            )
        for layer, (heads, kv_heads, _, _) in enumerate(sizes):
            if heads % kv_heads:
                where = f"in layer {layer} of {field}.layer_sizes: {heads} heads" if self.layer_sizes else ""
                raise UserError(
                    f"{where or f'{field}.num_heads={heads}'} is not a multiple of {field}.num_kv_heads={kv_heads}: "
                    "every group of query heads shares one key/value head."
                )
        for name, largest in zip(LayerSizes._fields, map(max, zip(*sizes, strict=True)), strict=True):
            if getattr(self, name) != largest:
                raise UserError(
                    f"{field}.{name}={getattr(self, name)}, but the largest in {field}.layer_sizes is {largest}: "
                    "set it to that."
                )


def parse_factors(text: str, field: str = "model.rope_short_factors") -> tuple[float, ...]:
    """The numbers in "1.0,1.25,..."; a UserError where one is none, or is not above 0."""
    words = [word.strip() for word in text.split(",")]
    is_number = re.compile(r"\d+(\.\d*)?(e[+-]?\d+)?").fullmatch
    if wrong := [word for word in words if not is_number(word) or not 0 < float(word) < math.inf]:
        raise UserError(f"{field}={text[:200]!r}: {wrong[0][:80]!r} is no number above 0; as in '1.0,1.25,2.5'.")
    return tuple(map(float, words))


def parse_sizes(text: str) -> tuple[LayerSizes, ...]:
    """The sizes of each layer in "2*8/4/64/1024,6/2/64/512"; a UserError where a part is not of that form."""
    sizes: list[LayerSizes] = []
    for word in text.split(","):
        match = re.fullmatch(r"(?:(\d{1,5})\*)?(\d{1,9})/(\d{1,9})/(\d{1,9})/(\d{1,9})", word.strip())
        if not match or not all(int(n) for n in match.groups("1")):
            raise UserError(
                f"model.layer_sizes={text[:200]!r}: {word.strip()[:80]!r} is not of the form COUNT*HEADS/KV_HEADS/"
                "HEAD_DIM/MLP_DIM, numbers from 1 on; as in '2*8/4/64/1024,6/2/64/512'."
            )
        count, *own = (int(n) for n in match.groups("1"))
        sizes += [LayerSizes(*own)] * count
        if len(sizes) > MAX_LAYERS:
            raise UserError(f"model.layer_sizes={text[:200]!r} are more than {MAX_LAYERS} layers.")
    return tuple(sizes)


def format_sizes(sizes: Sequence[LayerSizes]) -> str:
    """Sizes as `parse_sizes` reads them, equal neighbours together."""
    runs = [(len(list(run)), one) for one, run in itertools.groupby(sizes)]
    return ",".join((f"{count}*" if count > 1 else "") + "/".join(map(str, one)) for count, one in runs)
