"""Values as reports show them: in few words, and as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optimstate.describe import bounded, describe
from optimstate.formats.pickles.tensors import numpy_array, numpy_scalar, tensor_kind
from optimstate.state.records import tensor_record
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import AttributedTensor, GlobalName, Opaque, OpaqueFile, path_key

__all__ = ["MAX_SHOWN", "as_numbers", "form_of", "plain"]


def form_of(value: Any) -> str:
    """A leaf in few words: `float32[12, 8]`, a number, or the class of a record."""
    if isinstance(value, LazyTensor):
        return f"{value.dtype}{list(value.shape)}" + _more(value)
    record = tensor_record(value)
    return str(record) if record is not None else str(plain(value))


def _more(tensor: LazyTensor) -> str:
    """What a tensor has beside its elements: what a program had set on it."""
    found = tensor.attributes if isinstance(tensor, AttributedTensor) else {}
    return " with " + ", ".join(f"{bounded(key)} {plain(value)}" for key, value in found.items()) if found else ""


MAX_SHOWN = 4096
"""Items of one value that are shown; of what is larger, the size. Shared lists can make a small file endless."""


def plain(value: Any) -> Any:
    """A leaf as JSON can hold it; tensors of one element become numbers."""
    return _plain(value, [MAX_SHOWN])


def _plain(value: Any, room: list[int]) -> Any:
    if isinstance(value, LazyTensor):
        shown = value.numel == 1 and value.dtype in _SHOWN_AS_NUMBER
        return _plain(value.item(), room) if shown else form_of(value)
    if isinstance(value, Storage):
        return f"storage of {value.nbytes:,} bytes"
    if isinstance(value, OpaqueFile):
        return f"file of {value.nbytes:,} bytes"
    if isinstance(value, list | tuple | Mapping):
        room[0] -= len(value)
        if room[0] < 0:
            return f"{type(value).__name__} of {len(value)}"
        if isinstance(value, Mapping):
            return {str(path_key(key)): _plain(item, room) for key, item in value.items()}
        return [_plain(item, room) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Opaque):
        number, array = numpy_scalar(value), numpy_array(value)
        if number is not None:
            return _plain(number, room)
        if array is not None:
            return f"numpy {array.dtype}{list(array.shape)}"
    if isinstance(value, Opaque | GlobalName):
        record = tensor_record(value)
        return (tensor_kind(value) or describe(value)) if record is None else str(record)
    return bounded(value) if value is None or isinstance(value, bool | int | float | str) else describe(value)


def as_numbers(value: Any) -> Any:
    """The same value, in which tensors of one element and NumPy's scalars are Python's numbers.

    Args:
        value: A leaf, or a mapping or list, of which copies are returned.
    """
    return _as_numbers(value, [MAX_SHOWN])


def _as_numbers(value: Any, room: list[int]) -> Any:
    if isinstance(value, LazyTensor):
        return value.item() if value.numel == 1 and value.dtype in _SHOWN_AS_NUMBER else value
    if isinstance(value, Opaque):
        number = numpy_scalar(value)
        return value if number is None else number
    if isinstance(value, Mapping | list | tuple):
        room[0] -= len(value)
        if room[0] < 0:
            return value
        if isinstance(value, Mapping):
            return {key: _as_numbers(item, room) for key, item in value.items()}
        made = [_as_numbers(item, room) for item in value]
        return tuple(made) if isinstance(value, tuple) else made
    return value


_SHOWN_AS_NUMBER = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}
