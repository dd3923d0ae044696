"""Names for an optimizer of a checkpoint that has none."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from optimstate.describe import describe
from optimstate.errors import StateMismatchError
from optimstate.problems import Problem
from optimstate.resuming.parts import Parts
from optimstate.state.naming import observed_shapes
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section

if TYPE_CHECKING:
    import torch

    from optimstate.hooks.engine.live import Live

__all__ = ["unreached_names", "with_given_names", "with_names"]


def with_given_names(
    parts: Parts, section: Section, state: OptimizerState, key: str, live: Live | None, given: Sequence[str] | str
) -> tuple[OptimizerState, Sequence[str]]:
    """The state with names that are given, after checking them; and notes.

    Args:
        parts: The checkpoint.
        section: The optimizer in it.
        state: Its state.
        key: What messages call it.
        live: The optimizer that gets it; None for several.
        given: In the order of its groups; or `live` for those of the live optimizer, which was built as the other.

    Raises:
        StateMismatchError: They cannot be its names.
    """
    own = [str(name) for _, name, _ in state.parameters()] if state.is_named else None
    if isinstance(given, str):
        if given != "live":
            raise StateMismatchError(f"saved is {describe(given)}", hint="Give a list of names, or 'live'.")
        sizes = [len(group.params) for group in state.groups]
        if live is None or sizes != list(map(len, live.names)):
            there = "there are several live ones" if live is None else f"the live ones {[*map(len, live.names)]}"
            raise StateMismatchError(
                f"{key}: its groups have {sizes} parameters, {there}, so they are not called as the live ones",
                hint="Give the names that they had, in the order of the groups: resume(..., saved=[...]).",
            )
        if own is not None:
            return state, ()
        _refuse_other_shapes(key, section, live)
        return state.named(live.names), [f"{key}: its parameters are taken to be in the live optimizer's order"]
    if own is not None:
        if list(given) != own:
            first = next(
                (f"{describe(a)} is given as {describe(b)}" for a, b in zip(own, given, strict=False) if a != b), ""
            )
            raise StateMismatchError(f"{key}: the checkpoint has names already, and {first or 'as many are not given'}")
        return state, ()
    if problems := parts.problems_of(section, given):
        raise StateMismatchError(f"{key}: {problems[0]}", hint="The names go in the order of the checkpoint's groups.")
    return state.named(given), ()


def with_names(
    parts: Parts,
    section: Section,
    state: OptimizerState,
    key: str,
    live: Live | None,
    models: Sequence[torch.nn.Module],
) -> tuple[OptimizerState, Sequence[str]]:
    """The state with names, its own or those that can be concluded; and notes.

    Args:
        parts: The checkpoint.
        section: The optimizer in it.
        state: Its state.
        key: What messages call it.
        live: The optimizer that gets it, whose order is taken where the checkpoint has no model; None for several.
        models: The live ones.

    Raises:
        StateMismatchError: They are not determined.
    """
    if state.is_named or not any(group.params for group in state.groups):
        return state, ()
    naming = parts.names(section, models)
    if naming is not None and naming.complete:
        return state.named([str(name) for name in naming.names]), ()
    sizes = [len(group.params) for group in state.groups]
    if naming is None or not state.state:
        if live is not None and sizes == list(map(len, live.names)):
            made = state.named(live.names)
            if not state.state:
                return made, ()
            _refuse_other_shapes(key, section, live)
            note = (
                f"{key}: the checkpoint has neither names nor a model: its parameters are taken to be in the order of "
                "the live optimizer's, as torch takes them"
            )
            return made, [note]
        there = "" if live is None else f", the live ones {[*map(len, live.names)]}"
        reasons: Sequence[str] = (f"its groups have {sizes} parameters{there}",)
    else:
        reasons = naming.problems
    built_alike = live is not None and sizes == list(map(len, live.names))
    raise StateMismatchError(
        f"the {sum(sizes)} parameters of the checkpoint's {key} have no names, so they cannot be matched: "
        + "; ".join(reasons[:3]),
        hint="Give them in the order they had, resume(..., saved=[...]), or write them into the file with "
        "`optimstate name`."
        + (" Where the live optimizer was built as that one was: resume(..., saved='live')." if built_alike else ""),
    )


def unreached_names(
    saved: Sequence[str] | Mapping[str, Sequence[str]] | None, asked: Collection[str]
) -> Iterator[Problem]:
    """Names that are given for an optimizer that is not resumed.

    Args:
        saved: As they are given.
        asked: The paths of the optimizers that are.
    """
    if saved is None:
        return
    given = list(saved) if isinstance(saved, Mapping) else [None]
    for label in given:
        if not asked or (label is not None and label not in asked):
            which = "no optimizer is" if label is None else f"no optimizer at {describe(label)} is"
            known = ", ".join(map(describe, sorted(asked))) or "none"
            yield Problem("unreached", f"names are given, and {which} resumed", "saved", remedy=f"there are {known}")


def _refuse_other_shapes(key: str, section: Section, live: Live) -> None:
    seen = [shape for group in observed_shapes(section.optimizer()) for shape in group]
    for (name, parameter), shape in zip(live.pairs(), seen, strict=True):
        if shape is not None and shape != tuple(parameter.shape):
            raise StateMismatchError(
                f"{key}: {describe(name)} has the shape {list(parameter.shape)}, and the parameter in its place in the "
                f"checkpoint {list(shape)}",
                hint="Give the names that the checkpoint's parameters had: resume(..., saved=[...]).",
            )
