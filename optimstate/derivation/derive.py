"""Derive: the plan that does what a function from state dict to state dict does, proved before it is handed out."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from optimstate.derivation.derived import Derived, source_of
from optimstate.derivation.modules import derive_copying
from optimstate.derivation.moves import Derivation
from optimstate.derivation.scaled import derive_scaled
from optimstate.errors import DerivationError
from optimstate.user_code import guarded

__all__ = ["Derived", "derive"]

_SCALED_FROM = 1 << 27  # elements: eight gigabytes of tags and more


def derive(
    function: Any, sources: Any, *, into: Any = None, allow_drop: bool = False, scaled: bool | None = None
) -> Derived:
    """Read off what a function does to tensors and say it as the shortest plan that is found.

    The function is called a few times on tensors whose elements carry their numbers; nothing need be known of it. The
    plan is compared with the function on random integers before it is returned.

    With `into` the function is one that copies weights between two live modules, in place: it is called with a copy of
    each. What it leaves as the new module has it starts without state and is listed as untouched; rows that keep the
    new module's values are filled with those of the live model.

    Args:
        function: From a mapping of names to tensors to another; with `into`, from an old and a new module to nothing.
            Each call gets tensors of its own, which it may change.
        sources: Names, with a tensor or a shape for each; shapes stand for float32. Or a module: its state dict.
        into: The new module, with a module as `sources`.
        allow_drop: Whether sources may go nowhere. An unintended drop is the typical fault of such functions.
        scaled: Whether large dimensions are shrunk, at three scales, and what is found is carried to the real ones; a
            function that knows sizes by itself cannot be derived so. None: from 2**27 elements on.

    Raises:
        DerivationError: The function is not a layout (with the output and the sources that show it), drops sources
            without `allow_drop`, or the plan language cannot say what it does; or it failed (with its file and line).
    """
    from optimstate.installed_torch import torch

    with torch.random.fork_rng(devices=[]):
        return _derived(guarded(function, _named(function), DerivationError), sources, into, allow_drop, scaled)


def _named(function: Any) -> str:
    """What a function is called in messages."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}:{name}" if module and name else f"the function ({type(function).__name__})"


def _derived(function: Callable[..., Any], sources: Any, into: Any, allow_drop: bool, scaled: bool | None) -> Derived:
    if into is not None:
        if not hasattr(sources, "state_dict") or not hasattr(into, "state_dict"):
            raise DerivationError("with `into`, give two modules: the old one and the new one")
        if scaled:
            raise DerivationError("a script that copies between modules is derived at their real sizes")
        return derive_copying(function, sources, into, allow_drop=allow_drop)
    if hasattr(sources, "state_dict"):
        sources = sources.state_dict()
    given = {name: source_of(value) for name, value in sources.items()}
    if scaled is None:
        scaled = sum(prod(source.shape) for source in given.values()) >= _SCALED_FROM
    if scaled:
        return derive_scaled(lambda _: function, given, allow_drop=allow_drop)
    return Derivation(function, given, allow_drop).run()
