"""From where elements come to the operations of the plan language that bring them there.

One general method serves every layout: the elements of an output, read in order, are digits of a mixed-radix number
with a stride for each digit; the strides of all outputs of a source, and its size, form a chain in which each divides
the next, whose quotients are the dimensions the source is reshaped to. Digits that an output has in part are cut, the
rest is permuted and reshaped. Several sources of one output are the same problem the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

from optimstate.plan.expressions.evaluate import evaluated
from optimstate.plan.expressions.tree import Fill, Leaf, Shape
from optimstate.plan.language.base import Irreversible, Misfit, Operation
from optimstate.plan.language.operations import OPERATIONS
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Blocks", "Program", "Wanted", "applied", "blocked", "core", "cut", "joined"]

Concat, Stack, Split, Unstack = (OPERATIONS[key] for key in ("concat", "stack", "split", "unstack"))
Permute, Transpose, Reshape = (OPERATIONS[key] for key in ("permute", "transpose", "reshape"))
Slice, Select, Resize, Repeat = (OPERATIONS[key] for key in ("slice", "select", "resize", "repeat"))
Flip, Gather = OPERATIONS["flip"], OPERATIONS["gather"]
_INLINE = 64  # rows that a plan lists; longer lists are an index of their own

Program = tuple[Operation, ...]


class Wanted(Record):
    """A tensor to be made: its shape and, flat, the place in the source of each of its elements (-1: from nowhere)."""

    shape: Shape
    ids: torch.Tensor


class _Digit(NamedTuple):
    """One digit of an output's index: how many values it has and how far one step of it goes in the source."""

    size: int
    stride: int


class _Part(NamedTuple):
    """What an output takes of one dimension of the reshaped source: `length` places from `start`."""

    start: int
    length: int


class _Walk(Record):
    """An output over the reshaped source: what it takes of each dimension, and the order it has them in.

    Attributes:
        parts: For each dimension of the source.
        order: The dimensions that the output has, outermost first; -1 for a digit that stands still.
        sizes: How many values each of them has.
    """

    parts: tuple[_Part, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]


def applied(program: Sequence[Operation], tensors: Sequence[torch.Tensor], targets: int) -> list[torch.Tensor] | None:
    """What operations make of tensors in memory, as the engine does it; None where they do not fit."""
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


def cut(shape: Shape, wanted: Sequence[Wanted]) -> tuple[Program, tuple[int, ...]] | None:
    """The shortest operations that make outputs of one source.

    Returns:
        The operations and the order in which they give the outputs; None where there are none.
    """
    from optimstate.installed_torch import torch

    source = torch.arange(1, prod(shape) + 1, dtype=torch.int64).reshape(shape)  # growth fills with 0
    best: tuple[Program, tuple[int, ...]] | None = None
    for program, order in _shortened(_programs(shape, wanted)):
        if best is not None and _length(program) >= _length(best[0]):
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
    """The shortest operations that make one output of several sources, each of which it takes whole and once.

    Args:
        shapes: Of the sources.
        wanted: The output; its ids are places in the source that `owner` numbers.
        owner: For each element of the output the number of its source.

    Returns:
        The operations and the order in which they take the sources; None where there are none.
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
    for program, order in _shortened(_programs(wanted.shape, parts)):
        undone = _undone(program, wanted.shape, len(parts))
        if undone is None or (best is not None and _length(undone) >= _length(best[0])):
            continue
        given = [
            torch.arange(prod(shapes[number])).reshape(shapes[number]) + number * wanted.ids.numel() for number in order
        ]
        made = applied(undone, given, 1)
        expected = (wanted.ids + owner * wanted.ids.numel()).reshape(wanted.shape)
        if made is not None and len(made) == 1 and torch.equal(made[0], expected):
            best = undone, order
    return best


class Blocks(Record):
    """An output that is made of one block of each source, side by side.

    Attributes:
        shape: The output's, one dimension of it cut into equal parts where every part has a piece of each block.
        parts: For each block, in order, the number of its source and where it stands.
        joining: What makes the output of the blocks.
    """

    shape: Shape
    parts: tuple[tuple[int, tuple[slice, ...]], ...]
    joining: Program


def blocked(shape: Shape, owner: torch.Tensor) -> Iterator[Blocks]:
    """Ways to see an output as blocks of its sources, side by side along one dimension.

    Args:
        shape: The output's.
        owner: For each of its elements, flat, the number of its source; -1 for one from nowhere, which goes to the
            block before it, or to the first.
    """
    for dim, size in enumerate(shape):
        rows = owner.reshape(shape).movedim(dim, -1).reshape(-1, size)
        whole = rows[0]
        if not bool((rows == whole).all()):
            continue
        period = next(
            rows_ for rows_ in reversed(_divisors(size)) if bool((whole.view(-1, rows_) == whole[:rows_]).all())
        )
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
        yield Blocks(cut_up, parts, (Concat(at), *(next(_reshapes(cut_up, shape)) if several else ())))


def _shortened(found: Iterator[tuple[Program, tuple[int, ...]]]) -> Iterator[tuple[Program, tuple[int, ...]]]:
    """Each program once, before it without the first of two reshapes that follow each other."""
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


def _length(program: Program) -> int:
    return sum(len(str(operation)) + 10 for operation in program)


def _undone(program: Program, shape: Shape, count: int) -> Program | None:
    """The operations that undo others, which start from one tensor of this shape."""
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
    """The operations that undo one; tensors that differ in one dimension are reshaped by leaving it unsaid."""
    if isinstance(operation, Reshape) and len(set(before)) > 1 and len({len(shape) for shape in before}) == 1:
        columns = list(zip(*before, strict=True))
        if sum(len(set(column)) > 1 for column in columns) == 1:
            return [Reshape(tuple(column[0] if len(set(column)) == 1 else -1 for column in columns))]
    return operation.inverse(before)


# --- the search -----------------------------------------------------------------------------------------------------


def _programs(shape: Shape, wanted: Sequence[Wanted]) -> Iterator[tuple[Program, tuple[int, ...]]]:
    """Operations that may make the outputs of the source, with the order in which they give them."""
    if len(wanted) == 1:
        yield from (((program), (0,)) for program in _simple(shape, wanted[0]))
        inner, growth = core(wanted[0])
        if growth:
            for program, order in _programs(shape, [inner]):
                yield (*program, *growth), order
            return
    if any(bool((item.ids < 0).any()) for item in wanted):
        return
    walks = [_walked(item.ids) for item in wanted]
    if any(walk is None for walk in walks):
        return
    found = [walk for walk in walks if walk is not None]
    tried = []
    for own, ends in ((False, True), (True, True), (False, False), (True, False)):
        chain = _chain(shape, found, own=own, ends=ends)
        if chain is not None and chain not in tried:
            tried.append(chain)
            yield from _along(shape, chain, found, wanted)


def _simple(shape: Shape, wanted: Wanted) -> Iterator[Program]:
    """The readable ones, for one output."""
    new = wanted.shape
    if new == shape:
        yield ()
    if prod(new) == prod(shape) and new != shape:
        yield from _reshapes(shape, new)
    if len(new) == len(shape) and not bool((wanted.ids < 0).any()):
        yield from _selections(shape, wanted)
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


def _selections(shape: Shape, wanted: Wanted) -> Iterator[Program]:
    """Rows of one dimension chosen by a list that follows no pattern: a permutation, a flip."""
    for dim, (old, size) in enumerate(zip(shape, wanted.shape, strict=True)):
        if not size or any(a != b for at, (a, b) in enumerate(zip(shape, wanted.shape, strict=True)) if at != dim):
            continue
        first = wanted.ids.reshape(wanted.shape).movedim(dim, 0).reshape(size, -1)[:, 0]
        index = tuple((first // prod(shape[dim + 1 :]) % old).tolist())
        for rows in _divisors(gcd(old, size)):
            chosen = _blocks(index, rows)
            if chosen is not None:
                yield from _chosen(shape, dim, rows, chosen, wanted.shape)
                break


def _blocks(index: Sequence[int], rows: int) -> tuple[int, ...] | None:
    """The blocks of as many rows that a list of rows takes one after the other; None where it takes others."""
    starts = index[::rows]
    if any(start % rows for start in starts):
        return None
    whole = tuple(start + row for start in starts for row in range(rows))
    return tuple(start // rows for start in starts) if whole == tuple(index) else None


def _chosen(shape: Shape, dim: int, rows: int, blocks: tuple[int, ...], new: Shape) -> Iterator[Program]:
    """Blocks of a dimension in another order: the halves of gate and up exchanged, the parts of q, k and v."""
    count = shape[dim] // rows
    if blocks == tuple(range(count)):
        return  # nothing is chosen
    if blocks == tuple(range(count - 1, -1, -1)):
        choice: Operation = Flip((dim,))
    else:
        choice = Select(dim, blocks) if len(blocks) <= _INLINE else Gather(dim, blocks)
    if rows == 1:
        yield (choice,)
        return
    cut_up = (*shape[:dim], len(blocks), rows, *shape[dim + 1 :])
    for closing in _reshapes(cut_up, new):
        yield (Reshape((count, -1), dim), choice, *closing)


def core(wanted: Wanted) -> tuple[Wanted, Program]:
    """The block of an output that comes from the source, and the growth that adds the rest.

    Growth is at the ends of dimensions, at their beginnings (between two flips), or at either side of every one of a
    dimension's equal parts, as heads that are padded.
    """
    ids = wanted.ids.reshape(wanted.shape)
    there = ids >= 0
    if bool(there.all()) or not bool(there.any()):
        return wanted, ()
    shape: list[int] = []
    for dim, size in enumerate(wanted.shape):
        others = [d for d in range(ids.dim()) if d != dim]
        period = _period(there.any(dim=others) if others else there)
        shape += [size // period, period] if period < size else [size]
    ids, there = ids.reshape(shape), there.reshape(shape)
    box = []
    growth: list[Operation] = []
    for dim, new in enumerate(shape):
        others = [d for d in range(ids.dim()) if d != dim]
        along = (there.any(dim=others) if others else there).nonzero()
        start, stop = int(along.min()), int(along.max()) + 1
        box.append(slice(start, stop))
        if stop < new:
            growth.append(Resize(dim, new - start, Fill(0.0)))
        if start:
            growth += [Flip((dim,)), Resize(dim, new, Fill(0.0)), Flip((dim,))]
    closing = next(_reshapes(tuple(shape), wanted.shape))
    block = ids[tuple(box)]
    return Wanted(tuple(block.shape), block.reshape(-1)), (*growth, *closing)


def _period(there: torch.Tensor) -> int:
    """How many places one of the equal parts has in which elements from the source stand at the same, joined places."""
    size = there.numel()
    for period in reversed(_divisors(size)):
        part = there[:period].nonzero()
        alike = part.numel() and bool((there.view(-1, period) == there[:period]).all())
        if alike and int(part.max()) - int(part.min()) + 1 == part.numel():
            return size if part.numel() == period else period
    return size


def _walked(flat: torch.Tensor) -> tuple[int, list[_Digit]] | None:
    """Where an output begins in the source, and the digits of its index, outermost first."""
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
        for size in _divisors(flat.numel()):
            if size <= run and size > 1 and bool((flat.view(-1, size).diff(dim=1) == stride).all()):
                break
        else:
            return None
        digits.insert(0, _Digit(size, stride))
        flat = flat.view(-1, size)[:, 0]
    return int(flat[0]), digits


def _divisors(number: int) -> list[int]:
    """From the largest to 1."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def _chain(shape: Shape, walks: Sequence[tuple[int, list[_Digit]]], *, own: bool, ends: bool) -> list[int] | None:
    """The strides of the dimensions of the reshaped source, from 1 to its size; None where they do not divide."""
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


def _along(
    shape: Shape, chain: list[int], walks: Sequence[tuple[int, list[_Digit]]], wanted: Sequence[Wanted]
) -> Iterator[tuple[Program, tuple[int, ...]]]:
    """Reshape, cut, permute, repeat, reshape."""
    dims = tuple(high // low for low, high in pairwise(chain))[::-1]  # outermost first
    taken = [_taken(base, digits, chain, dims) for base, digits in walks]
    if any(walk is None for walk in taken):
        return
    found = [walk for walk in taken if walk is not None]
    partial = [dim for dim, size in enumerate(dims) if any(walk.parts[dim] != _Part(0, size) for walk in found)]
    for opening in _reshapes(shape, dims):
        if len(found) == 1:
            yield from _one(opening, dims, partial, found[0], wanted[0].shape)
        else:
            yield from _several(opening, dims, partial, found, wanted)


def _taken(base: int, digits: Sequence[_Digit], chain: list[int], dims: Shape) -> _Walk | None:
    """What an output takes of each dimension of the reshaped source."""
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
    for merging in _reshapes(turned, merged):
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
    """Permutation and reshape after a split whose parts may differ in size: forms without sizes where they do."""
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
    """From the dimensions that are left, of sizes `now`, to the output: permuted, repeated and reshaped."""
    where = {dim: place for place, dim in enumerate(left)}
    gone = [place for place, dim in enumerate(left) if dim not in walk.order]
    moving = [where[dim] for dim in walk.order if dim >= 0]
    if -1 not in walk.order:
        for keep in _placements(gone, moving):
            sizes = tuple(now[place] for place in keep)
            for closing in _reshapes(sizes, shape):
                yield (*_permuted(keep), *closing)
        return
    keep = (*moving, *gone)
    sizes = tuple(now[place] for place in keep)
    raised = tuple(1 if dim < 0 else size for dim, size in zip(walk.order, walk.sizes, strict=True))
    repeats = tuple(
        Repeat(place, size) for place, (dim, size) in enumerate(zip(walk.order, walk.sizes, strict=True)) if dim < 0
    )
    for opening in _reshapes(sizes, raised):
        for closing in _reshapes(walk.sizes, shape):
            yield (*_permuted(keep), *opening, *repeats, *closing)


def _placements(gone: Sequence[int], moving: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The order of dimensions, with those of size 1 that the output does not have where they disturb least."""
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
    """A permutation as it is written shortest: nothing, two dimensions exchanged, or the first ones listed."""
    moved = [place for place, dim in enumerate(order) if place != dim]
    if not moved:
        return ()
    if len(moved) == 2:
        one, other = moved
        return (Transpose() if (one, other) == (len(order) - 2, len(order) - 1) else Transpose((one, other)),)
    return (Permute(tuple(order[: moved[-1] + 1])),)


def _reshapes(old: Shape, new: Shape) -> Iterator[Program]:
    """Ways to write a reshape: of one dimension, of neighbours, of the whole; what leaves most unsaid comes first."""
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
