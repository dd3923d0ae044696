"""Comparing a derived plan with its function, on random integers and fractions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimstate.derivation.origins import Function, Source
from optimstate.derivation.probe import tensors
from optimstate.derivation.threads import few_threads
from optimstate.describe import describe
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Target
from optimstate.plan.solve.planner import plan_model
from optimstate.record import Record, field

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Terms", "differences", "roundings"]


class Terms(Record):
    """Which differences between a plan and a function are allowed.

    Attributes:
        new: Outputs without sources, which the plan need not make.
        random: Outputs that the function partly draws at random; these parts are not compared.
        live: The live model's tensors, if outputs may keep their values.
        shared: Sources that are the same tensor as another -> that other one.
    """

    new: Sequence[str] = ()
    random: Sequence[str] = ()
    live: Mapping[str, Any] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)


def differences(plan: Plan, function: Function, sources: Mapping[str, Source], terms: Terms) -> list[str]:
    """The differences between a plan and a function on random integers: one sentence for each output that differs.

    Every floating dtype holds the integers exactly, so that a cast inside the function makes no difference.
    """
    with few_threads(sources):
        return _differing(plan, function, _drawn(sources, whole=True), terms)


def roundings(
    plan: Plan, function: Function, sources: Mapping[str, Source], terms: Terms
) -> tuple[list[str], list[str]]:
    """The differences on random fractions of both signs.

    Returns:
        Sentences for outputs that the function may have rounded in between, which the plan does not; and for others.
    """
    with few_threads(sources):
        drawn = _drawn(sources, whole=False)
        differ = _differing(plan, function, drawn, terms)
        beyond = set(_differing(plan, function, drawn, terms, rounding=True)) if differ else set()
    return [sentence for sentence in differ if sentence not in beyond], sorted(beyond)


def _differing(
    plan: Plan, function: Function, drawn: dict[str, torch.Tensor], terms: Terms, *, rounding: bool = False
) -> list[str]:
    from optimstate.installed_torch import torch

    def called() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return tensors(function({name: value.clone() for name, value in drawn.items()}))

    drawn.update({name: drawn[first] for name, first in terms.shared.items()})
    expected = called()
    target = None
    if terms.live is not None:
        target = Target.of_names({name: tuple(value.shape) for name, value in expected.items()}, terms.live)
    made = execute_model(plan_model(plan, drawn, target=target).sections["model"], drawn, live=terms.live)
    if terms.random:
        again = called()
        for name in terms.random:
            if name in made and made[name].shape == expected[name].shape:
                expected[name] = torch.where(expected[name] == again[name], expected[name], made[name])
    arithmetic = any(step.KEY in _ARITHMETIC for rule in plan.all_rules() for step in rule.operations)
    return list(_compared(expected, made, set(terms.new), arithmetic=arithmetic, rounding=rounding))


def _drawn(sources: Mapping[str, Source], *, whole: bool) -> dict[str, torch.Tensor]:
    """Random tensors of these shapes and dtypes."""
    from optimstate.installed_torch import dtype_of, torch

    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, source in sources.items():
        dtype = dtype_of(source.dtype)
        if whole or not (dtype.is_floating_point or dtype.is_complex):
            low, high = (0, 2) if dtype == torch.bool else (1, 127)
            made[name] = torch.randint(low, high, source.shape, generator=generator).to(dtype)
        else:
            kind = torch.complex128 if dtype.is_complex else torch.float64
            made[name] = torch.randn(source.shape, generator=generator, dtype=kind).to(dtype)
    return made


_ROUNDED = 2.0**-3, 2.0**-9  # the largest relative and absolute error of a cast to eight bits and back
_ARITHMETIC = ("average", "mean", "scale", "shift")


def _compared(
    expected: Mapping[str, Any], made: Mapping[str, Any], new: set[str], *, arithmetic: bool, rounding: bool
) -> Iterator[str]:
    from optimstate.installed_torch import torch

    relative = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9} if arithmetic else {}

    for name in expected.keys() - made.keys() - new:
        yield f"the plan does not make {describe(name)}"
    for name in made.keys() - expected.keys():
        yield f"the plan makes {describe(name)}, the function does not"
    for name, value in expected.items():
        if name in new or name not in made:
            continue
        other = made[name]
        if value.dtype != other.dtype or value.shape != other.shape:
            mine, theirs = (f"{item.dtype} {list(item.shape)}" for item in (other, value))
            yield f"{describe(name)} is {mine} by the plan, {theirs} by the function"
            continue
        exact = torch.complex128 if value.is_complex() else torch.float64
        one, two = value.to(exact), other.to(exact)
        wide, least = _ROUNDED if rounding else (relative.get(value.dtype, 1e-6), 1e-5 if arithmetic else 0.0)
        if not torch.allclose(one, two, rtol=wide, atol=least):
            yield f"{describe(name)}: {int((one != two).sum())} of {value.numel()} elements differ"
