"""Names for an optimizer in a checkpoint that has none."""

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
    """The state with the given names, after checking them, and notes.

    Args:
        parts: The checkpoint.
        section: The optimizer in it.
        state: Its state.
        key: Its name in messages.
        live: The optimizer that gets the state; None if several do.
        given: The names in the order of its groups; or `live` for the names of the live optimizer, which was built in
            the same way.

    Raises:
        StateMismatchError: The names cannot be those of its parameters.
    """
    own = [str(name) for _, name, _ in state.parameters()] if state.is_named else None
    if isinstance(given, str):
        if given != "live":
            raise StateMismatchError(f"saved is {describe(given)}", hint="Give a list of names, or 'live'.")
        sizes = [len(group.params) for group in state.groups]
        if live is None or sizes != list(map(len, live.names)):
            others = "there are several live ones" if live is None else f"the live ones {[*map(len, live.names)]}"
            raise StateMismatchError(
                f"{key}: its groups have {sizes} parameters, {others}, so it cannot have the live optimizer's names",
                hint="Give the names that they had, in the order of the groups: resume(..., saved=[...]).",
            )
        if own is not None:
            return state, ()
        _refuse_other_shapes(key, section, live)
        return state.named(live.names), [f"{key}: its parameters are taken to be in the live optimizer's order"]
    if own is not None:
        if list(given) != own:
            different = [f"{describe(a)} is given as {describe(b)}" for a, b in zip(own, given, strict=False) if a != b]
            why = different[0] if different else f"{len(given)} names are given for {len(own)}"
            raise StateMismatchError(f"{key}: the checkpoint already has names, and {why}")
        return state, ()
    if problems := parts.problems_of(section, given):
        raise StateMismatchError(f"{key}: {problems[0]}", hint="Give names in the order of the checkpoint's groups.")
    return state.named(given), ()


def with_names(
    parts: Parts,
    section: Section,
    state: OptimizerState,
    key: str,
    live: Live | None,
    models: Sequence[torch.nn.Module],
) -> tuple[OptimizerState, Sequence[str]]:
    """The state with its own or inferred names, and notes.

    Args:
        parts: The checkpoint.
        section: The optimizer in it.
        state: Its state.
        key: Its name in messages.
        live: The optimizer that gets the state, whose order is used if the checkpoint has no model; None if several do.
        models: The live models.

    Raises:
        StateMismatchError: The names are not determined.
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
                f"{key}: the checkpoint has neither names nor a model: its parameters are taken to be in the live "
                "optimizer's order, as torch does"
            )
            return made, [note]
        others = "" if live is None else f", the live ones {[*map(len, live.names)]}"
        reasons: Sequence[str] = (f"its groups have {sizes} parameters{others}",)
    else:
        reasons = naming.problems
    built_alike = live is not None and sizes == list(map(len, live.names))
    raise StateMismatchError(
        f"the {sum(sizes)} parameters of the checkpoint's {key} have no names, so they cannot be matched: "
        + "; ".join(reasons[:3]),
        hint="Give them in the order that they had, resume(..., saved=[...]), or write them into the file with "
        "`optimstate name`."
        + (" If the live optimizer was built in the same way: resume(..., saved='live')." if built_alike else ""),
    )


def unreached_names(
    saved: Sequence[str] | Mapping[str, Sequence[str]] | None, asked: Collection[str]
) -> Iterator[Problem]:
    """Problems with names that are given for an optimizer that is not resumed.

    Args:
        saved: The argument of `resume`.
        asked: The paths of the optimizers that are resumed.
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
