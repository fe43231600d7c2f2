"""The axes of every parameter: the one table that sharding, optimizers and surgery ask.

An arrow has the axes that a parameter is multiplied over before it, and those of what it gives behind it: a bias gives,
a norm does neither. The parameters of layers are stacked on one more axis in front, which the table leaves out.

    embed      features of the residual stream
    vocab      rows of a vocabulary, padded
    positions  rows of a table of positions
    heads      query heads
    kv_heads   key/value heads
    features   of one head
    mlp        units of the MLP
    state, teacher_state  features of the states that an alignment compares
"""

PARAMETERS = {
    "embed/embedding": "vocab -> embed",
    "position_embed/embedding": "positions -> embed",
    "final_norm/scale": "embed",
    "final_norm/bias": "embed",
    "head": "embed -> vocab",
    "layers/attn_norm/scale": "embed",
    "layers/attn_norm/bias": "embed",
    "layers/attn_post_norm/scale": "embed",
    "layers/attn_post_norm/bias": "embed",
    "layers/attn/q/kernel": "embed -> heads features",
    "layers/attn/q/bias": "-> heads features",
    "layers/attn/k/kernel": "embed -> kv_heads features",
    "layers/attn/k/bias": "-> kv_heads features",
    "layers/attn/v/kernel": "embed -> kv_heads features",
    "layers/attn/v/bias": "-> kv_heads features",
    # One axis: the features of all heads, one after the other (qk_norm="full"), or of one ("head").
    "layers/attn/q_norm/scale": "heads*features",
    "layers/attn/k_norm/scale": "kv_heads*features",
    "layers/attn/o/kernel": "heads features -> embed",
    "layers/attn/o/bias": "-> embed",
    "layers/mlp_norm/scale": "embed",
    "layers/mlp_norm/bias": "embed",
    "layers/mlp_post_norm/scale": "embed",
    "layers/mlp_post_norm/bias": "embed",
    "layers/mlp/up/kernel": "embed -> mlp",
    "layers/mlp/up/bias": "-> mlp",
    "layers/mlp/gate/kernel": "embed -> mlp",
    "layers/mlp/gate/bias": "-> mlp",
    "layers/mlp/down/kernel": "mlp -> embed",
    "layers/mlp/down/bias": "-> embed",
    "align": "state -> teacher_state",
}


def of(path: str) -> tuple[str, ...]:
    """The names of a parameter's axes, in order, but for that of stacked layers; a KeyError on an unknown parameter.

    path: as `sharding.path_name` writes it, of any tree that has parameters in it: "model/layers/0/attn/q/kernel". The
      numbers of segments of layers and of alignments do not matter.
    """
    return tuple(_find(path).replace("->", " ").split())


def sides(path: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(axes that a parameter is multiplied over, axes of what it gives); a bias has none of the first, a norm neither.

    path: as for `of`.
    """
    before, arrow, behind = _find(path).partition("->")
    return (tuple(before.split()), tuple(behind.split())) if arrow else ((), ())


def _find(path: str) -> str:
    parts = [part for part in path.split("/") if not part.isdigit()]
    if "layers" in parts:  # a layer's is known by its whole path, others by how it ends
        ends = ["/".join(parts[parts.index("layers") :])]
    else:
        ends = ["/".join(parts[-2:]), parts[-1] if parts else ""]
    for end in ends:
        if end in PARAMETERS:
            return PARAMETERS[end]
    raise KeyError(f"the parameter {path!r} has no axes: add it to PARAMETERS in lmboost/axes.py")
