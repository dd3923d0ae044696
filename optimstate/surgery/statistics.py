"""Elements of lazy tensors as numbers, a block at a time, through torch: for `inspect`, `verify` and `diff`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from optimstate.errors import UnsupportedCheckpointError
from optimstate.io.extents import Progress, chunks
from optimstate.problems import Kind
from optimstate.record import Record
from optimstate.state.algorithms.slots import Algorithm
from optimstate.tensors.dtypes import COMPLEX, DTYPES, INEXACT
from optimstate.tensors.lazy import LazyTensor

__all__ = [
    "Statistics",
    "blocks",
    "can_be_read",
    "is_floating",
    "is_measurable",
    "measured",
    "oddities",
    "second_moments",
    "statistics",
]

BLOCK_ELEMENTS = 1 << 16  # a block and its copy in double precision stay in the cache of a core


def blocks(tensor: LazyTensor) -> Iterator[Any]:
    """The elements in row-major order as one-dimensional float64 (or complex128) tensors of at most 2**16 elements.

    Raises:
        UnsupportedCheckpointError: Torch has no conversion from the dtype.
    """
    from optimstate.installed_torch import torch

    wide = torch.complex128 if tensor.dtype.startswith(COMPLEX) else torch.float64
    return (block.to(wide) for block in _blocks(tensor))


def _blocks(tensor: LazyTensor) -> Iterator[Any]:
    """The same in a dtype that torch computes with, where that holds every element exactly: float32 at the least."""
    from optimstate.installed_torch import dtype_of, torch

    dtype = dtype_of(tensor.dtype)
    for data in chunks(tensor.extents(), BLOCK_ELEMENTS * tensor.itemsize):
        block = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)
        if tensor.flags:
            block = -block if "neg" in tensor.flags else block
            block = block.conj().resolve_conj() if "conj" in tensor.flags else block
        try:
            if dtype.is_complex:
                yield block if tensor.itemsize >= 8 else block.to(torch.complex64)
            else:
                yield block if dtype.is_floating_point and tensor.itemsize >= 4 else block.to(_exact(tensor.dtype))
        except RuntimeError as error:
            raise UnsupportedCheckpointError(f"elements of dtype {tensor.dtype} cannot be computed with") from error


def _exact(dtype: str) -> Any:
    from optimstate.installed_torch import torch

    return torch.float32 if dtype.startswith(("float", "bfloat")) else torch.float64


class Statistics(Record):
    """Statistics of the elements of one or several tensors.

    Attributes:
        elements: How many there are.
        nan: How many are not a number; they, and infinities, are left out of `norm`, `minimum` and `maximum`.
        inf: How many are infinite.
        zeros: How many are zero, of either sign.
        negative: How many are below zero; of complex ones the real part.
        norm: The 2-norm, summed in double precision; None where it is beyond that.
        minimum: The least finite element (real part); None where there is none.
        maximum: The greatest.
    """

    elements: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    negative: int = 0
    norm: float | None = 0.0
    minimum: float | None = None
    maximum: float | None = None

    @property
    def nonfinite(self) -> int:
        """How many are not finite."""
        return self.nan + self.inf

    @property
    def rms(self) -> float | None:
        """The root mean square of the finite elements, which is comparable between tensors of any size."""
        finite = self.elements - self.nonfinite
        return self.norm / math.sqrt(finite) if finite and self.norm is not None else None

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of the elements of both together."""
        lows = [value for value in (self.minimum, other.minimum) if value is not None]
        highs = [value for value in (self.maximum, other.maximum) if value is not None]
        norm = None if self.norm is None or other.norm is None else math.hypot(self.norm, other.norm)
        return Statistics(
            self.elements + other.elements,
            self.nan + other.nan,
            self.inf + other.inf,
            self.zeros + other.zeros,
            self.negative + other.negative,
            norm if norm is not None and math.isfinite(norm) else None,
            min(lows, default=None),
            max(highs, default=None),
        )


def statistics(tensor: LazyTensor, progress: Progress | None = None) -> Statistics:
    """Counts, 2-norm and range of a tensor, in one pass and in constant memory.

    Args:
        tensor: Its elements are read a block at a time; numbers of any kind.
        progress: Called with the bytes read since the last call.

    Raises:
        UnsupportedCheckpointError: Torch has no conversion from the dtype.
    """
    found = Statistics()
    for block in _blocks(tensor):
        found += of_block(block)
        if progress is not None:
            progress(block.numel() * tensor.itemsize)
    return found


def of_block(block: Any) -> Statistics:
    from optimstate.installed_torch import torch

    count = block.numel()
    zeros = count - int(torch.count_nonzero(block))
    real = block.real if block.is_complex() else block
    low, high = map(float, torch.aminmax(real))
    nan = inf = 0
    # NaN spreads into the range and infinities end it, so that a finite range spares looking for them.
    if not (math.isfinite(low) and math.isfinite(high)) or block.is_complex():
        nan, inf = int(block.isnan().sum()), int((block.isinf() & ~block.isnan()).sum())
        if nan or inf:
            block = block[block.isfinite()]
            if not block.numel():
                return Statistics(count, nan, inf, zeros, int((real < 0).sum()))
        low, high = map(float, torch.aminmax(block.real if block.is_complex() else block))
    negative = int((real < 0).sum()) if low < 0 or inf else 0
    return Statistics(count, nan, inf, zeros, negative, _norm(block), low, high)


def _norm(block: Any) -> float | None:
    from optimstate.installed_torch import torch

    wide = (torch.view_as_real(block).reshape(-1) if block.is_complex() else block).double()
    square = float(torch.dot(wide, wide))
    if 1e-200 < square < math.inf or not bool(wide.any()):
        return math.sqrt(square)
    largest = float(wide.abs().max())  # squares leave the range of a double before the norm does
    wide = wide / largest
    norm = largest * math.sqrt(float(torch.dot(wide, wide)))
    return norm if math.isfinite(norm) else None


def measured(slots: Iterable[tuple[Any, Any]], progress: Progress | None = None) -> dict[str, Statistics]:
    """The statistics of every value of floating-point or complex numbers; what is none is not in the result.

    Args:
        slots: Names and values: the slots of a parameter, the tensors of a model.
        progress: Called with the bytes read since the last call.
    """
    return {str(name): statistics(value, progress) for name, value in slots if is_measurable(value)}


def is_measurable(value: Any) -> bool:
    """Whether a value is a tensor of floating-point or complex numbers that torch can compute with."""
    return isinstance(value, LazyTensor) and value.numel > 0 and is_floating(value) and can_be_read(value)


def is_floating(tensor: LazyTensor) -> bool:
    """Whether its dtype has NaN and infinities."""
    return tensor.dtype.startswith(INEXACT)


def can_be_read(tensor: LazyTensor) -> bool:
    """Whether torch has its dtype, with one element for each number."""
    return DTYPES[tensor.dtype].in_torch and tensor.dtype != "float4_e2m1fn_x2"


def second_moments(algorithm: Algorithm | None) -> set[str]:
    """The slots that hold averages of squares, which are never negative."""
    if algorithm is None:
        return {"exp_avg_sq"}
    return {slot for slot, kind in algorithm.slots.items() if 2 in (kind.degree, kind.power)}


def oddities(found: Mapping[str, Statistics], step: Any, second: Collection[str]) -> Iterator[tuple[Kind, str]]:
    """What is wrong with the numbers in one parameter's slots: the kind of problem, and what was found.

    Args:
        found: The statistics of its slots.
        step: Its step count, where it has one.
        second: The slots that are never negative.
    """
    for slot, numbers in found.items():
        if numbers.nonfinite:
            yield "numbers", f"{slot}: {numbers.nonfinite} of {numbers.elements} are NaN or inf"
        if slot in second and numbers.negative:
            least = "-inf" if numbers.minimum is None or numbers.minimum >= 0 else f"{numbers.minimum:.3g}"
            yield "numbers", f"{slot} has negative values: {numbers.negative}, down to {least}"
    if not isinstance(step, int | float) or step <= 2:
        return
    averages = [slot for slot in found if slot != "step" and found[slot].elements > 1]
    empty = [slot for slot in averages if found[slot].zeros == found[slot].elements]
    if empty and len(empty) == len(averages):
        yield "moments", f"{', '.join(empty)} are all zero at step {step:g}"
    elif "exp_avg_sq" in empty and "exp_avg" in averages:
        yield "moments", f"exp_avg_sq is all zero at step {step:g}, but exp_avg is not"
