"""Derivation for models with too many elements for tags: all names, but shrunk dimensions.

Each large dimension gets a different small size at each of two scales, with a different ratio for each dimension. A
number in the plan that is the same at both scales is structure (the number of experts, the two of gate and up); one
that differs is a multiple of a product of source dimensions, which the ratio identifies. The plan is transferred to a
third scale and proved there, and to the real shapes, where the function is run on the meta device and all shapes are
compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain, combinations, combinations_with_replacement, cycle
from math import gcd, prod
from pathlib import Path
from typing import Any

from optimstate.derivation.derived import Derived
from optimstate.derivation.families import Moves
from optimstate.derivation.moves import Derivation
from optimstate.derivation.origins import Function, Source
from optimstate.derivation.probe import tensors
from optimstate.describe import describe
from optimstate.errors import DerivationError
from optimstate.plan.language.base import OPERATIONS, Operation
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.planner import plan_model
from optimstate.record import Record

__all__ = ["Basis", "Maker", "derive_scaled"]

Maker = Callable[[Mapping[int, int]], Function]
"""The function for shrunk dimensions: old sizes to new ones; empty for the real ones."""


class Basis(Record):
    """Tensors whose dimensions are shrunk instead of the sources', and the sources that follow from them.

    Sources that are joined from others, such as a fused projection of queries and fewer keys, have sums as sizes, which
    must not be shrunk separately.

    Attributes:
        sources: The tensors with their real shapes.
        shrunk: Returns the function's sources for shrunk dimensions.
    """

    sources: Mapping[str, Source]
    shrunk: Callable[[Mapping[int, int]], Mapping[str, Source]]


Shape = tuple[int, ...]
Triple = tuple[int, int, int]
_LARGE = 48  # dimensions up to this size are kept
_MOST_OUTPUTS = 1024  # dimensions up to this size may be a number of experts
_PRIMES = (
    (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73),
    (5, 3, 11, 7, 17, 13, 23, 19, 31, 29, 41, 37, 47, 43, 59, 53, 67, 61, 73, 71),
)
_THIRD = (7, 11, 3, 5, 19, 23, 13, 17, 37, 41, 29, 31, 53, 59, 43, 47, 71, 73, 61, 67)
_MOST_ELEMENTS = 1 << 25  # two gigabytes of tags
_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, KeyError)
"""Errors of a function that gets a size that it cannot use, or misses the name of a layer."""
_UNITS = (4, 16, 32, 64)  # shrunk sizes are multiples of one, for functions that split heads or halves


def derive_scaled(
    make: Maker, sources: Mapping[str, Source], *, allow_drop: bool = False, basis: Basis | None = None
) -> Derived:
    """Derive at shrunk dimensions, and transfer the plan to the real ones.

    Args:
        make: Returns the function for shrunk dimensions.
        sources: The sources with their real shapes.
        allow_drop: Whether sources may be in no output.
        basis: The tensors to shrink; without it, the sources themselves.

    Raises:
        DerivationError: The function is not a layout, contains sizes that were shrunk, or treats shrunk tensors
            differently.
    """
    reason: Exception | None = None
    some = sampled(sources)
    few = [(some, unit, False) for unit in _UNITS[:2]] if len(some) < len(sources) else []
    every = [(None, unit, mixed) for mixed in (False, True) for unit in _UNITS]
    for names, unit, mixed in [*few, *every]:
        try:
            return _Scaled(make, sources, allow_drop, unit, names, basis, mixed=mixed).run()
        except (DerivationError, *_MISFITS) as error:
            failed = not isinstance(error, DerivationError) or error.__cause__ is not None
            reason = error if failed else reason or error  # preferably an error of the function itself
    raise DerivationError(
        f"the function cannot be derived at shrunk dimensions: {reason}",
        hint="Derive it on one layer at its real size, or without scaling where memory allows.",
    )


def sampled(sources: Mapping[str, Source]) -> list[str]:
    """The names of a few layers of each kind, and all names outside of layers; all names if that saves little.

    Layers are distinguished by the first number in a name; those of one kind have the same names and shapes.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    kinds: dict[tuple[str, str], set[tuple[str, Shape]]] = {}
    chosen: list[str] = []
    for name, source in sources.items():
        found = _layer(name)
        if found is None:
            chosen.append(name)
            continue
        before, number, rest = found
        layers.setdefault((before, number), []).append(name)
        kinds.setdefault((before, number), set()).add((rest, source.shape))
    alike: dict[object, list[tuple[str, str]]] = {}
    for layer, kind in kinds.items():
        alike.setdefault((layer[0], frozenset(kind)), []).append(layer)
    for members in alike.values():
        for layer in dict.fromkeys([*members[:2], members[-1]]):
            chosen += layers[layer]
    kept = set(chosen)
    return [name for name in sources if name in kept] if len(kept) * 2 < len(sources) else list(sources)


def _layer(name: str) -> tuple[str, str, str] | None:
    """The part of a name before the first number between dots, the number, and the rest; None without a number."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return None if at is None else (".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :]))


class _Scaled:
    """One attempt.

    Args:
        make: Returns the function for shrunk dimensions.
        sources: The sources with their real shapes.
        allow_drop: Whether sources may be in no output.
        unit: Every shrunk dimension is a multiple of this number.
        names: The sources from which the plan is derived, before it is proved on all; None for all.
        basis: The tensors to shrink.
        mixed: Whether only dimensions that need it are multiples of the unit, and the others of the smallest unit.
    """

    def __init__(
        self,
        make: Maker,
        sources: Mapping[str, Source],
        allow_drop: bool,
        unit: int,
        names: Sequence[str] | None = None,
        basis: Basis | None = None,
        *,
        mixed: bool = False,
    ) -> None:
        self.make, self.allow_drop, self.every = make, allow_drop, sources
        self.sources = sources if names is None else {name: sources[name] for name in names}
        self.basis = basis
        shrunk = sources if basis is None else basis.sources
        uses = Counter(size for source in shrunk.values() for size in source.shape if size > _LARGE)
        large = sorted(uses, key=lambda size: (-uses[size], size))  # the most frequent become the smallest
        kept = self._naming(large, unit)
        large = [size for size in large if size not in kept]
        if len(large) > len(_THIRD):
            raise DerivationError(f"{len(large)} different dimensions are too many to tell apart")
        self.scales = self._scales(dict.fromkeys(large, unit))
        if mixed:
            self.scales = self._scales(self._needed(large, unit))
        elements = max(sum(prod(s.shape) for s in self._shrunk(scale).values()) for scale in self.scales)
        if elements > _MOST_ELEMENTS:
            raise DerivationError(f"{elements} elements are left at shrunk dimensions, more than {_MOST_ELEMENTS}")

    def _scales(self, units: Mapping[int, int]) -> list[dict[int, int]]:
        """The small sizes at each scale, where each size has a unit of its own; one that would grow stays as it is."""
        columns = zip(units.items(), *_PRIMES, _THIRD, strict=False)
        small = {size: [_small(size, unit * prime) for prime in primes] for (size, unit), *primes in columns}
        return [{size: sizes[at] for size, sizes in small.items() if max(sizes) < size} for at in range(3)]

    def _needed(self, large: Sequence[int], unit: int) -> dict[int, int]:
        """A unit for each size: the smallest with which the function takes tensors without elements."""
        units = dict.fromkeys(large, unit)
        for size in large:
            lower = {**units, size: _UNITS[0]}
            with suppress(DerivationError, *_MISFITS):
                for scale in self._scales(lower):
                    self._outputs(scale)
                units = lower
        return units

    def _naming(self, large: Sequence[int], unit: int) -> set[int]:
        """Sizes that determine the number of outputs (experts of a fused tensor), which must not be shrunk."""
        wanted = self._outputs({}).keys()
        small = {size: _small(size, unit * _PRIMES[0][0]) for size in large}
        counts = [size for size in large if size <= _MOST_OUTPUTS]
        for kept in chain([()], combinations(counts, 1), combinations(counts, 2)):
            scale = {size: new for size, new in small.items() if size not in kept}
            with suppress(DerivationError, *_MISFITS):
                if self._outputs(scale).keys() == wanted:
                    return set(kept)
        return set()

    def _outputs(self, scale: Mapping[int, int], *, every: bool = False) -> dict[str, Shape]:
        """The names and shapes of the outputs at a scale, from tensors without elements."""
        from optimstate.installed_torch import dtype_of, torch

        given = {
            name: torch.empty(source.shape, dtype=dtype_of(source.dtype), device="meta")
            for name, source in self._shrunk(scale, every=every).items()
        }
        return {name: tuple(value.shape) for name, value in tensors(self.make(scale)(given), meta=True).items()}

    def run(self) -> Derived:
        first, second = (self._at(scale) for scale in self.scales[:2])
        for one, other in zip((first.first, first.second), (second.first, second.second), strict=True):
            if [(move.sources, move.targets) for move in one] != [(move.sources, move.targets) for move in other]:
                raise DerivationError("it moves other tensors at one size than at another")
        third = self.scales[2]
        self._derivation(third, self._lifted(first, second, third), prove=True)
        if self.sources is not self.every:
            self._prove_on_all(first, second)
        whole = self._derivation({}, self._lifted(first, second, {}), prove=False)
        plan = whole.plan()
        self._compare_shapes(plan, whole.new)
        whole.calls = 3 * first.calls + 1
        whole.notes += first.notes
        whole.notes.append("derived at shrunk dimensions; at the real ones every shape was compared, no values")
        return whole.derived(plan)

    def _prove_on_all(self, first: Derivation, second: Derivation) -> None:
        """Compare the plan of a few layers with the function on all layers, at the smallest sizes that it accepts."""
        primes = cycle(_PRIMES[0][:4])
        small = {size: _small(size, 2 * prime) for size, prime in zip(self.scales[2], primes, strict=False)}
        reason: Exception | None = None
        for scale in (small, self.scales[2]):
            plan = self._derivation(scale, self._lifted(first, second, scale), prove=False).plan()
            whole = Derivation(self.make(scale), self._shrunk(scale, every=True), self.allow_drop)
            whole.new, whole.random = first.new, first.random
            try:
                whole.compare(plan)
            except (DerivationError, *_MISFITS) as error:
                reason = reason or error
            else:
                return
        raise DerivationError(f"layers that look alike are moved differently: {reason}")

    def _shrunk(self, scale: Mapping[int, int], *, every: bool = False) -> dict[str, Source]:
        names = self.every if every else self.sources
        if self.basis is None:
            return {name: _scaled(self.every[name], scale) for name in names}
        made = self.basis.shrunk(scale)
        if made.keys() != self.every.keys():
            raise DerivationError("a dimension says how many sources there are")
        return {name: made[name] for name in names}

    def _at(self, scale: Mapping[int, int]) -> Derivation:
        made = Derivation(self.make(scale), self._shrunk(scale), self.allow_drop)
        made.explain()
        return made

    def _derivation(
        self, scale: Mapping[int, int], found: tuple[list[Moves], list[Moves], Derivation], *, prove: bool
    ) -> Derivation:
        made = Derivation(self.make(scale), self._shrunk(scale), self.allow_drop)
        made.first, made.second = found[0], found[1]
        made.dropped, made.new, made.random = found[2].dropped, found[2].new, found[2].random
        made.untouched = found[2].untouched
        if prove:
            made.prove(made.plan())
        return made

    # --- sizes -------------------------------------------------------------------------------------------------------

    def _lifted(
        self, first: Derivation, second: Derivation, scale: Mapping[int, int]
    ) -> tuple[list[Moves], list[Moves], Derivation]:
        """The moves with the sizes of another scale."""
        passes = []
        given, made = ([each(at) for at in (*self.scales[:2], scale)] for each in (self._shapes, self._outputs))
        for one, other in zip((first.first, first.second), (second.first, second.second), strict=True):
            moves = []
            for move, twin in zip(one, other, strict=True):
                dims = [_dims(move.sources, given), _dims(move.targets, made)]
                moves.append(move._replace(operations=tuple(_lift_all(move.operations, twin.operations, dims))))
            passes.append(moves)
        return passes[0], passes[1], first

    def _shapes(self, scale: Mapping[int, int]) -> dict[str, Shape]:
        return {name: source.shape for name, source in self._shrunk(scale).items()}

    def _compare_shapes(self, plan: Plan, new: Sequence[str]) -> None:
        """Run the function at the real shapes on the meta device, and compare every shape with the plan's."""
        from optimstate.installed_torch import dtype_of, torch

        given = {
            name: torch.empty(source.shape, dtype=dtype_of(source.dtype), device="meta")
            for name, source in self.every.items()
        }
        expected = {name: shape for name, shape in self._outputs({}, every=True).items() if name not in new}
        moves = plan_model(plan, given).sections["model"].moves
        made = {move.target: move.expression.shape for move in moves if move.expression is not None}
        wrong = [name for name in expected.keys() | made.keys() if expected.get(name) != made.get(name)]
        if wrong:
            name = min(wrong)
            raise DerivationError(f"{describe(name)} has shape {expected.get(name)}, the plan makes {made.get(name)}")


def _scaled(source: Source, scale: Mapping[int, int]) -> Source:
    return source._replace(shape=tuple(scale.get(size, size) for size in source.shape))


def _dims(names: Sequence[str], shapes: Sequence[Mapping[str, Shape]]) -> list[Triple]:
    """The sizes of shrunk dimensions at the first scale, at the second, and at the requested one.

    Args:
        names: The names of the tensors; if none of them exists, all tensors are used.
        shapes: The shapes at each of the three scales.
    """
    known = [name for name in names if name in shapes[0]] or list(shapes[0])
    columns = {dims for name in known for dims in zip(*(at[name] for at in shapes), strict=True)}
    return sorted((one, other, asked) for one, other, asked in columns if one != other)


def _small(size: int, new: int) -> int:
    """A shrunk size, which is divisible by three (queries, keys and values) if the real one is."""
    return new * gcd(size, 3)


def _lift_all(
    one: Sequence[Operation], other: Sequence[Operation], dims: Sequence[Sequence[Triple]]
) -> Iterator[Operation]:
    if [operation.KEY for operation in one] != [operation.KEY for operation in other]:
        raise DerivationError("it needs other operations at one size than at another")
    for mine, twin in zip(one, other, strict=True):
        value = _lift(mine.value(), twin.value(), dims)
        parsed = OPERATIONS[mine.KEY].parse(value, Path())
        if not isinstance(parsed, Operation):
            raise DerivationError(f"{mine.KEY} = {value} cannot be written")
        yield parsed


def _lift(one: Any, other: Any, dims: Sequence[Sequence[Triple]]) -> Any:
    """A value of a plan at another scale: equal values stay, integers that differ follow dimensions.

    Args:
        one: The value at the first scale.
        other: The value at the second scale.
        dims: The dimensions of the sources, and those of the targets, which are used if no source fits.
    """
    if isinstance(one, dict):
        if not isinstance(other, dict) or one.keys() != other.keys():
            raise DerivationError("it needs other operations at one size than at another")
        return {key: _lift(value, other[key], dims) for key, value in one.items()}
    if isinstance(one, list):
        if not isinstance(other, list) or len(one) != len(other):
            raise DerivationError("it needs other operations at one size than at another")
        return [_lift(a, b, dims) for a, b in zip(one, other, strict=True)]
    if one == other:
        return one
    found = next(filter(None, (_followed(one, other, asked) for asked in dims)), set())
    if len(found) != 1:
        raise DerivationError(f"a size, {one} and {other} at two scales, follows from no dimension of the sources")
    return found.pop()


def _followed(one: int, other: int, dims: Sequence[Triple]) -> set[int]:
    """The possible values of a size at another scale: a fraction or multiple of a dimension, or of a product of two."""
    for count in (1, 2):
        found = set()
        for chosen in combinations_with_replacement(dims, count):
            products = [prod(sizes) for sizes in zip(*chosen, strict=True)]
            factor = Fraction(one, products[0])
            lifted = factor * products[2]
            if factor == Fraction(other, products[1]) and lifted.denominator == 1:
                found.add(int(lifted))
        if found:
            return found
    return set()
