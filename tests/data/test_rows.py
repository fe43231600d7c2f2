"""Which rows the steps read: each once and in order, and none of those that data.skip leaves out."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from lmboost import config as configs
from lmboost import plan
from lmboost.data.rows import Rows, parse_ranges
from lmboost.errors import UserError

STEPS = 40


@st.composite
def cases(draw):
    """(rows without a jump, ranges): any number of spans that select, any ranges of steps."""

    def ranges(first, size):
        cuts = sorted(draw(st.sets(st.integers(first, STEPS), max_size=size)))
        return tuple(zip(cuts[::2], cuts[1::2], strict=False))

    plain = Rows(draw(st.integers(1, 5)), draw(st.integers(1, 5)), ranges(0, 6))
    spans = [(first, last - draw(st.integers(0, last - first))) for first, last in ranges(1, 10)]
    return plain, tuple(spans)


def simulate(plain, ranges):
    """First row and number of rows of each step, row by row."""
    bad = [(plain(first - 1)[0], sum(plain(last - 1))) for first, last in ranges]
    taken, row = [], 0
    for step in range(STEPS):
        count = plain(step)[1]
        while hit := [end for begin, end in bad if any(begin <= r < end for r in range(row, row + count))]:
            row = min(hit)
        taken.append((row, count))
        row += count
    return taken


@settings(max_examples=300, deadline=None)
@given(cases())
def test_rows_that_are_left_out_are_never_read_and_the_others_once_and_in_order(case):
    plain, ranges = case
    rows = plain.without(ranges, STEPS)
    taken = [rows(step) for step in range(STEPS)]
    assert taken == simulate(plain, ranges)
    read = [row for first, count in taken for row in range(first, first + count)]
    assert all(a < b for a, b in zip(read, read[1:], strict=False))
    bad = {row for a, b in ranges for step in range(a - 1, b) for row in range(plain(step)[0], sum(plain(step)))}
    assert not bad & set(read)
    before = ranges[0][0] - 1 if ranges else STEPS
    assert taken[:before] == [plain(step) for step in range(before)]
    if not plain.selecting or plain.candidates == 1:
        assert sorted({*read, *(row for row in bad if row <= read[-1])}) == list(range(read[-1] + 1)), "no good row"
    assert [pickle.loads(pickle.dumps(rows))(step) for step in range(STEPS)] == taken


@settings(max_examples=200, deadline=None)
@given(cases())
def test_where_a_run_stands_says_what_it_has_read_and_not_what_it_will_leave_out(case):
    plain, ranges = case
    rows = plain.without(ranges, STEPS)
    ends = [0, *(sum(rows(step)) for step in range(STEPS))]
    for step in range(STEPS + 1):
        assert rows.stand(step) == ends[step]
        for known in range(len(ranges) + 1):
            fewer = plain.without(ranges[:known], STEPS)
            missed = rows.missed_jump(step, fewer.stand(step))
            if fewer.stand(step) == rows.stand(step):  # may go on: what differs lies ahead
                assert missed is None and all(rows(s) == fewer(s) for s in range(step))
            else:
                assert missed == known, "the first range that the other run knows nothing of"
                at = rows.jumps[missed][0]
                assert at < step and rows.stand(at) == fewer.stand(at), "from there it could go on"


def test_long_runs_are_planned_at_once():
    plain = Rows(2048, 4, ((0, 10**8),))
    rows = plain.without([(10**7 * i, 10**7 * i + 199) for i in range(1, 80)], 10**9)
    assert rows(10**9 - 1) == (plain(10**9 - 1)[0] + rows.jumps[-1][1], 2048)
    assert len(rows.jumps) == 79 and rows.jumps[0] == (10**7 - 1, 200 * 4 * 2048)


def test_ranges_are_read_from_text():
    assert parse_ranges("", 10) == () and parse_ranges(" ", 10) == ()
    assert parse_ranges("1-3, 4,9-10", 10) == ((1, 3), (4, 4), (9, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abc", "'abc' is neither a step nor a range of them"),
        ("5-", "'5-' is neither"),
        ("-5", "'-5' is neither"),
        ("5,,6", "'' is neither"),
        ("0-3", "'0-3' is not a range of steps, which are 1 to 10"),
        ("7-6", "'7-6' is not a range of steps"),
        ("10-11", "'10-11' is not a range of steps"),
        ("5-7,7-8", "'7-8' does not come after 5-7"),
        ("5-7,2", "'2' does not come after 5-7"),
    ],
)
def test_what_is_no_ascending_list_of_ranges_is_named(text, message):
    with pytest.raises(UserError, match=f"^data.skip='{text}': {message}.*Give"):
        parse_ranges(text, 10)


def test_data_skip_is_a_part_of_what_a_run_is_and_resume_step_is_not():
    old, new = configs.base(), configs.base()
    with new.unlocked():
        new.resume.step, new.data.skip = 3, "5-6"
    before_there_was_one = ConfigDict(old.to_dict())
    del before_there_was_one.data.skip, before_there_was_one.resume.step
    assert configs.differences(before_there_was_one, old) == []
    assert configs.differences(before_there_was_one, new) == ["data.skip: '' -> '5-6'"]


def test_a_step_to_resume_from_needs_a_run():
    c = configs.base()
    c.resume.step = 900
    with pytest.raises(UserError, match="resume.step=900, but resume.path is empty"):
        plan._check_init(c)
