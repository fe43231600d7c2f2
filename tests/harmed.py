"""JSON objects and files as strangers, damage and later releases leave them, drawn by hypothesis."""

import copy
import json
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples each time; FUZZ_EXAMPLES=5000 draws others, and more.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 500,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip

ODD = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 2**31, 10**20, 1e308, "", "a.b", "\ud800", "\0", [], {}, [[]], [None]]),
    st.integers(), st.floats(), st.text(max_size=5),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@st.composite
def objects(draw, content):
    """`content` with one to three of its values replaced, removed or joined by another, at any depth."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        at = content
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3)):
                at = at[key]
                continue
            what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if what == "remove":
                del at[key]
            elif what == "replace" or isinstance(at, list):
                at[key] = copy.deepcopy(draw(ODD))
            else:
                at[draw(st.text(max_size=5))] = copy.deepcopy(draw(ODD))
            break
    return content


@st.composite
def files(draw, content):
    """The bytes of such an object; now and then cut off, with a changed byte, or nested beyond all measure."""
    raw = json.dumps(draw(objects(content))).encode()
    match draw(st.integers(0, 9)):
        case 0:
            return raw[: draw(st.integers(0, len(raw)))]
        case 1:
            return changed(raw, draw(st.integers(0, len(raw) - 1)), draw(st.integers(0, 255)))
        case 2:
            return draw(st.sampled_from([b"[", b'{"a":', b'{"model":{"a":['])) * 100_000
    return raw


def changed(raw: bytes, at: int, byte: int) -> bytes:
    """`raw` with another byte at a place."""
    return raw[:at] + bytes([byte]) + raw[at + 1 :]
