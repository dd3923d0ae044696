"""Tied parameters: names of one model whose tensors share memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from optimstate.tensors.lazy import LazyTensor

__all__ = ["tied_names"]

Name = TypeVar("Name")


def tied_names(tensors: Mapping[Name, Any]) -> list[list[Name]]:
    """Groups of names whose tensors share bytes. Tensors next to one another in one storage are not tied."""
    storages = [id(tensor.storage) for tensor in tensors.values() if isinstance(tensor, LazyTensor)]
    if len(set(storages)) == len(storages):
        return []
    users: dict[int, list[tuple[Name, LazyTensor]]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, LazyTensor):
            users.setdefault(id(tensor.storage), []).append((name, tensor))
    groups: list[list[Name]] = []
    for sharing in users.values():
        if len(sharing) == 1:
            continue
        members = [(*tensor.span(), name) for name, tensor in sharing if tensor.nbytes]
        end = -1
        for start, stop, name in sorted(members, key=lambda member: member[:2]):
            if start < end:
                groups[-1].append(name)
            else:
                groups.append([name])
            end = max(end, stop)
    return [names for names in groups if len(names) > 1]
