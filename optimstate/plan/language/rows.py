"""Operations that take rows of a dimension: a range, chosen ones, those of an index file, all of them backwards."""

# ruff: noqa: ARG002, ARG003, D102 - all operations are called alike, and `Operation` says how

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimstate.errors import PlanSyntaxError
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Node, Shape
from optimstate.plan.language.base import (
    Irreversible,
    Misfit,
    Operation,
    are_integers,
    counted,
    is_integer,
    is_table,
)

__all__ = ["Flip", "Gather", "Select", "Slice", "digest_of", "with_index_files"]

_INLINE = 64  # indices that a plan file has in itself
_FEW = 8  # runs of rows; more are taken row by row


class Slice(Operation):
    """The rows [start, stop) of a dimension, `step` apart; the others are lost."""

    KEY = "slice"
    EXAMPLE = "slice = { dim = 0, start = 0, stop = 1000 }"
    dim: int = 0
    start: int = 0
    stop: int | None = None
    step: int = 1

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if not is_table(value, {"dim"}, {"start", "stop", "step"}) or not all(map(is_integer, value.values())):
            return None
        start, stop, step = value.get("start", 0), value.get("stop"), value.get("step", 1)
        return (
            cls(value["dim"], start, stop, step) if start >= 0 and step >= 1 and (stop is None or stop >= 0) else None
        )

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
        dim = counted(self.KEY, self.dim, shape)
        rows = range(shape[dim])[self.start : self.stop : self.step]
        if not rows or (self.stop is not None and self.stop > shape[dim]):
            raise Misfit(f"slice: [{self.start}, {self.stop}) is not inside dimension {dim} of shape {list(shape)}")
        step = ex.Narrow(dim, rows.start, len(rows), self.step)
        return Node(step, (tensor,), (*shape[:dim], len(rows), *shape[dim + 1 :]))

    def value(self) -> Any:
        table = {"dim": self.dim, "start": self.start, "stop": self.stop, "step": self.step}
        defaults = {"start": 0, "stop": None, "step": 1}
        return {key: value for key, value in table.items() if key == "dim" or value != defaults[key]}


class Select(Operation):
    """Chosen rows of a dimension, in the order of the list; the others are lost."""

    KEY = "select"
    EXAMPLE = 'select = { dim = 0, index = [0, 2, 3] }, or select = { dim = 0, index = "rows.json" }'
    dim: int = 0
    index: tuple[int, ...] = ()

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if not is_table(value, {"dim", "index"}) or not is_integer(value["dim"]):
            return None
        index = value["index"]
        if isinstance(index, str):
            index = _listed_in(folder / index, cls.KEY)
        return cls(value["dim"], tuple(index)) if are_integers(index) and min(index) >= 0 else None

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
        dim = counted(self.KEY, self.dim, shape)
        if max(self.index) >= shape[dim]:
            raise Misfit(
                f"{self.KEY}: dimension {self.dim} of shape {list(shape)} does not have the index {max(self.index)}"
            )
        return taken(tensor, dim, self.index)

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        if None in before:
            raise Irreversible(
                f"{self.KEY} does not say how many rows there were; give names with shapes", needs_names=True
            )
        if any(sorted(self.index) != list(range((shape or ())[self.dim])) for shape in before):
            return super().inverse(before)
        return [Select(self.dim, tuple(sorted(range(len(self.index)), key=self.index.__getitem__)))]

    def value(self) -> Any:
        return {"dim": self.dim, "index": list(self.index)}


class Gather(Select):
    """Rows of a dimension in the order of an index file, some of them several times or never.

    Attributes:
        file: Of the index, as the plan names it; empty for an index that no file has yet.
    """

    KEY = "gather"
    EXAMPLE = 'gather = { dim = 0, index = "rows.json" }'
    file: str = ""

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if not is_table(value, {"dim", "index"}, {"digest"}) or not is_integer(value["dim"]):
            return None
        index, digest = value["index"], value.get("digest")
        file = index if isinstance(index, str) else ""
        if file:
            index = _listed_in(folder / file, cls.KEY)
        if not are_integers(index) or min(index) < 0:
            return None
        if digest is not None and digest != digest_of(index):
            raise PlanSyntaxError(
                f"gather: the index in {file or 'the plan'} has the digest {digest_of(index)}, not {digest}: it is "
                "another one than the plan was written for",
                hint="Bring the file that belongs to the plan, or leave `digest` out.",
            )
        return cls(value["dim"], tuple(index), file)

    def value(self) -> Any:
        return {"dim": self.dim, "index": self.file or list(self.index), "digest": digest_of(self.index)}


def digest_of(index: Sequence[int]) -> str:
    """The digest of an index, however its file is written: SHA-256 of the numbers, joined with commas."""
    from hashlib import sha256  # takes milliseconds, and few plans have an index in a file

    return sha256(",".join(map(str, index)).encode()).hexdigest()


def with_index_files(plan: Any, stem: str) -> tuple[Any, dict[str, str]]:
    """A plan whose long indices stand in files of their own.

    Args:
        plan: A `Plan`.
        stem: What the names of the files begin with.

    Returns:
        The plan, and the text of every file by its name.
    """
    files: dict[str, str] = {}

    def placed(operation: Operation) -> Operation:
        if not isinstance(operation, Gather) or operation.file or len(operation.index) <= _INLINE:
            return operation
        text = json.dumps(list(operation.index))
        file = next((name for name, other in files.items() if other == text), f"{stem}.rows-{len(files) + 1}.json")
        files[file] = text
        return Gather(operation.dim, operation.index, file)

    def moved(rules: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(rule._replace(operations=tuple(map(placed, rule.operations))) for rule in rules)

    made = plan._replace(rules=moved(plan.rules), stages=tuple(map(moved, plan.stages)))
    return made, files


class Flip(Operation):
    """The rows of a dimension, or of several, backwards."""

    KEY = "flip"
    EXAMPLE = "flip = 0, or flip = [0, 1]"
    dims: tuple[int, ...] = ()

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        dims = [value] if is_integer(value) else value
        return cls(tuple(dims)) if are_integers(dims) and len(set(dims)) == len(dims) else None

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
        made = tensor
        for given in self.dims:
            dim = counted(self.KEY, given, shape)
            made = taken(made, dim, range(shape[dim] - 1, -1, -1))
        return made

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [self]

    def value(self) -> Any:
        return self.dims[0] if len(self.dims) == 1 else list(self.dims)


def taken(tensor: Expr, dim: int, index: Sequence[int]) -> Expr:
    """Rows of a tensor of known shape: as few ranges where they are that, else one by one."""
    shape = tensor.shape or ()
    result = (*shape[:dim], len(index), *shape[dim + 1 :])
    runs = _runs(index)
    if len(runs) > _FEW:
        return Node(ex.Take(dim, tuple(index)), (tensor,), result)
    parts = [
        Node(ex.Narrow(dim, run.start, len(run), run.step), (tensor,), (*shape[:dim], len(run), *shape[dim + 1 :]))
        for run in runs
    ]
    return parts[0] if len(parts) == 1 else Node(ex.Cat(dim), tuple(parts), result)


def _listed_in(path: Path, key: str) -> Any:
    """The integers in a text file, as a JSON list or separated by white space."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlanSyntaxError(
            f"{key}: the index cannot be read from {path}: {reason}", hint="Write integers, or a JSON list of them."
        ) from None


def _runs(index: Sequence[int]) -> list[range]:
    """The indices as few ascending ranges, in order."""
    runs: list[range] = []
    start = 0
    while start < len(index):
        step = index[start + 1] - index[start] if start + 1 < len(index) else 1
        stop = start + 1
        while step > 0 and stop < len(index) and index[stop] - index[stop - 1] == step:
            stop += 1
        if stop == start + 2 and step > 1:  # two rows far apart are two rows
            stop, step = start + 1, 1
        runs.append(range(index[start], index[stop - 1] + 1, step if stop > start + 1 else 1))
        start = stop
    return runs
