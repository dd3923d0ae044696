"""State in blocks of 8 bits, as bitsandbytes keeps it, and back: its own functions do the arithmetic.

Each 256 neighbouring elements are codes of a table (`qmap`) times the greatest magnitude among them (`absmax`). The
first moment has a signed table, the second an unsigned one; tensors of fewer than 4096 elements stay in 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any

from optimstate.errors import PlanError
from optimstate.plan.expressions.evaluate import dtype_of, shape_of
from optimstate.state.optimizer import Slots
from optimstate.tensors.compute import computed, to_torch
from optimstate.tensors.lazy import LazyTensor

__all__ = ["BLOCK", "SMALL", "coded", "decoded", "error_bound", "plain", "recoded", "unnested", "written"]

BLOCK = 256
SMALL = 4096  # bitsandbytes' default min_8bit_size
NESTED = "__bnb_optimizer_quant_state__"


@cache
def library() -> Any:
    """The module `bitsandbytes.functional`.

    Raises:
        PlanError: It is not installed.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise PlanError(
            f"8-bit state is coded by bitsandbytes, which cannot be imported: {error}",
            hint="pip install bitsandbytes, or convert to or from a 32-bit optimizer where it is installed.",
        ) from None
    return functional


@cache
def table(*, signed: bool) -> Any:
    """The 256 values that codes stand for, a float32 tensor in ascending order."""
    return library().create_dynamic_map(signed=signed)


@cache
def error_bound(*, signed: bool) -> float:
    """How far a coded element can be from its value, relative to the greatest magnitude in its block."""
    values = table(signed=signed)
    gap = float((values[1:] - values[:-1]).max()) / 2
    lowest = 1.0 + float(values[0]) if signed else 0.0  # -1 itself has no code
    return 1.01 * max(gap, lowest)  # its search does not always find the nearest code: 0.2 % more was seen


def unnested(slots: Slots) -> dict[str, Any]:
    """The slots side by side, whether or not they stand in an entry of their own."""
    nested = slots.get(NESTED)
    if not isinstance(nested, Mapping):
        return dict(slots)
    return {**{slot: value for slot, value in slots.items() if slot != NESTED}, **nested}


def written(slots: Mapping[str, Any]) -> dict[str, Any]:
    """The slots as the installed bitsandbytes writes them; side by side, which all versions read, where none is."""
    try:
        from bitsandbytes.optim.optimizer import Optimizer8bit
    except ImportError:
        return dict(slots)
    if getattr(Optimizer8bit, "_FSDP_WRAPPED_QUANT_STATE_KEY", None) != NESTED:
        return dict(slots)
    beside = {slot: value for slot, value in slots.items() if slot == "step"}
    return {**beside, NESTED: {slot: value for slot, value in slots.items() if slot != "step"}}


def is_coded(value: Any) -> bool:
    """Whether a state is in codes."""
    return dtype_of(value) == "uint8"


def coded(value: Any, number: str, *, signed: bool) -> dict[str, Any]:
    """The slots of one moment: `state1`, `qmap1` and `absmax1`, or those of number 2.

    Args:
        value: The moment, floating, of any shape; small ones are kept in 32 bits.
        number: `1` or `2`.
        signed: Whether it can be negative.
    """
    shape = shape_of(value) or ()
    count = prod(shape)
    if count < SMALL:
        return {f"state{number}": _float(value)}
    library()
    blocks = -(-count // BLOCK)
    if not isinstance(value, LazyTensor):
        codes, absmax = _coded(value.detach(), signed=signed)
        return {f"state{number}": codes, f"qmap{number}": table(signed=signed).clone(), f"absmax{number}": absmax}

    def codes_of(first: int, last: int) -> Any:
        start, stop = first - first % BLOCK, min(-(-last // BLOCK) * BLOCK, count)
        return _coded(_part(value, start, stop), signed=signed)[0][first - start : last - start]

    def absmax_of(first: int, last: int) -> Any:
        return _coded(_part(value, first * BLOCK, min(last * BLOCK, count)), signed=signed)[1]

    return {
        f"state{number}": computed(value, "uint8", shape, codes_of),
        f"qmap{number}": computed(value, "float32", (BLOCK,), lambda first, last: table(signed=signed)[first:last]),
        f"absmax{number}": computed(value, "float32", (blocks,), absmax_of),
    }


def decoded(slots: Mapping[str, Any], number: str) -> Any:
    """The moment that `state1`, `qmap1` and `absmax1`, or those of number 2, stand for: float32, exactly."""
    codes = slots[f"state{number}"]
    if not is_coded(codes):
        return codes
    qmap, absmax = slots[f"qmap{number}"], slots[f"absmax{number}"]
    library()
    if not isinstance(codes, LazyTensor):
        return _decoded(codes, qmap, absmax)

    def values_of(first: int, last: int) -> Any:
        start = first - first % BLOCK
        scales = to_torch(absmax.narrow(0, start // BLOCK, -(-last // BLOCK) - start // BLOCK))
        return _decoded(_part(codes, start, last), to_torch(qmap), scales)[first - start :]

    return computed(codes, "float32", codes.shape, values_of)


def plain(slots: Slots) -> dict[str, Any]:
    """The slots with their moments decoded, and without what codes need."""
    own = unnested(slots)
    coding = ("qmap", "absmax", "max", "new_max")
    made = {slot: value for slot, value in own.items() if slot.rstrip("12") not in coding}
    return {**made, **{slot: decoded(own, slot[-1]) for slot in ("state1", "state2") if slot in own}}


def recoded(slots: Slots) -> dict[str, Any]:
    """The slots with their moments coded."""
    made: dict[str, Any] = {}
    for slot, value in slots.items():
        moment = slot in ("state1", "state2")
        made.update(coded(value, slot[-1], signed=slot == "state1") if moment else {slot: value})
    return written(made)


def _coded(value: Any, *, signed: bool) -> tuple[Any, Any]:
    code = table(signed=signed)
    codes, state = library().quantize_blockwise(value.float().contiguous(), code=code, blocksize=BLOCK)
    return codes, state.absmax


def _decoded(codes: Any, qmap: Any, absmax: Any) -> Any:
    return library().dequantize_blockwise(codes.contiguous(), absmax=absmax, code=qmap, blocksize=BLOCK)


def _part(value: LazyTensor, first: int, last: int) -> Any:
    return to_torch(value.reshape((prod(value.shape),)).narrow(0, first, last - first))


def _float(value: Any) -> Any:
    from optimstate.plan.expressions.evaluate import backend_of

    return value if dtype_of(value) == "float32" else backend_of(value).cast(value, "float32")
