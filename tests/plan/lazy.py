"""Tensors in files without files: the same elements as live ones, read on demand."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from optimstate.errors import MigrationError
from optimstate.io.extents import Extent
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.plan import Plan
from optimstate.tensors.compute import to_torch
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage
from tests.support import torch_bytes


class Bytes:
    """A source of bytes in memory, cut in pieces by whoever asks."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(self.data)
        return self.data[offset : offset + length]


def lazy(tensor: torch.Tensor) -> LazyTensor:
    """The tensor with its strides, over a storage of its span."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    flat = tensor.as_strided((span,), (1,), tensor.storage_offset()).contiguous()
    data = ctypes.string_at(flat.data_ptr(), span * flat.element_size()) if span else b""
    pieces = (Extent(Bytes(data), 0, len(data)),) if data else ()
    storage = Storage(pieces, len(data), DTYPES[dtype].storage or "UntypedStorage")
    return LazyTensor(storage, dtype, tuple(tensor.shape), tuple(tensor.stride()))


def lazy_tree(value: Any) -> Any:
    """The tree with every live tensor as a lazy one."""
    if isinstance(value, torch.Tensor):
        return lazy(value)
    if isinstance(value, dict):
        return {key: lazy_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(lazy_tree, value))
    return value


def same(one: Any, other: Any) -> bool:
    """Whether a lazy or live tensor, or anything else, has the same dtype, shape and bits."""
    one, other = (to_torch(x) if isinstance(x, LazyTensor) else x for x in (one, other))
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch_bytes(one) == torch_bytes(other)


def applied(text: str, tree: Any) -> Any:
    """A tree in files to which a plan was applied."""
    return apply_plan(Plan.from_toml(text), lazy_tree(tree))[0]


def kinds(text: str, tree: Any) -> set[str]:
    """The kinds of problems with which a plan is refused."""
    with pytest.raises(MigrationError) as error:
        applied(text, tree)
    return {problem.kind for problem in error.value.problems}
