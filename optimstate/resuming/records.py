"""Small objects in pickles whose values optimizers and schedulers need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from optimstate.describe import describe
from optimstate.errors import StateMismatchError
from optimstate.formats.pickles.tensors import numpy_scalar
from optimstate.tree import Opaque, Path, format_path

__all__ = ["refuse_records", "revived"]


def revived(record: Any) -> Any:
    """The value of a NumPy number or of a `Counter` (a scheduler's milestones); any other node unchanged."""
    if not isinstance(record, Opaque):
        return record
    if record.type.path == "collections.Counter":
        return Counter(*record.arguments) if all(type(each) is dict for each in record.arguments) else record
    number = numpy_scalar(record)
    return record if number is None else number


def refuse_records(what: str, node: Any, path: Path = ()) -> None:
    """Refuse state that contains records of objects, which a live object cannot use.

    Raises:
        StateMismatchError: It contains such a record.
    """
    if isinstance(node, Opaque):
        raise StateMismatchError(
            f"{what}: {format_path(path)} is an object of the class {describe(node.type.path)}, which is not created",
            hint='Give resume() the result of torch.load, or keep the live schedule: schedule="live".',
        )
    if isinstance(node, Mapping):
        for key, value in node.items():
            refuse_records(what, value, (*path, key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            refuse_records(what, value, (*path, index))
