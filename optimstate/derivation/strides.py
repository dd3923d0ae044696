"""Outputs whose index is a mixed-radix number over the source: reshape to its digits, cut, permute, repeat, reshape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from optimstate.derivation.programs import Program, Wanted, divisors, reshapes
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.operations import OPERATIONS
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["programs_along", "stride_chain", "walked"]

Split, Unstack, Slice, Repeat = (OPERATIONS[key] for key in ("split", "unstack", "slice", "repeat"))
Permute, Transpose = (OPERATIONS[key] for key in ("permute", "transpose"))


class _Digit(NamedTuple):
    """One digit of an output's index: the number of its values, and the distance of one step in the source."""

    size: int
    stride: int


class _Part(NamedTuple):
    """The part of one dimension of the reshaped source in an output: `length` positions from `start` on."""

    start: int
    length: int


class _Walk(Record):
    """An output in terms of the reshaped source.

    Attributes:
        parts: The part of each dimension of the source.
        order: The source dimensions of the output's dimensions, outermost first; -1 for a repetition.
        sizes: The sizes of the output's dimensions.
    """

    parts: tuple[_Part, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]


def walked(flat: torch.Tensor) -> tuple[int, list[_Digit]] | None:
    """The position in the source of an output's first element, and the digits of the index, outermost first."""
    if not flat.numel():
        return None
    digits: list[_Digit] = []
    while flat.numel() > 1:
        steps = flat[1:] - flat[:-1]
        stride = int(steps[0])
        if stride < 0:
            return None
        other = (steps != stride).nonzero()
        run = int(other[0]) + 1 if other.numel() else flat.numel()
        for size in divisors(flat.numel()):
            if size <= run and size > 1 and bool((flat.view(-1, size).diff(dim=1) == stride).all()):
                break
        else:
            return None
        digits.insert(0, _Digit(size, stride))
        flat = flat.view(-1, size)[:, 0]
    return int(flat[0]), digits


def stride_chain(shape: Shape, walks: Sequence[tuple[int, list[_Digit]]], *, own: bool, ends: bool) -> list[int] | None:
    """The strides of the dimensions of the reshaped source, from 1 to its size; None if they are not a chain."""
    total = prod(shape)
    marks = {1, total}
    if own:
        marks |= {prod(shape[dim:]) for dim in range(len(shape))}
    for _, digits in walks:
        for size, stride in digits:
            if stride:
                marks.add(stride)
                if ends and total % (stride * size) == 0:
                    marks.add(stride * size)
    chain = sorted(marks)
    return chain if all(high % low == 0 for low, high in pairwise(chain)) else None


def programs_along(
    shape: Shape, chain: list[int], walks: Sequence[tuple[int, list[_Digit]]], wanted: Sequence[Wanted]
) -> Iterator[tuple[Program, tuple[int, ...]]]:
    """Programs that reshape, cut, permute, repeat and reshape, with the order in which they make the outputs."""
    dims = tuple(high // low for low, high in pairwise(chain))[::-1]  # outermost first
    taken = [_taken(base, digits, chain, dims) for base, digits in walks]
    if any(walk is None for walk in taken):
        return
    found = [walk for walk in taken if walk is not None]
    partial = [dim for dim, size in enumerate(dims) if any(walk.parts[dim] != _Part(0, size) for walk in found)]
    for opening in reshapes(shape, dims):
        if len(found) == 1:
            yield from _one(opening, dims, partial, found[0], wanted[0].shape)
        else:
            yield from _several(opening, dims, partial, found, wanted)


def _taken(base: int, digits: Sequence[_Digit], chain: list[int], dims: Shape) -> _Walk | None:
    """An output in terms of the reshaped source; None if its digits do not fit the dimensions."""
    starts = [base // low % (high // low) for low, high in pairwise(chain)]
    lengths = [1] * len(starts)
    order: list[int] = []
    sizes: list[int] = []
    for size, stride in reversed(digits):  # innermost first
        if not stride:
            order.append(-1)
            sizes.append(size)
            continue
        at, left = chain.index(stride), size
        while left > 1:
            if at >= len(starts):
                return None
            quotient = chain[at + 1] // chain[at]
            here = quotient if left % quotient == 0 else left
            if here > quotient or starts[at] + here > quotient:
                return None
            lengths[at] = here
            order.append(len(dims) - 1 - at)
            sizes.append(here)
            left //= here
            at += 1
    parts = tuple(_Part(start, length) for start, length in zip(starts, lengths, strict=True))[::-1]
    return _Walk(parts, tuple(reversed(order)), tuple(reversed(sizes)))


def _one(
    opening: Program, dims: Shape, partial: Sequence[int], walk: _Walk, shape: Shape
) -> Iterator[tuple[Program, tuple[int, ...]]]:
    slices = tuple(Slice(dim, walk.parts[dim].start, walk.parts[dim].start + walk.parts[dim].length) for dim in partial)
    now = tuple(part.length for part in walk.parts)
    for ending in _arranged(now, walk, tuple(range(len(dims))), shape):
        yield (*opening, *slices, *ending), (0,)


def _several(
    opening: Program, dims: Shape, partial: Sequence[int], walks: Sequence[_Walk], wanted: Sequence[Wanted]
) -> Iterator[tuple[Program, tuple[int, ...]]]:
    if not partial or len({tuple(dim for dim in walk.order if dim not in partial) for walk in walks}) > 1:
        yield from _copies(opening, dims, partial, walks, wanted)
        return
    if len(partial) == 1:
        (dim,) = partial
        order = tuple(sorted(range(len(walks)), key=lambda number: walks[number].parts[dim].start))
        parts = [walks[number].parts[dim] for number in order]
        ends = [part.start + part.length for part in parts]
        if [part.start for part in parts] != [0, *ends[:-1]] or ends[-1] != dims[dim]:
            return
        lengths = {part.length for part in parts}
        shapes = [wanted[number].shape for number in order]
        left = tuple(d for d in range(len(dims)) if d != dim)
        if lengths == {1} and len(set(shapes)) == 1:
            for ending in _arranged(tuple(dims[d] for d in left), walks[0], left, shapes[0]):
                yield (*opening, Unstack(dim), *ending), order
        sizes = () if len(lengths) == 1 else tuple(part.length for part in parts)
        everything = tuple(range(len(dims)))
        for ending in _endings(dims, dim, parts, [walks[number] for number in order], everything, shapes):
            yield (*opening, Split(dim, sizes), *ending), order
        return
    if any(walk.parts[dim].length != 1 for walk in walks for dim in partial):
        return
    places = [sum(w.parts[dim].start * prod(dims[e] for e in partial if e > dim) for dim in partial) for w in walks]
    order = tuple(sorted(range(len(walks)), key=places.__getitem__))
    if sorted(places) != list(range(prod(dims[dim] for dim in partial))):
        return
    left = tuple(d for d in range(len(dims)) if d not in partial)
    front = (*partial, *left)
    turned = tuple(dims[d] for d in front)
    merged = (len(places), *turned[len(partial) :])
    for merging in reshapes(turned, merged):
        for ending in _arranged(merged[1:], walks[0], left, wanted[order[0]].shape):
            yield (*opening, *_permuted(front), *merging, Unstack(0), *ending), order


def _copies(
    opening: Program, dims: Shape, partial: Sequence[int], walks: Sequence[_Walk], wanted: Sequence[Wanted]
) -> Iterator[tuple[Program, tuple[int, ...]]]:
    """The same operations for every output: copies."""
    if len({(walk, item.shape) for walk, item in zip(walks, wanted, strict=True)}) == 1:
        for program, _ in _one(opening, dims, partial, walks[0], wanted[0].shape):
            yield program, tuple(range(len(walks)))


def _endings(
    dims: Shape, dim: int, parts: Sequence[_Part], walks: Sequence[_Walk], left: Shape, shapes: Sequence[Shape]
) -> Iterator[Program]:
    """Permutations and reshapes after a split, which must be the same for all parts, even of different sizes."""
    candidates = None
    alike = {
        (part.length, walk.order, walk.sizes, shape): walk
        for part, walk, shape in zip(parts, walks, shapes, strict=True)
    }
    for (length, _, _, shape), walk in alike.items():
        now = (*dims[:dim], length, *dims[dim + 1 :])
        mine = list(_arranged(now, walk, left, shape))
        candidates = mine if candidates is None else [ending for ending in candidates if ending in mine]
    yield from candidates or ()


def _arranged(now: Shape, walk: _Walk, left: Shape, shape: Shape) -> Iterator[Program]:
    """Programs from the remaining dimensions, of sizes `now`, to the output: permute, repeat and reshape."""
    where = {dim: place for place, dim in enumerate(left)}
    gone = [place for place, dim in enumerate(left) if dim not in walk.order]
    moving = [where[dim] for dim in walk.order if dim >= 0]
    if -1 not in walk.order:
        for keep in _placements(gone, moving):
            sizes = tuple(now[place] for place in keep)
            for closing in reshapes(sizes, shape):
                yield (*_permuted(keep), *closing)
        return
    keep = (*moving, *gone)
    sizes = tuple(now[place] for place in keep)
    raised = tuple(1 if dim < 0 else size for dim, size in zip(walk.order, walk.sizes, strict=True))
    repeats = tuple(
        Repeat(place, size) for place, (dim, size) in enumerate(zip(walk.order, walk.sizes, strict=True)) if dim < 0
    )
    for opening in reshapes(sizes, raised):
        for closing in reshapes(walk.sizes, shape):
            yield (*_permuted(keep), *opening, *repeats, *closing)


def _placements(gone: Sequence[int], moving: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Orders of dimensions, with those of size 1 that the output lacks at their natural position or at the end."""
    if not gone:
        yield tuple(moving)
        return
    natural = list(moving)
    for place in gone:
        before = [at for at, dim in enumerate(natural) if dim < place]
        natural.insert((before[-1] + 1) if before else 0, place)
    yield tuple(natural)
    yield (*moving, *gone)


def _permuted(order: Sequence[int]) -> Program:
    """A permutation in its shortest form: nothing, two exchanged dimensions, or a list of the first ones."""
    moved = [place for place, dim in enumerate(order) if place != dim]
    if not moved:
        return ()
    if len(moved) == 2:
        one, other = moved
        return (Transpose() if (one, other) == (len(order) - 2, len(order) - 1) else Transpose((one, other)),)
    return (Permute(tuple(order[: moved[-1] + 1])),)
