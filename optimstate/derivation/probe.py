"""Finding the origin of every element of a function's results by calling it on tagged tensors.

The n-th element of all sources has the digits of n in base 128 as its values, one digit per call: every floating dtype,
also bfloat16, holds such integers exactly, so that casts inside the function change nothing. Further calls, with zeros,
ones and two draws of random integers, distinguish a layout from arithmetic; only the random inputs decide. Three more
calls, with large, huge and tiny values of both signs, reveal functions that depend on the size of values: a clamp, a
threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from optimstate.derivation.draws import BASE, drawn, holds, magnitudes, rounding
from optimstate.derivation.origins import Combined, Function, Moved, New, Origin, Probe, Shape, Source, Unexplained
from optimstate.describe import describe
from optimstate.errors import DerivationError

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["probe", "tensors"]


Outputs = dict[str, Any]
_NOT_LINEAR = "it is not linear"
_ADDS = "it adds elements of one tensor to each other, which no operation of the plan language does"
_ONE_NUMBER = "its elements are not all multiplied by one number"
_MOST_SOURCES = 4096  # sources up to which each is tried alone, to find linear combinations


def probe(function: Function, sources: Mapping[str, Source]) -> Probe:
    """Call a function on tagged tensors to find the origin of each element of its outputs.

    Raises:
        DerivationError: It does not return a mapping of names to tensors, or names and shapes depend on values.
    """
    return _Prober(function, sources).run()


def tensors(made: object, *, meta: bool = False) -> dict[str, torch.Tensor]:
    """The result of a function as a dict of tensors.

    Args:
        made: The result.
        meta: Whether the function got tensors without values.

    Raises:
        DerivationError: The result is not a mapping of names to tensors with values.
    """
    from optimstate.installed_torch import torch

    if not isinstance(made, Mapping):
        raise DerivationError(f"the function returned {type(made).__name__}, not a mapping of names to tensors")
    for name, value in made.items():
        if not isinstance(value, torch.Tensor):
            raise DerivationError(f"the function returned {type(value).__name__} for {describe(name)}, not a tensor")
        if not isinstance(name, str):
            raise DerivationError(f"the function returned a tensor under {describe(name)}, which is not a text")
        if value.is_meta and not meta:
            raise DerivationError(f"the function returned a tensor for {describe(name)}, which holds no values")
        if value.layout != torch.strided or value.is_quantized:
            kind = "a quantized tensor" if value.is_quantized else f"a tensor of the layout {value.layout}"
            raise DerivationError(f"the function returned {kind} for {describe(name)}, which no plan makes")
    return dict(made)


class _Prober:
    def __init__(self, function: Function, sources: Mapping[str, Source]) -> None:
        from optimstate.installed_torch import torch

        self.torch: Any = torch
        self.function, self.sources = function, dict(sources)
        self.starts: dict[str, int] = {}
        total = 0
        for name, source in self.sources.items():
            self.starts[name] = total
            total += prod(source.shape)
        self.total, self.calls, self.base = total, 0, BASE
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self.places = 1
        self.apart: dict[str, tuple[torch.Tensor, list[Outputs], Outputs, list[Outputs]]] = {}

    # --- calls ------------------------------------------------------------------------------------------------------

    def _call(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs as float64, for sources whose elements have these values (float64, one for each tag)."""
        from optimstate.installed_torch import dtype_of

        given = {}
        for name, source in self.sources.items():
            start = self.starts[name]
            flat = values[start : start + prod(source.shape)]
            given[name] = flat.reshape(source.shape).to(dtype_of(source.dtype), copy=True)
        self.calls += 1
        with self.torch.no_grad():
            made = tensors(self.function(given))
        for name, value in made.items():
            if value.is_complex() and bool((value.detach().imag != 0).any()):
                raise DerivationError(
                    f"{describe(name)} is not a layout of the sources: it joins them to complex numbers"
                )
        shapes = {name: tuple(value.shape) for name, value in made.items()}
        if self.shapes and shapes != self.shapes:
            changed = min(set(shapes.items()) ^ set(self.shapes.items()))[0]
            raise DerivationError(f"the names or shapes of the outputs depend on the values: {describe(changed)}")
        self.shapes = shapes
        self.dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in made.items()}
        found = {}
        for name, value in made.items():
            real = value.detach().real if value.is_complex() else value.detach()
            found[name] = real.to(self.torch.float64, copy=True).reshape(-1)
        return found

    def _filled(self, value: float) -> torch.Tensor:
        made: torch.Tensor = self.torch.full((self.total,), value, dtype=self.torch.float64)
        return made

    def _digit(self, place: int) -> torch.Tensor:
        tags = self.torch.arange(self.total, dtype=self.torch.int64)
        made: torch.Tensor = (tags // self.base**place % self.base).to(self.torch.float64)
        return made

    def _chosen_base(self) -> int:
        """The base of the digits of tags, which every dtype of sources and outputs can hold exactly."""
        dtypes = {*(source.dtype for source in self.sources.values()), *self.dtypes.values()}
        if "bool" in dtypes:
            return 2
        return 8 if any(dtype.startswith("float8") for dtype in dtypes) else BASE

    # --- conclusions ------------------------------------------------------------------------------------------------

    def run(self) -> Probe:
        zeros, again, ones = self._call(self._filled(0)), self._call(self._filled(0)), self._call(self._filled(1))
        self.base = self._chosen_base()
        while self.base**self.places < self.total:
            self.places += 1
        digits = [self._call(self._digit(place)) for place in range(self.places)]
        draws = [drawn(self.sources, self.base, seed, signed=seed == 2) for seed in (1, 2)]
        seen = [self._call(values) for values in draws]
        found: dict[str, Origin] = {}
        open_: list[str] = []
        for name in self.shapes:
            z, o = zeros[name], ones[name]
            random = (z != again[name]) & ~(z.isnan() & again[name].isnan())
            same = ~random  # elements that are equal in all calls
            if random.all() and z.numel():
                found[name] = New(self.shapes[name], random=True)
            elif not bool(self.torch.isfinite(o - z)[same & (o != z)].all()):
                found[name] = Unexplained("it is not finite on zeros or ones", ())
            elif not bool((o != z)[same].any()) and all(_equal(r[name], z, same) for r in seen) and z.numel():
                found[name] = New(self.shapes[name], random=bool(random.any()))
            else:
                moved = self._moved(name, z, o, [d[name] for d in digits], draws, [r[name] for r in seen], random)
                if moved is None:
                    open_.append(name)
                else:
                    found[name] = moved
        if open_:
            found.update(self._combinations(open_, zeros, draws, seen))
        for values in magnitudes(self.sources, self.base):
            made = self._call(values)
            for name, origin in found.items():
                if not isinstance(origin, Unexplained) and not holds(
                    origin, self.dtypes[name], zeros[name], values, made[name]
                ):
                    found[name] = Unexplained("it depends on how large the values are", self._taken(origin))
        named = {
            name: origin if not isinstance(origin, Unexplained) or origin.sources else self._blamed(name, origin)
            for name, origin in ((name, found[name]) for name in self.shapes)
        }
        return Probe(self.sources, self.starts, named, self.calls)

    def _taken(self, origin: Origin) -> tuple[str, ...]:
        """Up to four sources whose elements an output takes."""
        ids = [origin.ids] if isinstance(origin, Moved) else []
        ids += [part for part, _ in origin.parts] if isinstance(origin, Combined) else []
        names = list(self.starts)
        bounds = self.torch.tensor(list(self.starts.values()), dtype=self.torch.int64)
        found = {int(n) for each in ids for n in self.torch.searchsorted(bounds, each[each >= 0], right=True).unique()}
        return tuple(names[number - 1] for number in sorted(found))[:4]

    def _moved(
        self,
        name: str,
        z: torch.Tensor,
        o: torch.Tensor,
        digits: list[torch.Tensor],
        draws: list[torch.Tensor],
        drawn: list[torch.Tensor],
        random: torch.Tensor,
    ) -> Moved | None:
        """The output as a layout of the sources, or None."""
        from optimstate.installed_torch import torch

        there = (o != z) & ~random
        nowhere = ~there & ~random
        factors = o - z
        if not z.numel():
            return Moved(torch.empty(self.shapes[name], dtype=torch.int64), 1.0, 0.0, 0.0, self.dtypes[name])
        scale = _one_number(factors[there])
        shift = _one_number(z[there])
        fill = _one_number(torch.unique(z[nowhere])) if bool(nowhere.any()) else 0.0  # an infinity has no difference
        if shift is None or fill is None or (bool(random.any()) and bool(nowhere.any())):
            return None
        factor = factors[there] if scale is None else scale
        largest = float(factors[there].abs().max()) * 1.5 if scale is None else scale
        ids = torch.full(z.shape, -1, dtype=torch.int64)
        made = torch.zeros(int(there.sum()), dtype=torch.int64)
        for place, values in enumerate(digits):
            exact = (values[there] - shift) / factor
            made += exact.round().to(torch.int64) * self.base**place
        if made.numel() and not (int(made.min()) >= 0 and int(made.max()) < self.total):
            return None
        ids[there] = made
        room = rounding(self.dtypes[name], largest, shift)
        for values, seen in zip(draws, drawn, strict=True):
            expected = torch.full_like(seen, fill)
            expected[there] = values[made] * factor + shift
            if not bool(((expected == seen) | ((expected - seen).abs() <= room))[~random].all()):
                return None
        ids = ids.reshape(self.shapes[name])
        moved = Moved(ids, scale or 1.0, shift, "random" if bool(random.any()) else fill, self.dtypes[name])
        return moved if scale is not None else moved._replace(factors=factors.reshape(self.shapes[name]))

    def _combinations(
        self,
        names: list[str],
        zeros: dict[str, torch.Tensor],
        draws: list[torch.Tensor],
        drawn: list[dict[str, torch.Tensor]],
    ) -> dict[str, Origin]:
        """The outputs as sums over sources, each of which is tried alone with all others zero."""
        from optimstate.installed_torch import torch

        if len(self.sources) > _MOST_SOURCES:
            return {name: Unexplained("it is not a layout of single elements", ()) for name in names}
        terms: dict[str, list[tuple[str, torch.Tensor, float]]] = {name: [] for name in names}
        refused: dict[str, Unexplained] = {}
        for source, spec in self.sources.items():
            start, stop = self.starts[source], self.starts[source] + prod(spec.shape)
            single = self._filled(0)
            single[start:stop] = 1
            ones = self._call(single)
            touched = [name for name in names if name not in refused and not torch.equal(ones[name], zeros[name])]
            if not touched:
                continue
            digits = []
            for place in range(self.places):
                tags = self._filled(0)
                tags[start:stop] = self._digit(place)[start:stop]
                digits.append(self._call(tags))
            for name in touched:
                factor = _one_number(ones[name] - zeros[name])
                if factor is None:
                    refused[name] = Unexplained(self._reason(name, source, zeros[name]), (source,))
                    continue
                room = rounding(self.dtypes[name], factor, 0.0)
                ids = sum(
                    ((d[name] - zeros[name]) / factor).round().to(torch.int64) * self.base**place
                    for place, d in enumerate(digits)
                )
                assert not isinstance(ids, int)
                good = room < 1 and bool(((ids >= start) & (ids < stop)).all())
                if not good:
                    refused[name] = Unexplained(self._reason(name, source, zeros[name]), (source,))
                    continue
                terms[name].append((source, ids, factor))
        found: dict[str, Origin] = {}
        for name in names:
            if name in refused:
                found[name] = refused[name]
                continue
            shift = _one_number(zeros[name])
            blamed = tuple(source for source, _, _ in terms[name])[:4]
            if shift is None or not terms[name]:
                reason = "a tensor of constants is added to it" if shift is None else _NOT_LINEAR
                found[name] = Unexplained(reason, blamed)
                continue
            explained = True
            for values, seen in zip(draws, drawn, strict=True):
                expected = sum((values[ids] * factor for _, ids, factor in terms[name])) + shift
                room = sum(rounding(self.dtypes[name], 2 * factor, 2 * shift) for _, _, factor in terms[name])
                explained &= bool(((expected - seen[name]).abs() <= room).all())
            if explained:
                parts = tuple((ids.reshape(self.shapes[name]), factor) for _, ids, factor in terms[name])
                found[name] = Combined(parts, shift, self.dtypes[name])
            else:
                reasons = dict.fromkeys(self._reason(name, source, zeros[name]) for source in ("", *blamed))
                found[name] = Unexplained(max(reasons, key=[_ONE_NUMBER, _ADDS, _NOT_LINEAR].index), blamed)
        return found

    def _reason(self, name: str, source: str, zeros: torch.Tensor) -> str:
        """Why an output is not a layout of this source, with all others zero; without a source, of all sources."""
        from optimstate.installed_torch import torch

        values, made, ones, digits = self._apart(source)
        first, second, both = (result[name] - zeros for result in made)
        largest = max(float(result.abs().max()) for result in (first, second, both))
        room = 4 * rounding(self.dtypes[name], largest / BASE, 1.0)
        if not bool(((first + second - both).abs() <= room).all()):
            return _NOT_LINEAR
        factors = ones[name] - zeros
        ids = torch.zeros_like(factors)
        for place, digit in enumerate(digits):
            ids += ((digit[name] - zeros) / factors).nan_to_num(0, 0, 0).round() * self.base**place
        single = values[ids.clamp(0, self.total - 1).to(torch.int64)] * factors
        if not source or bool(((single - first).abs() <= room).all()):
            return _ONE_NUMBER
        return _ADDS

    def _apart(self, source: str) -> tuple[torch.Tensor, list[Outputs], Outputs, list[Outputs]]:
        """The outputs for one source, with all others zero.

        Returns:
            Values for the source; the outputs for these, for other values, and for the sum of both; the output for
            ones; the outputs for each digit.
        """
        if source not in self.apart:
            start = self.starts.get(source, 0)
            mine = slice(start, start + prod(self.sources[source].shape) if source else self.total)

            def alone(values: torch.Tensor) -> torch.Tensor:
                made = self._filled(0)
                made[mine] = values[mine]
                return made

            one, other = (alone((drawn(self.sources, self.base, n, signed=True) / 2).trunc()) for n in (5, 6))
            made = [self._call(values) for values in (one, other, one + other)]
            digits = [self._call(alone(self._digit(place))) for place in range(self.places)]
            self.apart = {source: (one, made, self._call(alone(self._filled(1))), digits)}
        return self.apart[source]

    def _blamed(self, name: str, origin: Unexplained) -> Unexplained:
        """An unexplained output with up to four sources on which it depends."""
        if len(self.sources) > _MOST_SOURCES:
            return origin
        base = self._call(self._filled(1))[name]
        blamed = []
        for source, spec in self.sources.items():
            values = self._filled(1)
            values[self.starts[source] : self.starts[source] + prod(spec.shape)] = 2
            if not self.torch.equal(self._call(values)[name].nan_to_num(), base.nan_to_num()):
                blamed.append(source)
            if len(blamed) == 4:
                break
        return origin._replace(sources=tuple(blamed))


def _equal(one: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> bool:
    return bool((one == other)[where].all())


def _one_number(values: Any) -> float | None:
    """The number to which all elements are equal, except for rounding; 1.0 without elements, None if they differ."""
    if not values.numel():
        return 1.0
    first = float(values[0])
    if values.numel() == 1:
        return first
    close = bool(((values - first).abs() <= abs(first) * 1e-6).all())
    return first if close else None
