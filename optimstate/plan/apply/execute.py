"""Carry out a migration, in the same way for tensors in files (which are not read) and for tensors in memory.

The first use of a source moves it, later ones copy it, and what is computed is computed once; nothing else is copied.
The state that is read is never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimstate.errors import MigrationError
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.evaluate import LIVE, backend_of, copied, evaluated, identity
from optimstate.plan.expressions.tree import Expr, Leaf
from optimstate.plan.slots.outcomes import SlotPath, nested
from optimstate.plan.solve.migration import Move, SectionMoves
from optimstate.state.optimizer import Group, Member, OptimizerState, ParameterKey, Slots
from optimstate.tensors.lazy import LazyTensor

__all__ = ["execute_model", "execute_optimizer"]


def execute_optimizer(
    section: SectionMoves, state: OptimizerState, *, live: Mapping[str, Any] | None = None
) -> OptimizerState:
    """The state of the optimizer after a migration.

    Args:
        section: What becomes of its parameters.
        state: The state the migration was planned for; not changed.
        live: The parameters of the live optimizer by name, for `fill = "live"`.

    Returns:
        A state whose tensors are those of `state` where they are only moved.
    """
    if not section.changes:
        return state
    old = {str(name): (key, slots) for key, name, slots in state.parameters()}
    builder = _Builder({name: slots for name, (_, slots) in old.items()}, live)
    apart = [move for move in section.moves if section.requantized and not move.is_moved_whole]
    slots = _requantized(apart, old) if apart else {}
    slots |= {move.target: builder.slots(move) for move in section.moves if move.target not in slots}
    if section.flat is not None:
        slots = _with_flat(section, old, slots)
    keys = {move.target: _key(move, old) for move in section.moves}
    named = section.groups and any(group.names is not None for group in state.groups)
    groups = []
    for group in section.groups:
        like = state.groups[group.base] if group.base is not None else state.groups[0] if state.groups else None
        order = like.keys if like is not None else ("params",)
        if named and "param_names" not in order and not _keyed_by_name(state):
            order = (*order, "param_names")
        template = Group(group.options, (), (), order)
        groups.append((template, [Member(name, keys[name], slots[name]) for name in group.members]))
    made = state.rebuilt(groups)
    return made if section.conversion is None else section.conversion.apply(made)


def _requantized(
    moves: Sequence[Move], old: Mapping[str, tuple[ParameterKey, Slots | None]]
) -> dict[str, Slots | None]:
    """8-bit slots of parameters that are joined or cut: decoded, moved, and quantized again."""
    from optimstate.plan.slots import quantized

    builder = _Builder({name: quantized.plain(slots) if slots else slots for name, (_, slots) in old.items()})
    made = {move.target: builder.slots(move) for move in moves}
    return {name: quantized.recoded(slots) if slots else slots for name, slots in made.items()}


def _keyed_by_name(state: OptimizerState) -> bool:
    return all(isinstance(key, str) for group in state.groups for key in group.params)


def _key(move: Move, old: Mapping[str, tuple[ParameterKey, Slots | None]]) -> ParameterKey | None:
    sources = move.sources
    return old[sources[0]][0] if len(sources) == 1 and not move.clone else None


def _with_flat(
    section: SectionMoves,
    old: Mapping[str, tuple[ParameterKey, Slots | None]],
    slots: dict[str, Slots | None],
) -> dict[str, Slots | None]:
    """State that belongs to all parameters together; it is stored with the first of the new ones."""
    flat = section.flat
    assert flat is not None
    whole = old[flat.holder][1] or {}
    first = next(name for group in section.groups for name in group.members)
    made: dict[str, Slots | None] = dict.fromkeys(slots)
    made[first] = flat.rebuilt(whole) if flat.order else whole
    return made


def execute_model(
    section: SectionMoves, tensors: Mapping[str, Any], *, live: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The tensors of a model after a migration, in the order of the result; new parameters have none.

    Names that share memory go on sharing it where the same is done to both.

    Args:
        section: What becomes of its parameters.
        tensors: By name; not changed.
        live: The live model's tensors by name, for `fill = "live"`.
    """
    builder = _Builder(tensors, live)
    made = {}
    for move in section.moves:
        if move.expression is not None and move.value is not None:
            made[move.target] = builder.value(move.value.made or move.expression, target=move.target)
    return made


class _Builder:
    """Builds results one after another and remembers what has already been moved or computed."""

    def __init__(self, sources: Mapping[str, Any], live: Mapping[str, Any] | None = None) -> None:
        self._sources, self._live = sources, live or {}  # the former: slots, or, without paths, tensors
        self._whole: set[str] = set()  # the sources that were moved whole; of others, the slots that were
        self._moved: set[tuple[str, SlotPath]] = set()
        self._taken: set[int] = set()
        self._memo: dict[SlotPath, dict[int, Any]] = {}
        self._tied: dict[Any, tuple[Any, frozenset[str]]] = {}

    def slots(self, move: Move) -> Slots | None:
        """The slots of a parameter of the result; None for a fresh one."""
        if isinstance(move.expression, Leaf):
            slots = self._sources.get(move.expression.name)
            if slots is None:
                return None
            first = move.expression.name not in self._whole and not move.clone
            self._whole.add(move.expression.name)
            return slots if first else {key: copied(value) for key, value in slots.items()}
        made: dict[SlotPath, Any] = {}
        for path, outcome in move.slots.items():
            expression = outcome.made if outcome.made is not None else move.expression
            if expression is not None and outcome.level in ("exact", "approximate"):
                made[path] = self.value(expression, path, target=move.target)
        return nested(made) or None

    def value(self, expression: Expr, path: SlotPath = (), *, target: str = "") -> Any:
        """The value of a translated expression; leaves without a slot of their own mean the slot at `path`."""
        if not isinstance(expression, Leaf) and ex.takes_live(expression):
            return self._with_live(expression, path, self._live[target])
        if isinstance(expression, Leaf):
            return self._leaf(expression, expression.slot or path)
        names = frozenset(leaf.name for leaf in ex.leaves(expression))
        key = self._key(expression, path)
        tied = self._tied.get(key)
        if tied is not None and not tied[1] & names:  # the same made of other names for the same memory
            return tied[0]
        leaves = {}
        for leaf in ex.leaves(expression):
            value = self._raw(leaf, leaf.slot or path)
            leaves[id(leaf)] = value.detach() if backend_of(value) is LIVE else value
        found = evaluated(expression, leaves, self._memo.setdefault(path, {}))
        made = backend_of(found).own(found, self._taken)
        self._tied[key] = made, names | (tied[1] if tied else frozenset())
        return made

    def _with_live(self, expression: Expr, path: SlotPath, live: Any) -> Any:
        """A value, filled in from the live model where the expression asks for it."""
        from optimstate.installed_torch import torch

        leaves = {id(leaf): self._raw(leaf, leaf.slot or path).detach() for leaf in ex.leaves(expression)}
        found = evaluated(expression, leaves, {})
        ones = {key: torch.ones_like(value, dtype=torch.float32) for key, value in leaves.items()}
        kept = evaluated(ex.kept_places(expression), ones, {})
        if not ((kept == 0) | (kept == 1)).all():
            message = "a mean over elements that hold the live model's values (fill = \"live\") is neither side's"
            raise MigrationError.of("operation", message)
        return torch.where(kept.bool(), found, live.detach().to(found.device, found.dtype))

    def _leaf(self, leaf: Leaf, path: SlotPath) -> Any:
        value = self._raw(leaf, path)
        if leaf.name in self._whole or (path and (leaf.name, path) in self._moved):
            return copied(value)
        if path:
            self._moved.add((leaf.name, path))
        else:
            self._whole.add(leaf.name)
        return value

    def _raw(self, leaf: Leaf, path: SlotPath) -> Any:
        found: Any = self._sources[leaf.name]
        for key in path:
            found = found[key]
        return found

    def _key(self, expression: Expr, path: SlotPath) -> Any:
        """A key that is equal for expressions that do the same to the same memory."""
        if isinstance(expression, Leaf):
            value = self._raw(expression, expression.slot or path)
            return identity(value) if isinstance(value, LazyTensor) or hasattr(value, "shape") else id(value)
        step = expression.step
        if isinstance(step, ex.Pad):
            made: Any = ("pad", step.dim, step.count, step.fill.default)
        elif isinstance(step, ex.Full):
            made = ("full", step.fill.default)
        elif isinstance(step, ex.Cast):
            made = ("cast", step.dtypes[""])
        else:
            made = step
        return made, tuple(self._key(item, path) for item in expression.inputs)
