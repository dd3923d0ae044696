"""Mappings of names to NumPy arrays: models as other programs than torch write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimstate.tree import Opaque, Path, format_path

__all__ = ["is_array", "why_no_model"]

_KINDS = {
    f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "numeric._frombuffer")
}


def is_array(value: Any) -> bool:
    """Whether a leaf is the record of a NumPy array: numbers that no loader takes for a tensor."""
    return isinstance(value, Opaque) and value.type.path in _KINDS


def why_no_model(path: Path, node: Any) -> str | None:
    """Why a mapping of names to arrays is not a model, and what makes one of it; None for everything else.

    Args:
        path: Where it stands in the tree.
        node: Anything.
    """
    if not isinstance(node, Mapping) or not all(isinstance(key, str) for key in node):
        return None
    arrays = sum(map(is_array, node.values()))
    alone = not any(isinstance(value, Mapping | list | tuple) for value in node.values())
    if arrays * 2 <= len(node) or not alone or not any("." in key for key in node):
        return None
    from shlex import quote  # few checkpoints hold arrays

    dotted = ".".join(map(str, path)) if all(isinstance(key, str) and key.isidentifier() for key in path) else ""
    word = dotted or quote(format_path(path))
    return f"its values are arrays of NumPy, of which tensors are made by `optimstate convert --section {word}`"
