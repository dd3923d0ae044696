"""Matching an optimizer's parameters with a model's: a match proved unique, or what is left open.

What is known of an optimizer's parameter is its param group, its place in that group and, from its state, its shape. A
model's parameter has a name, a shape and a place in the model. Each of the former is one of the latter; the question is
whether only one assignment of all of them fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from optimstate.record import Record

__all__ = ["Matching", "match"]

Shape = tuple[int, ...]
_PASSES, _NODES = 10_000, 2_000


class Matching(Record):
    """What is known when no further conclusion can be drawn.

    Attributes:
        domains: For each parameter of the optimizer the places in the model that it can have, in order.
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
        groups: The shapes of the optimizer's parameters, group by group; None where nothing shows one.
        model: The shapes of the model's parameters in its order; None where only names are known.
        in_order: Whether every group lists its parameters in the model's order.
        excluded: For groups of which that is known, the places in the model that they do not have.
    """
    any_place = (1 << len(model)) - 1
    unsized = sum(1 << place for place, shape in enumerate(model) if shape is None)
    by_shape: dict[Shape | None, int] = {}
    for place, shape in enumerate(model):
        by_shape[shape] = by_shape.get(shape, 0) | (1 << place)
    domains: list[int] = []
    chains: list[range] = []
    for number, group in enumerate(groups):
        chains.append(range(len(domains), len(domains) + len(group)))
        barred = sum(1 << place for place in (excluded or {}).get(number, ()))
        for shape in group:
            found = any_place if shape is None else by_shape.get(shape, 0) | unsized
            domains.append(found & ~barred)
    solver = _Solver(chains if in_order else [], len(domains) == len(model))
    if not solver.narrow(domains):
        return Matching(tuple(map(_places, domains)), False)
    if all(_is_single(domain) for domain in domains):
        return Matching(tuple(map(_places, domains)), True)
    first: list[int] | None = None
    for solution in solver.solutions(domains):
        if first is not None:  # a second one: nothing more is decided
            return Matching(tuple(map(_places, domains)), True)
        first = solution
    if first is None:
        return Matching(tuple(map(_places, domains)), solver.gave_up)
    return Matching(tuple(map(_places, domains if solver.gave_up else first)), True)


def _places(domain: int) -> tuple[int, ...]:
    return tuple(place for place in range(domain.bit_length()) if domain >> place & 1)


def _is_single(domain: int) -> bool:
    return domain != 0 and domain & (domain - 1) == 0


class _Solver:
    """Draws conclusions on domains: sets of positions, as bits of an integer.

    Attributes:
        gave_up: Whether the search ended before all was tried: then nothing is proved.
    """

    def __init__(self, chains: Sequence[range], all_used: bool) -> None:
        self._chains, self._all_used = chains, all_used
        self._nodes = 0
        self.gave_up = False

    def narrow(self, domains: list[int]) -> bool:
        """Remove impossible positions; False where none is left for a parameter."""
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
        """Assignments that fit, found by search; it stops and sets `gave_up` when there are too many to try."""
        self._nodes += 1
        if self._nodes > _NODES:
            self.gave_up = True
            return
        open_ = [index for index, domain in enumerate(domains) if not _is_single(domain)]
        if not open_:
            yield domains
            return
        index = min(open_, key=lambda at: domains[at].bit_count())
        for place in _places(domains[index]):
            tried = list(domains)
            tried[index] = 1 << place
            if self.narrow(tried):
                yield from self.solutions(tried)


def _narrow_chain(domains: list[int], chain: range) -> None:
    """Positions increase along a group that keeps the model's order."""
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
    """A position taken by one parameter is closed to others; so are n positions that n parameters share."""
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
    """If all positions must be taken, one that only a single parameter can have belongs to it."""
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
