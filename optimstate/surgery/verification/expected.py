"""Entries that a checkpoint has under the usual names of sections, and that are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.describe import describe
from optimstate.state.judging import called_optimizer, called_scheduler
from optimstate.state.records import is_tensor
from optimstate.state.sections import Judgement
from optimstate.surgery.verification.findings import Finding, note
from optimstate.tree import Opaque, OpaqueFile, Path, format_path, nodes

__all__ = ["empty", "unrecognised"]

_MODELS = {"model", "state_dict", "model_state_dict", "module", "net", "weights"}


def empty(tree: Any) -> Iterator[Finding]:
    """Find dicts that have the name of a section and are empty.

    Args:
        tree: A checkpoint.
    """
    for path, node, kind in _named(tree):
        if isinstance(node, Mapping) and not node:
            found = "no weights" if kind == "model" else "nothing to resume from"
            yield note("section", format_path(path), f"is empty: what loads the {kind} from it finds {found}")


def unrecognised(tree: Any, judgement: Judgement) -> Iterator[str]:
    """What has the name of a section, and is neither one nor a description of one.

    Args:
        tree: A checkpoint.
        judgement: Its sections, and what was told not to be any.
    """
    told = [*(section.path for section in judgement.sections), *judgement.others]
    for path, node, kind in _named(tree):
        if not any(path == other[: len(path)] or other == path[: len(other)] for other in told) and _holds_state(node):
            yield f"{format_path(path)} is called {kind} and was not recognised as one: {describe(node)}"


def _named(tree: Any) -> Iterator[tuple[Path, Any, str]]:
    """Entries of the checkpoint, and of what stands directly in it, whose name is usual for a kind of section."""
    for key, node in tree.items() if isinstance(tree, Mapping) else ():
        if kind := _kind(key):
            yield (key,), node, kind
        for inner, value in node.items() if isinstance(node, Mapping) else ():
            if kind := _kind(inner):
                yield (key, inner), value, kind


def _kind(key: Any) -> str:
    if not isinstance(key, str):
        return ""
    if key in _MODELS:
        return "model"
    return "optimizer" if called_optimizer((key,)) else "scheduler" if called_scheduler((key,)) else ""


def _holds_state(node: Any) -> bool:
    """Whether a value may be meant to be loaded: configurations have texts, flags, and dicts of plain values."""
    if node is None or isinstance(node, str | bool | OpaqueFile):
        return False
    if not isinstance(node, Mapping | list | tuple):
        return True
    return any(is_tensor(inner) or isinstance(inner, Opaque | bytes) for inner in nodes(node))
