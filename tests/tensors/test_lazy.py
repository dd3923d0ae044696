"""Lazy tensors against torch: every view and every computation, read in blocks of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimstate.io.extents import chunks
from optimstate.tensors.compute import concatenated, filled, mapped, reduced, to_torch
from optimstate.tensors.lazy import LazyTensor
from tests.plan.lazy import lazy
from tests.support import torch_bytes

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def read(tensor: LazyTensor, block: int) -> bytes:
    return b"".join(chunks(tensor.extents(), block))


def assert_same(ours: LazyTensor, theirs: torch.Tensor, block: int = 7) -> None:
    assert ours.shape == tuple(theirs.shape)
    assert read(ours, block) == torch_bytes(theirs)
    assert read(ours.contiguous(), block) == torch_bytes(theirs)


def tensor_of(shape: tuple[int, ...], turned: bool = False) -> torch.Tensor:
    count = torch.Size(shape).numel()
    made = torch.arange(float(count)).reshape(shape)
    return made.permute(*reversed(range(len(shape)))) if turned and shape else made


@settings(max_examples=60, deadline=None)
@given(shapes.filter(bool), st.booleans(), st.data())
def test_views(shape: tuple[int, ...], turned: bool, data: Any) -> None:
    theirs = tensor_of(shape, turned)
    ours = lazy(theirs)
    for _ in range(2):
        dim = data.draw(st.integers(0, theirs.ndim - 1))
        kind = data.draw(st.sampled_from(["narrow", "permute", "reshape", "expand"]))
        if kind == "narrow":
            start = data.draw(st.integers(0, theirs.shape[dim]))
            step = data.draw(st.integers(1, 2))
            length = data.draw(st.integers(0, len(range(start, theirs.shape[dim], step))))
            theirs = theirs[(slice(None),) * dim + (slice(start, start + length * step, step),)]
            ours = ours.narrow(dim, start, length, step)
        elif kind == "permute":
            order = data.draw(st.permutations(range(theirs.ndim)))
            theirs, ours = theirs.permute(order), ours.permute(order)
        elif kind == "reshape":
            theirs, ours = theirs.reshape(-1, 1), ours.reshape((theirs.numel(), 1))
        elif theirs.shape[dim] == 1:
            size = data.draw(st.integers(1, 3))
            theirs = theirs.expand(*theirs.shape[:dim], size, *theirs.shape[dim + 1 :])
            ours = ours.expand(dim, size)
        assert_same(ours, theirs, data.draw(st.integers(1, 64)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans(), st.integers(1, 40))
def test_concatenation(dim: int, sizes: list[int], turned: bool, block: int) -> None:
    parts = []
    for number, size in enumerate(sizes):
        shape = [2, 3, 2]
        shape[dim] = size
        part = torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 100 * number
        parts.append(part.transpose(0, 2).contiguous().transpose(0, 2) if turned else part)
    assert_same(concatenated([lazy(part) for part in parts], dim), torch.cat(parts, dim), block)


def test_long_runs_stay_where_they_are() -> None:
    parts = [torch.randn(2, 40_000), torch.randn(2, 20_000)]
    joined = concatenated([lazy(part) for part in parts], 1)
    assert len(joined.storage.pieces) == 4
    assert_same(joined, torch.cat(parts, 1), 1 << 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 3, 64, 1 << 20])
def test_computing_block_by_block(dtype: torch.dtype, block: int) -> None:
    theirs = torch.randn(5, 7).to(dtype).t()
    ours = mapped(lazy(theirs), "float32", lambda x: (x * 0.3).to(torch.float32))
    assert_same(ours, (theirs * 0.3).to(torch.float32), block)
    assert ours.storage.kind == "FloatStorage"


def test_means_and_fills() -> None:
    theirs = torch.randn(4, 6)
    mean = reduced([lazy(theirs)], (1, 6), lambda found: found[0].mean(0, keepdim=True))
    assert_same(mean, theirs.mean(0, keepdim=True))
    assert_same(filled(lazy(theirs), (2, 3), 0.0), torch.zeros(2, 3))
    assert_same(filled(lazy(theirs), (2, 3), 1.5), torch.full((2, 3), 1.5))
    assert filled(lazy(theirs), (2, 3), 0.0).storage.pieces[0].source is None


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]
)
def test_to_torch(dtype: torch.dtype) -> None:
    theirs = (torch.arange(12).reshape(3, 4) % 3).to(dtype)
    for view in (theirs, theirs.t(), theirs[1:, ::2], theirs[:0]):
        assert torch.equal(to_torch(lazy(view)), view)


def test_a_clone_of_a_view_holds_no_more_than_it_shows() -> None:
    part = lazy(torch.arange(12.0)).narrow(0, 3, 4)
    assert part.storage.nbytes == 48
    assert part.clone().storage.nbytes == part.contiguous().storage.nbytes == 16
