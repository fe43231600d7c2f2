import dataclasses
import json
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmboost import strict_json
from lmboost.errors import UserError

EXPECTED = {"step": int, "rate": float, "name?": str | None, "shards": [{"file": str, "on": bool}]}
GOOD = {"step": 3, "rate": 1, "shards": [{"file": "a", "on": True}], "more": {}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "name", "file"]), inner),
    max_leaves=8,
)


def read(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return strict_json.read(path, EXPECTED, "Mend it.")


def test_what_is_as_expected_is_read(tmp_path):
    assert read(tmp_path, GOOD) == GOOD
    assert read(tmp_path, GOOD | {"name": None}) == GOOD | {"name": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": True}, "step is True, expected a whole number"),
        ({"step": 1.0}, "step is 1.0, expected a whole number"),
        ({"step": 1 << 63}, "step is 9223372036854775808, expected"),
        ({"rate": float("nan")}, "rate is nan, expected a finite number"),
        ({"rate": 10**400}, "rate is 1000.*, expected a finite number"),
        ({"rate": False}, "rate is False"),
        ({"name": 5}, "name is 5, expected a text or null"),
        ({"shards": {}}, "shards is an object, expected a list"),
        ({"shards": [{"file": "a", "on": True}, {"file": "b"}]}, r"the field shards\[1\].on is missing"),
        ({"shards": [[]]}, r"shards\[0\] is a list, expected an object"),
    ],
)
def test_a_field_that_is_not_is_named_with_file_value_and_advice(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"x\.json: {message}.*\. Mend it\."):
        read(tmp_path, GOOD | change)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\0", b"[]", b"null", b"\xff{}", b'{"step": 1', b"[" * 200_000, b'{"a":' * 200_000, b"1" * 5000],
    ids=["empty", "nul", "list", "null", "not utf-8", "torn", "deep lists", "deep objects", "digits"],
)
def test_what_is_no_object_is_one_error_that_names_the_file(tmp_path, raw):
    with pytest.raises(UserError, match=r"x\.json.*Mend it\."):
        read(tmp_path, raw)


def test_a_file_that_no_memory_holds_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(strict_json.MAX_BYTES + 1)
    with pytest.raises(UserError, match="has 1,073,741,825 bytes"):
        strict_json.read(tmp_path / "x.json", EXPECTED, "Mend it.")


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int
    rate: float = 0.5


def test_a_dataclass_is_made_of_its_fields_and_of_no_others():
    assert strict_json.make(Sizes, {"width": 3}, "here", "Mend it.") == Sizes(3)
    with pytest.raises(UserError, match=r"^here: the field width is missing\. Mend it\.$"):
        strict_json.make(Sizes, {}, "here", "Mend it.")
    with pytest.raises(UserError, match=r"^here: width is '3', expected a whole number"):
        strict_json.make(Sizes, {"width": "3"}, "here", "Mend it.")
    with pytest.raises(UserError, match=r"a field 'widht' that this release.*did you mean 'width'"):
        strict_json.make(Sizes, {"widht": 3}, "here", "Mend it.")


@settings(max_examples=500, deadline=None)
@given(JSON, st.integers(0, 300))
@example(GOOD, 0)
def test_any_json_is_read_or_refused(content, cut):
    raw = json.dumps(content).encode()
    for piece in (raw, raw[:cut]):
        try:
            found = strict_json.parse(piece, "x.json", EXPECTED, "Mend it.")
        except UserError as error:
            assert str(error).startswith("x.json")
        else:
            assert isinstance(found["step"], int) and abs(found["rate"]) <= sys.float_info.max
