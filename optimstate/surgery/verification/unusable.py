"""Values of models and optimizers that torch reads and cannot compute with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from optimstate.describe import few
from optimstate.formats.pickles.tensors import tensor_kind
from optimstate.state.arrays import is_array
from optimstate.state.sections import Section
from optimstate.surgery.verification.findings import Finding, fault, note
from optimstate.tree import Opaque

__all__ = ["check_values"]


def check_values(sections: Iterable[Section]) -> Iterator[Finding]:
    """Find tensors without elements, and arrays of NumPy among the slots of an optimizer.

    Args:
        sections: The sections of a checkpoint.
    """
    for section in sections:
        if section.kind == "scheduler":
            continue
        where = f"{section.kind} at {section.label}"
        values = list(_values(section))
        empty = [name for name, value in values if "meta device" in (tensor_kind(value) or "")]
        if empty:
            message = f"{few(empty, 3)}: on the meta device, without elements, so that torch cannot load it"
            yield (fault if 2 * len(empty) >= _count(section) else note)("numbers", where, message, empty)
        arrays = [name for name, value in values if is_array(value)] if section.kind == "optimizer" else []
        if arrays:
            yield fault("dtypes", where, f"{few(arrays, 3)}: an array of NumPy, which torch refuses to load", arrays)


def _values(section: Section) -> Iterator[tuple[str, Opaque]]:
    """The objects among the tensors of a section, by name."""
    if section.kind != "optimizer":
        yield from ((name, value) for name, value in section.tensors().items() if isinstance(value, Opaque))
        return
    for position, (_, name, slots) in enumerate(section.optimizer().parameters()):
        label = f"parameter {position}" if name is None else name
        found: dict[Any, Any] = dict(slots or {})
        yield from ((f"{label} {slot}", value) for slot, value in found.items() if isinstance(value, Opaque))


def _count(section: Section) -> int:
    """How many tensors or parameters it has: one tensor without elements among many may be a placeholder."""
    return len(section.optimizer().state) if section.kind == "optimizer" else len(section.tensors())
