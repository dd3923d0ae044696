"""Matching an optimizer's parameters with a model's: a match that is proved unique, or the possibilities that remain.

A parameter of an optimizer has a param group, an index in that group and, as its state shows, a shape. A parameter of a
model has a name, a shape and an index in the model. Each of the optimizer's parameters is one of the model's. The
question is whether only one assignment fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from optimstate.record import Record

__all__ = ["Matching", "match"]

Shape = tuple[int, ...]
_PASSES, _NODES = 10_000, 2_000  # limits of the search


class Matching(Record):
    """The result of a match.

    Attributes:
        domains: For each parameter of the optimizer, the indices in the model that it can have, in order.
        fits: Whether any assignment fits.
    """

    domains: tuple[tuple[int, ...], ...]
    fits: bool

    @property
    def unique(self) -> bool:
        """Whether exactly one assignment fits."""
        return self.fits and all(len(domain) == 1 for domain in self.domains)


def match(
    groups: Sequence[Sequence[Shape | None]],
    model: Sequence[Shape | None],
    *,
    in_order: bool,
    excluded: Mapping[int, frozenset[int]] | None = None,
) -> Matching:
    """Match an optimizer's parameters with a model's.

    Args:
        groups: The shapes of the optimizer's parameters, group by group; None for a shape that is not known.
        model: The shapes of the model's parameters in its order; None if only the name is known.
        in_order: Whether every group lists its parameters in the model's order.
        excluded: For the number of a group, the indices in the model that its parameters cannot have.
    """
    every_index = (1 << len(model)) - 1
    without_shape = sum(1 << index for index, shape in enumerate(model) if shape is None)
    by_shape: dict[Shape | None, int] = {}
    for index, shape in enumerate(model):
        by_shape[shape] = by_shape.get(shape, 0) | (1 << index)
    domains: list[int] = []
    chains: list[range] = []
    for number, group in enumerate(groups):
        chains.append(range(len(domains), len(domains) + len(group)))
        barred = sum(1 << index for index in (excluded or {}).get(number, ()))
        for shape in group:
            found = every_index if shape is None else by_shape.get(shape, 0) | without_shape
            domains.append(found & ~barred)
    solver = _Solver(chains if in_order else [], len(domains) == len(model))
    if not solver.narrow(domains):
        return Matching(tuple(map(_indices, domains)), False)
    if all(_is_single(domain) for domain in domains):
        return Matching(tuple(map(_indices, domains)), True)
    first: list[int] | None = None
    for solution in solver.solutions(domains):
        if first is not None:  # two solutions: the match is not unique
            return Matching(tuple(map(_indices, domains)), True)
        first = solution
    if first is None:
        return Matching(tuple(map(_indices, domains)), solver.gave_up)
    return Matching(tuple(map(_indices, domains if solver.gave_up else first)), True)


def _indices(domain: int) -> tuple[int, ...]:
    return tuple(index for index in range(domain.bit_length()) if domain >> index & 1)


def _is_single(domain: int) -> bool:
    return domain != 0 and domain & (domain - 1) == 0


class _Solver:
    """Narrows domains: for each parameter the set of indices that it can have, as bits of an integer.

    Attributes:
        gave_up: Whether the search reached its limit, so that nothing is proved.
    """

    def __init__(self, chains: Sequence[range], all_used: bool) -> None:
        self._chains, self._all_used = chains, all_used
        self._nodes = 0
        self.gave_up = False

    def narrow(self, domains: list[int]) -> bool:
        """Remove impossible indices; False if none is left for some parameter."""
        for _ in range(_PASSES):
            before = list(domains)
            for chain in self._chains:
                _narrow_chain(domains, chain)
            if not all(domains) or not _narrow_sharing(domains):
                return False
            if self._all_used and not _narrow_last_choices(domains):
                return False
            if domains == before:
                return True
        self.gave_up = True
        return True

    def solutions(self, domains: list[int]) -> Iterator[list[int]]:
        """Search for assignments that fit; stops and sets `gave_up` when there are too many to try."""
        self._nodes += 1
        if self._nodes > _NODES:
            self.gave_up = True
            return
        open_ = [index for index, domain in enumerate(domains) if not _is_single(domain)]
        if not open_:
            yield domains
            return
        index = min(open_, key=lambda at: domains[at].bit_count())
        for choice in _indices(domains[index]):
            tried = list(domains)
            tried[index] = 1 << choice
            if self.narrow(tried):
                yield from self.solutions(tried)


def _narrow_chain(domains: list[int], chain: range) -> None:
    """Indices increase along a group that has the model's order."""
    lowest = 0
    for index in chain:
        domains[index] = domains[index] >> lowest << lowest
        if not domains[index]:
            return
        lowest = (domains[index] & -domains[index]).bit_length()
    highest = None
    for index in reversed(chain):
        if highest is not None:
            domains[index] &= (1 << highest) - 1
        if not domains[index]:
            return
        highest = domains[index].bit_length() - 1


def _narrow_sharing(domains: list[int]) -> bool:
    """An index that one parameter must have is closed to the others; so are n indices that n parameters must share."""
    taken = 0
    for domain in domains:
        if _is_single(domain):
            if taken & domain:
                return False
            taken |= domain
    counts: dict[int, int] = {}
    for domain in domains:
        counts[domain] = counts.get(domain, 0) + 1
    for domain, count in counts.items():
        if count > domain.bit_count():
            return False
        if count == domain.bit_count() and count > 1:
            for index, other in enumerate(domains):
                if other != domain:
                    domains[index] &= ~domain
    for index, domain in enumerate(domains):
        if not _is_single(domain):
            domains[index] &= ~taken
    return all(domains)


def _narrow_last_choices(domains: list[int]) -> bool:
    """If every index must be taken, an index that only one parameter can have belongs to it."""
    once = several = 0
    for domain in domains:
        several |= once & domain
        once |= domain
    only = once & ~several
    for index, domain in enumerate(domains):
        mine = domain & only
        if mine:
            if not _is_single(mine):
                return False
            domains[index] = mine
    return True
