"""`describe` and `escaped`: bounded in length and in work for any value, harmless to print."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimstate.describe import bounded, describe, escaped, exact
from optimstate.reporting import to_json
from optimstate.tree import GlobalName

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(st.characters()), inner),
)


def doubled(kind: Any, depth: int) -> Any:
    made: Any = kind()
    for _ in range(depth):
        made = {0: made, 1: made} if kind is dict else kind([made, made])
    return made


@given(ANY)
def test_any_value_is_described_in_few_harmless_characters(value: Any) -> None:
    text = describe(value)
    assert len(text) < 2500
    assert text == escaped(text)
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)
    text.encode()


@pytest.mark.parametrize(
    "make",
    [
        lambda: doubled(list, 200),
        lambda: doubled(tuple, 200),
        lambda: doubled(dict, 200),
        lambda: 1 << 10_000_000,
        lambda: "x" * 10**7,
        lambda: bytes(10**7),
    ],
)
def test_work_does_not_grow_with_the_value(make: Callable[[], Any]) -> None:
    value = make()
    begun = time.process_time()
    for made in (describe(value), str(bounded(value)), exact(value)):
        assert len(made) < 5000
    assert time.process_time() - begun < 0.5


def test_small_values_are_as_python_writes_them() -> None:
    for value in (0, -1.5, None, True, "a'b", 'a"b', [1, (2,), {"a": b"c"}], (), {}, set(), 2**63):
        assert describe(value) == repr(value) or value == set()
    assert describe(GlobalName("os", "system")) == "<os.system>"
    assert describe(GlobalName("os", "sys\x1btem")()) == r"<os.sys\x1btem object>"
    assert describe(ValueError("no\n")) == r"ValueError: no\n"


def test_json_is_valid_and_exact_for_any_name() -> None:
    name = "w\x1b]0;t\x07\n\u202e\x9b\ud800end"
    text = to_json("test", {"name": name, "number": 10**5000, "object": object()})
    assert json.loads(text)["name"] == name
    assert text.isascii()
    assert escaped(text, lines=True) == text


def test_whatever_is_printable_is_safe() -> None:
    """Texts without an unprintable character are not searched for unsafe ones."""
    unsafe = {*range(0x20), *range(0x7F, 0xA0), 0x61C, *range(0x200B, 0x2010), *range(0x2028, 0x202F), 0xFEFF}
    assert not any(chr(code).isprintable() for code in (*unsafe, *range(0x2060, 0x2070), *range(0xD800, 0xE000)))
