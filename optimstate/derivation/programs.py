"""Programs, which are sequences of operations: running them on tensors, inverting them, measuring their length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from optimstate.plan.expressions.evaluate import evaluated
from optimstate.plan.expressions.tree import Leaf, Shape
from optimstate.plan.language.base import Irreversible, Misfit, Operation
from optimstate.plan.language.operations import OPERATIONS
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Program", "Wanted", "applied", "divisors", "reshapes", "shortened", "undoing", "written_length"]

Reshape = OPERATIONS["reshape"]
Program = tuple[Operation, ...]


class Wanted(Record):
    """A tensor to make: its shape and, flat, the position of each element in the source (-1: without source)."""

    shape: Shape
    ids: torch.Tensor


def applied(program: Sequence[Operation], tensors: Sequence[torch.Tensor], targets: int) -> list[torch.Tensor] | None:
    """The tensors that the engine makes with operations of tensors in memory; None if they do not fit."""
    leaves = [Leaf(str(number), tuple(tensor.shape)) for number, tensor in enumerate(tensors)]
    held: list[object] = list(leaves)
    try:
        for operation in program:
            held = list(operation.apply(held, targets))  # type: ignore[arg-type]
    except Misfit:
        return None
    values = {id(leaf): tensor for leaf, tensor in zip(leaves, tensors, strict=True)}
    memo: dict[int, object] = {}
    return [evaluated(item, values, memo) for item in held]  # type: ignore[arg-type]


def shortened(found: Iterator[tuple[Program, tuple[int, ...]]]) -> Iterator[tuple[Program, tuple[int, ...]]]:
    """Each program once, preceded by variants without the first of two consecutive reshapes."""
    seen: set[tuple[tuple[str, ...], tuple[int, ...]]] = set()
    for program, order in found:
        shorter = [
            program[:at] + program[at + 1 :]
            for at in range(len(program) - 1)
            if isinstance(program[at], Reshape) and isinstance(program[at + 1], Reshape)
        ]
        for candidate in (*shorter, program):
            key = tuple(map(str, candidate)), order
            if key not in seen:
                seen.add(key)
                yield candidate, order


def written_length(program: Program) -> int:
    """The length of a program as text, plus ten for each operation."""
    return sum(len(str(operation)) + 10 for operation in program)


def undoing(program: Program, shape: Shape, count: int) -> Program | None:
    """The operations that undo a program, which starts from one tensor of this shape; None if it cannot be undone."""
    held: list[object] = [Leaf("", shape)]
    back: list[Operation] = []
    try:
        for operation in program:
            before = [item.shape for item in held]  # type: ignore[attr-defined]
            back[:0] = _reverse(operation, before)
            held = list(operation.apply(held, count))  # type: ignore[arg-type]
    except (Misfit, Irreversible):
        return None
    return tuple(back)


def _reverse(operation: Operation, before: Sequence[Shape]) -> list[Operation]:
    """The operations that undo one; tensors that differ in one dimension are reshaped with -1 for it."""
    if isinstance(operation, Reshape) and len(set(before)) > 1 and len({len(shape) for shape in before}) == 1:
        columns = list(zip(*before, strict=True))
        if sum(len(set(column)) > 1 for column in columns) == 1:
            return [Reshape(tuple(column[0] if len(set(column)) == 1 else -1 for column in columns))]
    return operation.inverse(before)


def divisors(number: int) -> list[int]:
    """The divisors of a number, from the largest to 1."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def reshapes(old: Shape, new: Shape) -> Iterator[Program]:
    """Ways to write a reshape, from those of one dimension and of neighbours to those of the whole shape."""
    if old == new:
        yield ()
        return
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    for first, last in ((head, tail), (head, 0), (0, tail), (max(head - 1, 0), tail)):
        before, after = old[first : len(old) - last], new[first : len(new) - last]
        if prod(before) != prod(after) or not before:
            continue
        if len(before) == 1:
            for hidden in range(len(after) - 1, -1, -1):
                yield (Reshape((*after[:hidden], -1, *after[hidden + 1 :]), first),)
            yield (Reshape(after, first),)
        else:
            yield (Reshape(after, first, before),)
    for hidden in range(len(new)):
        yield (Reshape((*new[:hidden], -1, *new[hidden + 1 :])),)
    yield (Reshape(new),)
