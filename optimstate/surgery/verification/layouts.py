"""Models stored under other names than their optimizer knows, because the framework renames while saving.

transformers 5 keeps the experts of a layer in one tensor (`mlp.experts.gate_up_proj`) and writes them one by one, as
the hub has them (`mlp.experts.0.gate_proj.weight`, in Mixtral `block_sparse_moe.experts.0.w1.weight`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from math import prod

from optimstate.plan.expressions.tree import Shape
from optimstate.state.names import unwrapped

__all__ = ["stored_in_another_layout"]

_RENAMED = {"block_sparse_moe": "mlp"}
_EXPERTS = re.compile(r"(.*\bexperts)\.(?:\d+\.)?(.+)")


def stored_in_another_layout(
    missing: Collection[str], known: Mapping[str, Shape | None], shapes: Mapping[str, Shape | None]
) -> set[str]:
    """Which of the parameters missing from the model are there in another layout.

    Args:
        missing: Names of the optimizer that the model does not have.
        known: The model's tensors with their shapes.
        shapes: The optimizer's parameters with their shapes, None where no slot shows one.
    """
    respelled = {_respelled(name): shape for name, shape in known.items()}
    found = {name for name in missing if name in respelled and shapes.get(name) in (None, respelled[name])}
    plain = {_without_adapter(name): shape for name, shape in known.items()}
    found |= {name for name in missing if _without_adapter(name) in plain}
    stored, fused = _by_experts(respelled), _by_experts({name: shapes.get(name) for name in missing})
    modules = {
        module
        for module, (elements, _) in fused.items()
        if module in stored and (elements is None or elements == stored[module][0])
    }
    found.update(name for module in modules for name in fused[module][1])
    adapted = {_without_adapter(name) for name in found}
    rest = [
        shape
        for name, shape in known.items()
        if name not in shapes
        and _respelled(name) not in found
        and _without_adapter(name) not in adapted
        and not ((expert := _EXPERTS.fullmatch(_respelled(name))) and expert[1] in modules)
    ]
    others = {name for name in missing if name not in found}
    is_elsewhere = any(name in shapes for name in known) and _as_many_elements([shapes.get(n) for n in others], rest)
    return found | others if is_elsewhere else found


def _as_many_elements(ours: list[Shape | None], theirs: list[Shape | None]) -> bool:
    """Whether tensors of other shapes have the same number of elements together; equal shapes mean a rename."""
    if not ours or None in ours or None in theirs or Counter(ours) == Counter(theirs):
        return False
    mine, stored = (sum(prod(shape) for shape in side if shape is not None) for side in (ours, theirs))
    return mine == stored


def _respelled(name: str) -> str:
    return ".".join(_RENAMED.get(part, part) for part in name.split("."))


def _without_adapter(name: str) -> str:
    """The name without wrappers, and without the adapter, which PEFT leaves out when it saves."""
    return unwrapped([name])(name).replace(".default.", ".")


def _by_experts(tensors: Mapping[str, Shape | None]) -> dict[str, tuple[int | None, list[str]]]:
    """The tensors of each module called `experts`: how many elements they have together, and their names."""
    found: dict[str, tuple[int | None, list[str]]] = {}
    for name, shape in tensors.items():
        match = _EXPERTS.fullmatch(name)
        if match is not None:
            elements, names = found.get(match[1], (0, []))
            total = None if elements is None or shape is None else elements + prod(shape)
            found[match[1]] = total, [*names, name]
    return found
