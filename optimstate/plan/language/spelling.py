"""How operations are written in a plan file: `key = value` to operations, or what would have been right."""

from __future__ import annotations

from typing import Any

from optimstate.errors import PlanSyntaxError
from optimstate.plan.expressions import tree as ex
from optimstate.plan.language.operation import Operation, toml_value
from optimstate.plan.language.operations import (
    CastTo,
    Concat,
    PermuteDims,
    Repeat,
    ReshapeDims,
    Resize,
    ScaleBy,
    Slice,
    Split,
    Stack,
    Transpose,
    Unstack,
)
from optimstate.tensors.dtypes import DTYPES

__all__ = ["parse_operation"]


def parse_operation(key: str, value: Any) -> list[Operation]:
    """The operations that `key = value` of a plan file means.

    Raises:
        PlanSyntaxError: The value is not of the operation's form; the message shows one that is.
    """
    if key not in _PARSERS:
        raise PlanSyntaxError(f"no operation is called {key!r}")
    parsed = _PARSERS[key](value)
    if parsed is None:
        raise PlanSyntaxError(f"`{key}` cannot be {toml_value(value)}", hint=f"For example: {_EXAMPLES[key]}")
    return parsed if isinstance(parsed, list) else [parsed]


_EXAMPLES = {
    "concat": "concat = 0",
    "stack": "stack = 0",
    "split": "split = 0, or split = { dim = 0, sizes = [512, 128, 128] }",
    "unstack": "unstack = 0",
    "transpose": "transpose = true, or transpose = [0, 2]",
    "permute": "permute = [1, 0, 2]",
    "reshape": "reshape = { dim = 0, to = [8, 3, 64] }, or reshape = [64, -1]",
    "slice": "slice = { dim = 0, start = 0, stop = 1000 }",
    "resize": 'resize = { dim = 0, size = 50304, fill = "mean" }, or resize = [50304, 768]',
    "repeat": "repeat = { dim = 0, times = 2, each = true }",
    "scale": "scale = { param = 0.5, grad = 2.0 }, or scale = 0.5",
    "cast": 'cast = "bfloat16", or cast = { param = "bfloat16", exp_avg = "float32" }',
}


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ints(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_int, value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _table(value: Any, required: set[str], optional: set[str] = frozenset()) -> bool:  # type: ignore[assignment]
    return isinstance(value, dict) and required <= value.keys() <= required | optional


def _concat(value: Any) -> Operation | None:
    return Concat(value) if _int(value) else None


def _stack(value: Any) -> Operation | None:
    return Stack(value) if _int(value) else None


def _split(value: Any) -> Operation | None:
    if _int(value):
        return Split(value)
    if _table(value, {"dim", "sizes"}) and _int(value["dim"]) and _ints(value["sizes"]) and min(value["sizes"]) >= 0:
        return Split(value["dim"], tuple(value["sizes"]))
    return None


def _unstack(value: Any) -> Operation | None:
    return Unstack(value) if _int(value) else None


def _transpose(value: Any) -> Operation | None:
    if value is True:
        return Transpose()
    return Transpose((value[0], value[1])) if _ints(value) and len(value) == 2 else None


def _permute(value: Any) -> Operation | None:
    return PermuteDims(tuple(value)) if _ints(value) and sorted(value) == list(range(len(value))) else None


def _reshape(value: Any) -> Operation | None:
    if isinstance(value, list) and all(map(_int, value)):
        return ReshapeDims(tuple(value)) if value.count(-1) < 2 and min(value, default=0) >= -1 else None
    if not _table(value, {"dim", "to"}, {"from"}) or not _int(value["dim"]):
        return None
    old, new = value.get("from", []), value["to"]
    if not (isinstance(old, list) and isinstance(new, list) and all(map(_int, old + new)) and new.count(-1) < 2):
        return None
    return ReshapeDims(tuple(new), value["dim"], tuple(old)) if min(old + new, default=0) >= -1 else None


def _slice(value: Any) -> Operation | None:
    if not _table(value, {"dim"}, {"start", "stop", "step"}) or not all(map(_int, value.values())):
        return None
    start, stop, step = value.get("start", 0), value.get("stop"), value.get("step", 1)
    return Slice(value["dim"], start, stop, step) if start >= 0 and step >= 1 and (stop is None or stop >= 0) else None


def _fill(value: Any) -> ex.Fill | None:
    policies = list(value.values()) if isinstance(value, dict) else [value]
    if not policies or not all(_number(policy) or policy in ("zeros", "mean", "wrap") for policy in policies):
        return None
    if isinstance(value, dict):
        return ex.Fill(value.get("default"), {key: item for key, item in value.items() if key != "default"})
    return ex.Fill(value)


def _resize(value: Any) -> list[Operation] | None:
    if _ints(value) and min(value) >= 0:
        return [Resize(dim, size) for dim, size in enumerate(value)]
    if not _table(value, {"dim", "size"}, {"fill"}) or not _int(value["dim"]) or not _int(value["size"]):
        return None
    fill = _fill(value["fill"]) if "fill" in value else ex.Fill()
    return [Resize(value["dim"], value["size"], fill)] if fill is not None and value["size"] >= 0 else None


def _repeat(value: Any) -> Operation | None:
    if not _table(value, {"dim", "times"}, {"each"}) or not _int(value["dim"]) or not _int(value["times"]):
        return None
    each = value.get("each", False)
    return Repeat(value["dim"], value["times"], each) if value["times"] >= 1 and isinstance(each, bool) else None


def _scale(value: Any) -> Operation | None:
    if _number(value) and value:
        return ScaleBy(float(value), 1 / value)
    if not _table(value, set(), {"param", "grad"}) or not all(_number(item) and item for item in value.values()):
        return None
    return ScaleBy(float(value.get("param", 1)), float(value.get("grad", 1))) if value else None


def _cast(value: Any) -> Operation | None:
    dtypes = {"param": value} if isinstance(value, str) else value
    if not isinstance(dtypes, dict) or not dtypes:
        return None
    return CastTo(dtypes) if all(dtype in DTYPES for dtype in dtypes.values()) else None


_PARSERS: dict[str, Any] = {
    "concat": _concat,
    "stack": _stack,
    "split": _split,
    "unstack": _unstack,
    "transpose": _transpose,
    "permute": _permute,
    "reshape": _reshape,
    "slice": _slice,
    "resize": _resize,
    "repeat": _repeat,
    "scale": _scale,
    "cast": _cast,
}
