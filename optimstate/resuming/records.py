"""Small objects in pickles whose values optimizers and schedulers need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from optimstate.describe import describe
from optimstate.errors import StateMismatchError
from optimstate.formats.pickles.tensors import numpy_scalar
from optimstate.tree import GlobalName, Opaque, Path, format_path

__all__ = ["refuse_records", "revived", "revived_tree"]


def revived_tree(node: Any) -> Any:
    """A tree with the values that `revived` returns."""
    if type(node) is dict:
        return {key: revived_tree(value) for key, value in node.items()}
    if type(node) in (list, tuple):
        return type(node)(map(revived_tree, node))
    return revived(node)


def revived(record: Any) -> Any:
    """The value of a NumPy number or of a `Counter` (a scheduler's milestones); any other node unchanged."""
    if not isinstance(record, Opaque):
        return record
    if record.type.path == "collections.Counter":
        return Counter(*record.arguments) if all(type(each) is dict for each in record.arguments) else record
    number = numpy_scalar(record)
    return record if number is None else number


_OF_SCHEDULERS = 'Give resume() the result of torch.load, or keep the live schedule: schedule="live".'


def refuse_records(what: str, node: Any, path: Path = (), *, hint: str = _OF_SCHEDULERS) -> None:
    """Refuse state that contains records of objects, which a live object cannot use.

    Raises:
        StateMismatchError: It contains such a record.
    """
    if isinstance(node, Opaque | GlobalName):
        where = f": {format_path(path)}" if path else ""
        kind = f"an object of the class {describe(node.type.path)}" if isinstance(node, Opaque) else describe(node)
        raise StateMismatchError(f"{what}{where} is {kind}, which is not created", hint=hint)
    if isinstance(node, Mapping):
        for key, value in node.items():
            refuse_records(what, value, (*path, key), hint=hint)
    elif isinstance(node, list | tuple | set | frozenset):
        for index, value in enumerate(node):
            refuse_records(what, value, (*path, index), hint=hint)
