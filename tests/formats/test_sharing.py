"""Work is bounded by the size of a pickle, however often its tuples hold one another."""

from __future__ import annotations

import pickle
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimstate.errors import CheckpointError, LimitExceededError
from optimstate.formats.pickles.mentions import mentions
from optimstate.formats.pickles.unpickle import load


def doubled(depth: int) -> bytes:
    return b")" + b"2\x86" * depth


def by_memo(depth: int) -> bytes:
    return b")q\x000" + b"(h\x00h\x00tq\x000" * depth + b"h\x00"


def wide(depth: int) -> bytes:
    return b")q\x000" + (b"(" + b"h\x00" * 1000 + b"tq\x000") * depth + b"h\x00"


@pytest.mark.parametrize("bomb", [doubled(60), by_memo(60), wide(8)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"}", b"Ns."),
        (b"(", b"\x91."),
        (b"\x8f(", b"\x90."),
        (b"cbuiltins\nset\n]", b"a\x85R."),
        (b"ccollections\nOrderedDict\n]", b"N\x86a\x85R."),
        (b"}(", b"NK\x01Nu."),
        (b"", b"."),
        (b"", b"Q."),
    ],
)
def test_bombs_are_refused_at_once(bomb: bytes, before: bytes, after: bytes) -> None:
    data = b"\x80\x04" + before + bomb + after
    begun = time.process_time()
    with pytest.raises(LimitExceededError, match="the limit"):
        load(data)
    found = mentions(lambda length: data[:length], len(data))
    assert found is None or found[1].problem
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("protocol", range(6))
def test_honest_tuples_are_read(protocol: int) -> None:
    pair = (0.9, 0.999)
    honest: Any = {(index, pair): [pair, (pair, (pair, "text"))] for index in range(200)}
    honest["numbers"] = (3, tuple(range(700)), None)
    assert load(pickle.dumps(honest, protocol))[0] == honest


@given(st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02}", doubled(8), b"("]))
def test_any_opcodes_are_read_or_refused(data: bytes, before: bytes) -> None:
    with suppress(CheckpointError):
        load(before + data + b".")
