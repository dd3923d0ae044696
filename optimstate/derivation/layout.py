"""From the origins of elements to the operations of the plan language that move them.

One general method is used for every layout: the index of an output's elements is a mixed-radix number with a stride for
each digit. The strides of all outputs of a source, and its size, form a chain in which each divides the next; the
quotients are the dimensions to which the source is reshaped. Digits of which an output has only a part are cut, the
others permuted and reshaped. Several sources of one output are the inverse problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from optimstate.derivation.growth import core
from optimstate.derivation.programs import (
    Program,
    Wanted,
    applied,
    reshapes,
    shortened,
    undoing,
    written_length,
)
from optimstate.derivation.rows import selections
from optimstate.derivation.strides import programs_along, stride_chain, walked
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.operations import OPERATIONS

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Search", "cut", "joined"]

Repeat = OPERATIONS["repeat"]


class Search:
    """Searches for operations, once for each problem, because layers repeat."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[Program, tuple[int, ...]] | None] = {}

    def cut(self, shape: Shape, wanted: Sequence[Wanted]) -> tuple[Program, tuple[int, ...]] | None:
        """As the function `cut`."""
        key = ("cut", shape, tuple(item.shape for item in wanted), _digest(*(item.ids for item in wanted)))
        if key not in self._known:
            self._known[key] = cut(shape, wanted)
        return self._known[key]

    def grown(
        self, shapes: Sequence[Shape], wanted: Wanted, owner: torch.Tensor
    ) -> tuple[Program, tuple[int, ...]] | None:
        """As the function `joined`, for an output that may have elements without source around it."""
        key = ("joined", tuple(shapes), wanted.shape, _digest(wanted.ids, owner))
        if key not in self._known:
            inner, growth = core(wanted)
            found = None if bool((inner.ids < 0).any()) else joined(shapes, inner, owner[wanted.ids >= 0])
            self._known[key] = None if found is None else ((*found[0], *growth), found[1])
        return self._known[key]


def cut(shape: Shape, wanted: Sequence[Wanted]) -> tuple[Program, tuple[int, ...]] | None:
    """The shortest operations that make outputs of one source.

    Returns:
        The operations and the order in which they make the outputs; None if there are none.
    """
    from optimstate.installed_torch import torch

    if len(wanted) == 1 and wanted[0].shape == shape and torch.equal(wanted[0].ids, torch.arange(prod(shape))):
        return (), (0,)  # most tensors are left as they are
    source = torch.arange(1, prod(shape) + 1, dtype=torch.int64).reshape(shape)  # growth fills with 0
    best: tuple[Program, tuple[int, ...]] | None = None
    for program, order in shortened(_programs(shape, wanted)):
        if best is not None and written_length(program) >= written_length(best[0]):
            continue
        made = applied(program, [source], len(wanted))
        if made is not None and len(made) == 1:
            made *= len(wanted)  # copies
        if made is None or len(made) != len(wanted):
            continue
        if all(
            tuple(tensor.shape) == wanted[number].shape and torch.equal(tensor.reshape(-1), wanted[number].ids + 1)
            for tensor, number in zip(made, order, strict=True)
        ):
            best = program, order
    return best


def joined(shapes: Sequence[Shape], wanted: Wanted, owner: torch.Tensor) -> tuple[Program, tuple[int, ...]] | None:
    """The shortest operations that make one output of several sources, with all their elements once.

    Args:
        shapes: The shapes of the sources.
        wanted: The output; its ids are positions in the source given by `owner`.
        owner: For each element of the output the index of its source.

    Returns:
        The operations and the order in which they take the sources; None if there are none.
    """
    from optimstate.installed_torch import torch

    sizes = [prod(shape) for shape in shapes]
    if bool((owner < 0).any()) or owner.bincount(minlength=len(shapes)).tolist() != sizes:
        return None
    parts = []
    for shape, places in zip(shapes, torch.split(owner.argsort(stable=True), sizes), strict=True):
        where = torch.full((len(places),), -1, dtype=torch.int64)
        where[wanted.ids[places]] = places
        if bool((where < 0).any()):
            return None
        parts.append(Wanted(shape, where))
    best: tuple[Program, tuple[int, ...]] | None = None
    for program, order in shortened(_programs(wanted.shape, parts)):
        undone = undoing(program, wanted.shape, len(parts))
        if undone is None or (best is not None and written_length(undone) >= written_length(best[0])):
            continue
        given = [
            torch.arange(prod(shapes[number])).reshape(shapes[number]) + number * wanted.ids.numel() for number in order
        ]
        made = applied(undone, given, 1)
        expected = (wanted.ids + owner * wanted.ids.numel()).reshape(wanted.shape)
        if made is not None and len(made) == 1 and torch.equal(made[0], expected):
            best = undone, order
    return best


def _programs(shape: Shape, wanted: Sequence[Wanted]) -> Iterator[tuple[Program, tuple[int, ...]]]:
    """Operations that may make the outputs of the source, with the order in which they make them."""
    if len(wanted) == 1:
        yield from (((program), (0,)) for program in _simple(shape, wanted[0]))
        inner, growth = core(wanted[0])
        if growth:
            for program, order in _programs(shape, [inner]):
                yield (*program, *growth), order
            return
    if any(bool((item.ids < 0).any()) for item in wanted):
        return
    walks = [walked(item.ids) for item in wanted]
    if any(walk is None for walk in walks):
        return
    found = [walk for walk in walks if walk is not None]
    tried = []
    for own, ends in ((False, True), (True, True), (False, False), (True, False)):
        chain = stride_chain(shape, found, own=own, ends=ends)
        if chain is not None and chain not in tried:
            tried.append(chain)
            yield from programs_along(shape, chain, found, wanted)


def _simple(shape: Shape, wanted: Wanted) -> Iterator[Program]:
    """Short programs for one output."""
    new = wanted.shape
    if new == shape:
        yield ()
    if prod(new) == prod(shape) and new != shape:
        yield from reshapes(shape, new)
    if len(new) == len(shape) and not bool((wanted.ids < 0).any()):
        yield from selections(shape, wanted)
    if len(new) == len(shape):
        for dim, (old, size) in enumerate(zip(shape, new, strict=True)):
            if (
                old
                and size > old
                and size % old == 0
                and all(a == b for at, (a, b) in enumerate(zip(shape, new, strict=True)) if at != dim)
            ):
                yield (Repeat(dim, size // old),)
                yield (Repeat(dim, size // old, True),)


def _digest(*tensors: torch.Tensor) -> str:
    from hashlib import sha256

    made = sha256()
    for tensor in tensors:
        made.update(tensor.numpy().tobytes())
    return made.hexdigest()
