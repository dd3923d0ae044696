"""Parts that a folder holds twice: weights in a `.bin` and in shards, optimizers of two steps, last and best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optimstate.describe import few
from optimstate.formats.protocol import Document
from optimstate.state.names import wrapper_prefix
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section

__all__ = ["repeated"]


def repeated(document: Document, sections: Sequence[Section]) -> Iterator[tuple[str, str]]:
    """Every part that is in several files of a folder, with a message about it.

    Models are alike by names and shapes, optimizers by groups, slots and shapes; what is in them is not compared.

    Args:
        document: A folder; of anything else, nothing is said.
        sections: Those that were found in it.
    """
    if not document.parts:
        return
    found: dict[Any, list[Section]] = {}
    for section in sections:
        if section.kind != "scheduler" and len(section.path) > 0:
            found.setdefault((section.kind, _form(section)), []).append(section)
    for (kind, form), alike in found.items():
        files = {_file(document, section): section for section in alike}
        if form and len(files) > 1:
            first, *others = (section.label for section in files.values())
            shown = few(others, separator=" and at ")
            yield (
                f"{kind} at {first}",
                f"is at {shown} too: programs load one of them, and nothing here says which; `optimstate diff` shows "
                "how they differ",
            )


def _file(document: Document, section: Section) -> str:
    """The file a section is in, however many names it has; of what is in none of the parts, the whole folder."""
    part = document.parts.get(str(section.path[0]))
    return "" if part is None else str(Path(str(part.path)).resolve())


def _form(section: Section) -> frozenset[Any]:
    """What shows that two sections are copies, or the same part at two steps; empty if too little does."""
    if section.kind == "optimizer":
        state: OptimizerState = section.optimizer()
        rows: list[Any] = [(index, name, _shapes(slots)) for index, (_, name, slots) in enumerate(state.parameters())]
        return frozenset((*rows, tuple(len(group.params) for group in state.groups))) if rows else frozenset()
    tensors = section.tensors()
    prefix = wrapper_prefix(tensors)
    return frozenset((name.removeprefix(prefix), str(getattr(value, "shape", ""))) for name, value in tensors.items())


def _shapes(slots: Any) -> Any:
    return tuple(sorted((str(slot), str(getattr(value, "shape", ""))) for slot, value in (slots or {}).items()))
