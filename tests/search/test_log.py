"""The log of a search: wherever a kill cuts it off, the search that goes on writes the same file."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmboost.errors import UserError
from lmboost.models.model_config import ModelConfig
from lmboost.search.log import Log
from lmboost.surgery import subnet

SIZES = {"vocab_size": 50, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 8}
CUTS = [subnet.whole(ModelConfig(num_layers=1 + i, d_model=8, **SIZES)) for i in range(5)]
LOSSES = [1.0, math.nan, 1 / 3, math.inf, 2.5]
ABOUT = {"config": {"seed": 1, "search.candidates": 5}, "parent": {}, "data": "d"}


def search(directory, cuts=CUTS, about=ABOUT):
    """The losses of five candidates, two at once, and how many of them were computed."""
    log, losses, computed = Log(directory, about, 2), [], 0
    for first in range(0, 5, 2):
        part, known = cuts[first : first + 2], LOSSES[first : first + 2]
        old = log.replay(first, part)
        computed += 0 if old else len(part)
        losses += old or log.write(first, first // 2, part, known, [100] * len(part))
    assert log.written == 5
    return losses, computed


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 3000))
def test_cut_off_at_any_byte_and_gone_on_with_it_is_the_same_file(tmp_path_factory, cut):
    directory = tmp_path_factory.mktemp("search")
    search(directory)
    whole = (directory / "candidates.jsonl").read_bytes()
    (directory / "candidates.jsonl").write_bytes(whole[: min(cut, len(whole))])
    losses, computed = search(directory)
    assert (directory / "candidates.jsonl").read_bytes() == whole
    assert [x if math.isfinite(x) else None for x in losses] == [1.0, None, 1 / 3, None, 2.5]
    assert computed == 0 if cut >= len(whole) - 1 else computed in (1, 3, 5)


def test_another_search_or_other_candidates_are_named(tmp_path):
    search(tmp_path)
    with pytest.raises(UserError, match=r"holds another search \(seed: 1 -> 2\)"):
        search(tmp_path, about=ABOUT | {"config": {"seed": 2, "search.candidates": 5}})
    with pytest.raises(UserError, match="candidate 0, is not the one that this search comes to"):
        search(tmp_path, cuts=CUTS[::-1], about=ABOUT | {"config": {"seed": 1, "search.candidates": 6}})
