"""Mappings of names to NumPy arrays, which programs other than torch write for models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimstate.tree import Opaque, Path, format_path

__all__ = ["is_array", "why_no_model"]

_KINDS = {
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")
}


def is_array(value: Any) -> bool:
    """Whether a leaf is the record of a NumPy array, which torch does not load as a tensor."""
    return isinstance(value, Opaque) and value.type.path in _KINDS


def why_no_model(path: Path, node: Any) -> str | None:
    """Why a mapping of names to NumPy arrays is not a model, and how to convert it; None for any other node.

    Args:
        path: The node's path in the tree.
        node: Any node.
    """
    if not isinstance(node, Mapping) or not all(isinstance(key, str) for key in node):
        return None
    arrays = sum(map(is_array, node.values()))
    alone = not any(isinstance(value, Mapping | list | tuple) for value in node.values())
    if arrays * 2 <= len(node) or not alone or not any("." in key for key in node):
        return None
    from shlex import quote  # here, because few checkpoints hold arrays

    dotted = ".".join(map(str, path)) if all(isinstance(key, str) and key.isidentifier() for key in path) else ""
    word = dotted or quote(format_path(path))
    return f"its values are NumPy arrays; `optimstate convert --section {word}` makes tensors of them"
