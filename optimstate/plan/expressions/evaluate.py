"""What the engine does to tensors, the same for those in files and for live ones.

A tensor is a `LazyTensor` or a plain `torch.Tensor`; everything else in a state is moved and copied, never computed
with.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol

from optimstate.errors import MigrationError
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Shape
from optimstate.tensors.compute import concatenated, filled, mapped, reduced, taken
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, cloned

__all__ = [
    "LAZY",
    "LIVE",
    "Backend",
    "backend_of",
    "copied",
    "dtype_of",
    "evaluated",
    "identity",
    "number_of",
    "shape_of",
]


def _is_live(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_plain(value: Any) -> bool:
    """Whether a live tensor is dense and of no subclass, so that layout operations mean what they say."""
    torch = sys.modules["torch"]
    plain = type(value) is torch.Tensor or type(value) is torch.nn.Parameter
    return plain and value.layout is torch.strided and not value.is_quantized


def shape_of(value: Any) -> Shape | None:
    """The shape of a tensor, () of a number or of None, and None for everything else."""
    if isinstance(value, LazyTensor):
        return value.shape
    if value is None or isinstance(value, bool | int | float | complex):
        return ()
    return tuple(value.shape) if _is_live(value) and _is_plain(value) else None


def dtype_of(value: Any) -> str | None:
    """The dtype of a tensor as `LazyTensor` calls it, else None."""
    if isinstance(value, LazyTensor):
        return value.dtype
    return str(value.dtype).removeprefix("torch.") if _is_live(value) else None


def number_of(value: Any) -> Any:
    """The value of a number or of a tensor of one element; None for everything else."""
    if isinstance(value, bool | int | float | complex):
        return value
    if shape_of(value) is None or value is None or prod(value.shape) != 1:
        return None
    return value.item()


def identity(value: Any) -> tuple[Any, ...]:
    """What two tensors have in common exactly when they are the same elements in memory or in a file."""
    if isinstance(value, LazyTensor):
        return id(value.storage), value.offset, value.shape, value.stride
    if _is_live(value) and _is_plain(value):
        storage = value.untyped_storage()
        place = storage.data_ptr() or ("no memory", storage._cdata)  # of a meta tensor
        return "live", place, value.storage_offset(), tuple(value.shape), value.stride()
    return (id(value),)


def copied(value: Any) -> Any:
    """A copy that shares no memory with the original. A container that stands in several places is copied once."""
    return _copied(value, {})


def _live_copy(value: Any) -> Any:
    try:
        return value.detach().clone().requires_grad_(value.requires_grad)
    except NotImplementedError:  # a subclass without a clone of its own, as torchao's low-bit state: copy its parts
        if not hasattr(value, "__tensor_flatten__"):
            raise MigrationError.of(
                "slot", f"a tensor of {type(value).__qualname__} cannot be copied: it has no clone"
            ) from None
        names, context = value.__tensor_flatten__()
        parts = {name: _live_copy(getattr(value, name)) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())


def _copied(value: Any, done: dict[int, Any]) -> Any:
    if _is_live(value):
        return _live_copy(value)
    if isinstance(value, LazyTensor | Opaque):
        return cloned(value)
    if isinstance(value, bool | int | float | complex | str | None):
        return value
    if id(value) not in done:
        done[id(value)] = _copied_container(value, done)
    return done[id(value)]


def _copied_container(value: Any, done: dict[int, Any]) -> Any:
    import copy

    if isinstance(value, Mapping):
        made = copy.copy(value)
        for key, item in value.items():
            made[key] = _copied(item, done)  # type: ignore[index]
        return made
    if type(value) in (list, tuple):
        return type(value)(_copied(item, done) for item in value)
    return copy.deepcopy(value)


class Backend(Protocol):
    """What expressions are computed with."""

    def narrow(self, value: Any, dim: int, start: int, length: int, step: int) -> Any:
        """A part of a dimension."""

    def permute(self, value: Any, dims: Sequence[int]) -> Any:
        """Dimensions in another order."""

    def reshape(self, value: Any, shape: Shape) -> Any:
        """Another shape."""

    def expand(self, value: Any, dim: int, size: int) -> Any:
        """The only place of a dimension, repeated."""

    def concatenate(self, values: Sequence[Any], dim: int) -> Any:
        """One after the other."""

    def multiply(self, value: Any, factor: float) -> Any:
        """Every element times a factor."""

    def add(self, value: Any, number: float) -> Any:
        """Every element plus a number."""

    def take(self, value: Any, dim: int, index: Sequence[int]) -> Any:
        """Rows of a dimension by their indices."""

    def power(self, value: Any, exponent: float) -> Any:
        """Every element to a power."""

    def cast(self, value: Any, dtype: str) -> Any:
        """Another dtype."""

    def mean(self, values: Sequence[Any], dims: Sequence[int], weights: Sequence[float]) -> Any:
        """The mean over dimensions, kept, or of several values by weight."""

    def outer(self, row: Any, col: Any, shape: Shape) -> Any:
        """What two means over a dimension each say of the whole."""

    def full(self, like: Any, shape: Shape, value: float) -> Any:
        """A tensor of one value."""

    def own(self, value: Any, taken: set[int]) -> Any:
        """The same elements, row-major, in memory that holds nothing else and that nothing has taken before."""


class _Lazy:
    """Tensors in files: references to extents as far as possible, otherwise torch when the result is read."""

    def narrow(self, value: LazyTensor, dim: int, start: int, length: int, step: int) -> LazyTensor:
        return value.narrow(dim, start, length, step)

    def permute(self, value: LazyTensor, dims: Sequence[int]) -> LazyTensor:
        return value.permute(dims)

    def reshape(self, value: LazyTensor, shape: Shape) -> LazyTensor:
        return value.reshape(shape)

    def expand(self, value: LazyTensor, dim: int, size: int) -> LazyTensor:
        return value.expand(dim, size)

    def concatenate(self, values: Sequence[LazyTensor], dim: int) -> LazyTensor:
        return concatenated(values, dim)

    def multiply(self, value: LazyTensor, factor: float) -> LazyTensor:
        return mapped(value, value.dtype, lambda block: block * factor)

    def add(self, value: LazyTensor, number: float) -> LazyTensor:
        return mapped(value, value.dtype, lambda block: block + number)

    def take(self, value: LazyTensor, dim: int, index: Sequence[int]) -> LazyTensor:
        return taken(value, dim, index)

    def power(self, value: LazyTensor, exponent: float) -> LazyTensor:
        return mapped(value, value.dtype, lambda block: block**exponent)

    def cast(self, value: LazyTensor, dtype: str) -> LazyTensor:
        def function(block: Any) -> Any:
            from optimstate.installed_torch import dtype_of

            return block.to(dtype_of(dtype))

        return value if value.dtype == dtype else mapped(value, dtype, function)

    def mean(self, values: Sequence[LazyTensor], dims: Sequence[int], weights: Sequence[float]) -> LazyTensor:
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(values[0].shape))
        return reduced(values, shape, lambda found: LIVE.mean(found, dims, weights))

    def outer(self, row: LazyTensor, col: LazyTensor, shape: Shape) -> LazyTensor:
        return reduced([row, col], shape, lambda found: LIVE.outer(found[0], found[1], shape))

    def full(self, like: LazyTensor, shape: Shape, value: float) -> LazyTensor:
        return filled(like, shape, value)

    def own(self, value: LazyTensor, taken: set[int]) -> LazyTensor:  # noqa: ARG002 - bytes in files are shared freely
        return value.contiguous()


class _Live:
    """Tensors in memory, through torch."""

    def narrow(self, value: Any, dim: int, start: int, length: int, step: int) -> Any:
        part = value.narrow(dim, start, (length - 1) * step + 1 if length else 0)
        return part if step == 1 else part[(slice(None),) * dim + (slice(None, None, step),)]

    def permute(self, value: Any, dims: Sequence[int]) -> Any:
        return value.permute(*dims)

    def reshape(self, value: Any, shape: Shape) -> Any:
        return value.reshape(shape)

    def expand(self, value: Any, dim: int, size: int) -> Any:
        return value.expand(*value.shape[:dim], size, *value.shape[dim + 1 :])

    def concatenate(self, values: Sequence[Any], dim: int) -> Any:
        from optimstate.installed_torch import torch

        return torch.cat(list(values), dim)

    def multiply(self, value: Any, factor: float) -> Any:
        return value * factor

    def add(self, value: Any, number: float) -> Any:
        return value + number

    def take(self, value: Any, dim: int, index: Sequence[int]) -> Any:
        from optimstate.installed_torch import torch

        return value.index_select(dim, torch.tensor(index, device=value.device))

    def power(self, value: Any, exponent: float) -> Any:
        return value**exponent

    def cast(self, value: Any, dtype: str) -> Any:
        from optimstate.installed_torch import dtype_of

        return value.to(dtype_of(dtype))

    def mean(self, values: Sequence[Any], dims: Sequence[int], weights: Sequence[float]) -> Any:
        if dims:
            return values[0].mean(dim=tuple(dims), keepdim=True)
        from optimstate.installed_torch import torch

        dtype = values[0].dtype
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        total = values[0].to(wide) * weights[0]
        for value, weight in zip(values[1:], weights[1:], strict=True):
            total = total + value.to(wide) * weight
        return total.to(dtype)

    def outer(self, row: Any, col: Any, shape: Shape) -> Any:
        whole = row.mean(dim=-2, keepdim=True)
        return (row * col / whole).nan_to_num(0.0, 0.0, 0.0).reshape(shape)

    def full(self, like: Any, shape: Shape, value: float) -> Any:
        return like.new_full(shape, value)

    def own(self, value: Any, taken: set[int]) -> Any:
        from optimstate.installed_torch import torch

        storage = value.untyped_storage()
        whole = storage.nbytes() == value.numel() * value.element_size() and value.is_contiguous()
        if not whole or storage.data_ptr() in taken:
            value = value.clone(memory_format=torch.contiguous_format)
        taken.add(value.untyped_storage().data_ptr())
        return value


LAZY: Backend = _Lazy()
LIVE: Backend = _Live()


def backend_of(value: Any) -> Backend:
    """The backend for a tensor."""
    return LAZY if isinstance(value, LazyTensor) else LIVE


def evaluated(expression: Expr, leaves: Mapping[int, Any], memo: dict[int, Any]) -> Any:
    """The value of an expression of a slot or parameter (see `slots`).

    Args:
        expression: Its steps have been translated for the slot.
        leaves: The value of each leaf, by the leaf's id.
        memo: What was computed already, by the node's id.
    """
    if isinstance(expression, ex.Leaf):
        return leaves[id(expression)]
    found = memo.get(id(expression))
    if found is None:
        inputs = [evaluated(item, leaves, memo) for item in expression.inputs]
        found = memo[id(expression)] = _step(expression, inputs)
    return found


def _step(node: ex.Node, inputs: Sequence[Any]) -> Any:
    backend, step, value = backend_of(inputs[0]), node.step, inputs[0]
    match step:
        case ex.Narrow():
            return backend.narrow(value, step.dim, step.start, step.length, step.step)
        case ex.Take():
            return backend.take(value, step.dim, step.index)
        case ex.Add():
            return backend.add(value, step.number)
        case ex.Cat():
            return backend.concatenate(inputs, step.dim)
        case ex.Permute():
            return backend.permute(value, step.dims)
        case ex.Reshape():
            return backend.reshape(value, step.shape)
        case ex.Tile():
            return _tiled(backend, value, step, tuple(value.shape))
        case ex.Pad():
            return _padded(backend, value, step, tuple(value.shape))
        case ex.Full():
            return _full(backend, value, step, tuple(value.shape))
        case ex.Multiply():
            return backend.multiply(value, step.factor)
        case ex.Cast():
            return backend.cast(value, step.dtypes[""])
        case ex.Mean():
            return backend.mean(inputs, step.dims, step.weights)
        case ex.Product():
            assert node.shape is not None
            return backend.outer(inputs[0], inputs[1], node.shape)
        case _:
            raise AssertionError(f"{step} is not a step of a slot")


def _number(fill: str | float | None) -> float:
    """The value of a fill; where the live model's is to stand, zero stands until that is put there."""
    return float(fill) if isinstance(fill, int | float) else 0.0


def _full(backend: Backend, value: Any, step: ex.Full, shape: Shape) -> Any:
    if step.fill.default != "mean":
        return backend.full(value, shape, _number(step.fill.default))
    made = backend.mean([value], range(len(shape)), ()) if shape else value
    for dim, size in enumerate(shape):
        made = backend.expand(made, dim, size)
    return made


def _tiled(backend: Backend, value: Any, step: ex.Tile, shape: Shape) -> Any:
    place = step.dim + 1 if step.each else step.dim
    raised = backend.reshape(value, (*shape[:place], 1, *shape[place:]))
    times = backend.expand(raised, place, step.times)
    return backend.reshape(times, (*shape[: step.dim], shape[step.dim] * step.times, *shape[step.dim + 1 :]))


def _padded(backend: Backend, value: Any, step: ex.Pad, shape: Shape) -> Any:
    fill = step.fill.default
    new = (*shape[: step.dim], step.count, *shape[step.dim + 1 :])
    if fill == "mean":
        more = backend.expand(backend.mean([value], [step.dim], ()), step.dim, step.count)
    elif fill == "wrap":
        whole, rest = divmod(step.count, shape[step.dim])
        parts = [value] * whole + ([backend.narrow(value, step.dim, 0, rest, 1)] if rest else [])
        return backend.concatenate([value, *parts], step.dim)
    else:
        more = backend.full(value, new, _number(fill))
    return backend.concatenate([value, more], step.dim)
