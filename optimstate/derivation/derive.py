"""Derive: the plan that does what a function from state dict to state dict does, proved before it is handed out."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from optimstate.derivation.moves import Derivation, Derived, source_of
from optimstate.derivation.probe import Function
from optimstate.derivation.scaled import derive_scaled

__all__ = ["Derived", "derive"]

_SCALED_FROM = 1 << 27  # elements: eight gigabytes of tags and more


def derive(
    function: Function, sources: Mapping[str, Any], *, allow_drop: bool = False, scaled: bool | None = None
) -> Derived:
    """Read off what a function does to tensors and say it as the shortest plan that is found.

    The function is called a few times on tensors whose elements carry their numbers; nothing need be known of it. The
    plan is compared with the function on random integers before it is returned.

    Args:
        function: From a mapping of names to tensors to another. Each call gets tensors of its own, which it may change.
        sources: Names, with a tensor or a shape for each; shapes stand for float32.
        allow_drop: Whether sources may go nowhere. An unintended drop is the typical fault of such functions.
        scaled: Whether large dimensions are shrunk, at three scales, and what is found is carried to the real ones; a
            function that knows sizes by itself cannot be derived so. None: from 2**27 elements on.

    Raises:
        DerivationError: The function is not a layout (with the output and the sources that show it), drops sources
            without `allow_drop`, or the plan language cannot say what it does.
    """
    given = {name: source_of(value) for name, value in sources.items()}
    if scaled is None:
        scaled = sum(prod(source.shape) for source in given.values()) >= _SCALED_FROM
    if scaled:
        return derive_scaled(lambda _: function, given, allow_drop=allow_drop)
    return Derivation(function, given, allow_drop).run()
