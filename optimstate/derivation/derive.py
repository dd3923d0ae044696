"""Deriving the plan that is equivalent to a function from state dict to state dict, with a proof."""

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

_SCALED_FROM = 1 << 27  # elements, which need more than eight gigabytes of tags


def derive(
    function: Any, sources: Any, *, into: Any = None, allow_drop: bool = False, scaled: bool | None = None
) -> Derived:
    """Find the shortest plan that does what a function does to tensors.

    The function is called a few times on tensors whose elements are their own indices; nothing needs to be known about
    it. The plan is compared with the function on random integers before it is returned.

    With `into` the function copies weights between two live modules, in place: it is called with a copy of each.
    Parameters of the new module that it does not change start without state and are listed as untouched; rows that keep
    the new module's values are filled with those of the live model.

    Args:
        function: From a mapping of names to tensors to another; with `into`, from an old and a new module to nothing.
            Each call gets its own tensors, which it may change.
        sources: Names with a tensor or a shape for each; shapes stand for float32. Or a module: its state dict.
        into: The new module, with a module as `sources`.
        allow_drop: Whether sources may be in no output. An unintended drop is the typical fault of such functions.
        scaled: Whether large dimensions are shrunk, at three scales, and the plan transferred to the real sizes; this
            fails for a function that contains sizes. None: from 2**27 elements on.

    Raises:
        DerivationError: The function is not a layout (with an output and sources that show it), drops sources without
            `allow_drop`, or cannot be expressed in the plan language; or it failed (with its file and line).
    """
    from optimstate.installed_torch import torch

    with torch.random.fork_rng(devices=[]):
        return _derived(guarded(function, _named(function), DerivationError), sources, into, allow_drop, scaled)


def _named(function: Any) -> str:
    """The name of a function for messages."""
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
