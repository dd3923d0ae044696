"""Outputs that consist of blocks of several sources side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from optimstate.derivation.programs import Program, divisors, reshapes
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.operations import OPERATIONS
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Blocks", "blocked"]

Concat = OPERATIONS["concat"]


class Blocks(Record):
    """An output that consists of one block of each source, side by side.

    Attributes:
        shape: The shape of the output; if blocks repeat, one dimension is divided into the number of repetitions and
            the length of one.
        parts: For each block, in order, the index of its source and its position in `shape`.
        joining: The operations that make the output of the blocks.
    """

    shape: Shape
    parts: tuple[tuple[int, tuple[slice, ...]], ...]
    joining: Program


def blocked(shape: Shape, owner: torch.Tensor) -> Iterator[Blocks]:
    """Ways to divide an output into blocks of its sources, side by side along one dimension.

    Args:
        shape: The shape of the output.
        owner: For each element, flat, the index of its source; -1 for an element without source, which is added to the
            block before it, or to the first.
    """
    for dim, size in enumerate(shape):
        rows = owner.reshape(shape).movedim(dim, -1).reshape(-1, size)
        whole = rows[0]
        if not bool((rows == whole).all()):
            continue
        lengths = reversed(divisors(size))
        period = next(length for length in lengths if bool((whole.view(-1, length) == whole[:length]).all()))
        runs: list[list[int]] = []
        for place, number in enumerate(whole[:period].tolist()):
            if number >= 0 and (not runs or runs[-1][0] not in (number, -1)):
                runs.append([number, place, place + 1])
            elif not runs:
                runs.append([-1, place, place + 1])
            else:
                runs[-1][0] = number if runs[-1][0] < 0 else runs[-1][0]
                runs[-1][2] = place + 1
        if len({number for number, _, _ in runs}) < len(runs):
            continue  # a source has several blocks
        several = period < size
        cut_up = (*shape[:dim], size // period, period, *shape[dim + 1 :]) if several else shape
        at = dim + several
        parts = tuple((number, (*(slice(None) for _ in range(at)), slice(start, stop))) for number, start, stop in runs)
        yield Blocks(cut_up, parts, (Concat(at), *(next(reshapes(cut_up, shape)) if several else ())))
