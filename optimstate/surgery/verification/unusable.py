"""Values of models and optimizers that torch reads and cannot compute with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from optimstate.describe import describe, few
from optimstate.formats.pickles.tensors import tensor_kind
from optimstate.state.arrays import is_array
from optimstate.state.judging import LEAVES
from optimstate.state.records import is_tensor
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
        if section.kind == "model":
            yield from _no_tensors(section)
        where = f"{section.kind} at {section.label}"
        values = list(_values(section))
        # One tensor without elements among the many of a model may be a placeholder.
        empty = [name for name, value in values if "meta device" in (tensor_kind(value) or "")]
        if empty:
            message = f"{few(empty, 3)}: on the meta device, without elements, so that torch cannot load it"
            certain = section.kind == "optimizer" or 2 * len(empty) >= len(section.tensors())
            yield (fault if certain else note)("numbers", where, message, empty)
        arrays = [name for name, value in values if is_array(value)] if section.kind == "optimizer" else []
        if arrays:
            yield fault("dtypes", where, f"{few(arrays, 3)}: an array of NumPy, which torch refuses to load", arrays)


def _no_tensors(model: Section) -> Iterator[Finding]:
    """Entries of a model that have the name of a parameter and are not tensors."""
    entries = model.node.items() if isinstance(model.node, Mapping) else ()
    for name, value in entries:
        leaf = str(name).rpartition(".")[2]
        if leaf in LEAVES and not is_tensor(value) and not (value is None and leaf == "bias"):
            message = f"{describe(value)} is not a tensor: torch refuses it if the model has a parameter of that name"
            yield note("content", f"model at {model.label}, {name}", message, [str(name)])


def _values(section: Section) -> Iterator[tuple[str, Opaque]]:
    """The objects among the tensors of a section, by name."""
    if section.kind != "optimizer":
        yield from ((name, value) for name, value in section.tensors().items() if isinstance(value, Opaque))
        return
    for position, (_, name, slots) in enumerate(section.optimizer().parameters()):
        label = f"parameter {position}" if name is None else name
        found: dict[Any, Any] = dict(slots or {})
        yield from ((f"{label} {slot}", value) for slot, value in found.items() if isinstance(value, Opaque))
