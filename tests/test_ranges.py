"""Numbers written as ranges come back as they were."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmboost import ranges
from lmboost.errors import UserError


@given(st.sets(st.integers(0, 60), min_size=1))
def test_what_is_written_is_read(numbers):
    text = ranges.write(sorted(numbers))
    spans = [(first, last) for _, first, last in ranges.parse(text, "", "")]
    assert [n for first, last in spans for n in range(first, last + 1)] == sorted(numbers)
    assert all(b[0] > a[1] + 1 for a, b in zip(spans, spans[1:], strict=False)), "as short as can be"


def test_spaces_are_allowed_and_order_is_not_asked_for():
    assert list(ranges.parse("7-3, 8", "layers", "is wrong")) == [("7-3", 7, 3), (" 8", 8, 8)]


@pytest.mark.parametrize("word", ["", "a", "-3", "3-", "1-2-3", "1.5", "٣"])
def test_a_word_that_is_neither_is_named(word):
    with pytest.raises(UserError, match=f"^layers='x': '{word}' is no layer$"):
        list(ranges.parse(f"1,{word},2", "layers='x'", "is no layer"))
