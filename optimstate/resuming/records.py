"""Small objects in pickles that optimizers and schedules calculate with."""

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
    """A number of NumPy, or the counter that a schedule keeps its milestones in; everything else as it is."""
    if not isinstance(record, Opaque):
        return record
    if record.type.path == "collections.Counter":
        return Counter(*record.arguments) if all(type(each) is dict for each in record.arguments) else record
    number = numpy_scalar(record)
    return record if number is None else number


def refuse_records(what: str, node: Any, path: Path = ()) -> None:
    """Refuse state that a live object cannot calculate with.

    Raises:
        StateMismatchError: A record of an object is in it.
    """
    if isinstance(node, Opaque):
        raise StateMismatchError(
            f"{what}: {format_path(path)} is an object of the class {describe(node.type.path)}, which is not built",
            hint='Give resume() what torch.load returns, or keep the live schedule: schedule="live".',
        )
    if isinstance(node, Mapping):
        for key, value in node.items():
            refuse_records(what, value, (*path, key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            refuse_records(what, value, (*path, index))
