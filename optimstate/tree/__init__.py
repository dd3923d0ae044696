"""Checkpoints as trees: nested dicts, lists and tuples whose leaves are tensors, scalars and opaque records.

An object of a class this library does not know is kept as an `Opaque` record of how its pickle built it. Nothing is
imported or called for it; it can be shown, compared and written back.
"""

from optimstate.tree.comparison import difference
from optimstate.tree.copies import cloned, rebuilt_mapping, replaced
from optimstate.tree.objects import AttributedTensor, GlobalName, Opaque, OpaqueFile, bare_value, path_key
from optimstate.tree.walking import (
    MAX_DEPTH,
    Path,
    census,
    children,
    format_path,
    no_garbage_collection,
    nodes,
    tensors,
    walk,
)

__all__ = [
    "MAX_DEPTH",
    "AttributedTensor",
    "GlobalName",
    "Opaque",
    "OpaqueFile",
    "Path",
    "bare_value",
    "census",
    "children",
    "cloned",
    "difference",
    "format_path",
    "no_garbage_collection",
    "nodes",
    "path_key",
    "rebuilt_mapping",
    "replaced",
    "tensors",
    "walk",
]
