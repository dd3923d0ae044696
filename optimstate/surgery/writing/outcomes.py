"""What became of the parameters and slots of a migration, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optimstate.plan.apply.checkpoint import key_of
from optimstate.plan.slots.outcomes import OUTCOMES, SlotPath
from optimstate.plan.solve.migration import Migration, Move, SectionMoves
from optimstate.record import Record
from optimstate.state.sections import find_sections

if TYPE_CHECKING:
    from optimstate.plan.apply.explain import Row

__all__ = ["Group", "Outcome", "outcomes", "regrouped"]


class Outcome(Record):
    """What became of one slot of some parameters.

    Attributes:
        slot: Its name; empty for the parameters' own values, and for a parameter that has no state.
        outcome: `exact`, `approximate`, `fresh` or `dropped`.
        reason: Why; empty where there is nothing to say.
        parameters: Of how many.
        example: One of them: of the result, or of the checkpoint where it is dropped.
    """

    slot: str
    outcome: str
    reason: str
    parameters: int
    example: str


class Group(Record):
    """What became of a param group.

    Attributes:
        group: Its number in the result.
        sources: The groups of the checkpoint that its parameters come from.
        parameters: How many it has.
        changed: The options that are others than before: key to old and new value; old ones of the first source.
    """

    group: int
    sources: tuple[int, ...]
    parameters: int
    changed: Mapping[str, tuple[Any, Any]]


def regrouped(migration: Migration, tree: Any) -> dict[str, tuple[Group, ...]]:
    """The param groups of each optimizer whose groups or options change."""
    if not any(section.regrouped for section in migration.sections.values()):
        return {}
    from optimstate.surgery.shown import plain

    made = {}
    for found in find_sections(tree):
        section = migration.sections.get(key_of(found))
        if section is None or not section.regrouped:
            continue
        old = found.optimizer().groups
        groups = []
        for number, group in enumerate(section.groups):
            had = {} if group.base is None else old[group.base].options
            pairs = {str(key): (plain(had.get(key)), plain(value)) for key, value in group.options.items()}
            changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
            groups.append(Group(number, tuple(group.sources), len(group.members), changed))
        made[key_of(found)] = tuple(groups)
    return made


def outcomes(migration: Migration) -> dict[str, tuple[Outcome, ...]]:
    """For each section, what became of each slot; exact ones first."""
    return {key: _outcomes(migration, key, section) for key, section in migration.sections.items()}


def _outcomes(migration: Migration, key: str, section: SectionMoves) -> tuple[Outcome, ...]:
    # Most moves only rename: a row for each of their slots would take as long as planning did.
    plain: dict[tuple[SlotPath, ...], list[Move]] = {}
    rest = []
    for move in section.moves:
        if section.conversion is None and _is_exact(move):
            plain.setdefault(tuple(move.slots), []).append(move)
        else:
            rest.append(move)
    counts: Counter[tuple[str, str, str]] = Counter()
    examples: dict[tuple[str, str, str], str] = {}
    for paths, moves in plain.items():
        for slot in [".".join(map(str, path)) for path in paths] or [""]:
            counts[slot, "exact", ""] += len(moves)
            examples.setdefault((slot, "exact", ""), moves[0].target)
    changed = section._replace(moves=tuple(rest))
    for row in _rows(migration, key, changed) if rest or section.dropped else ():
        found = (row.slot, row.outcome, row.reason)
        counts[found] += 1
        examples.setdefault(found, row.target or ", ".join(row.sources))
    ranked = sorted(counts, key=lambda found: OUTCOMES.index(found[1]))
    return tuple(Outcome(*found, counts[found], examples[found]) for found in ranked)


def _rows(migration: Migration, key: str, section: SectionMoves) -> Iterator[Row]:
    from optimstate.plan.apply.explain import explained

    return explained(migration._replace(sections={key: section}))


def _is_exact(move: Move) -> bool:
    """Whether it is moved whole, with nothing to remark."""
    if not move.is_moved_whole or move.clone or not (move.value or move.slots):
        return False
    outcomes = move.slots.values() if move.value is None else (move.value,)
    return all(outcome.level == "exact" and not outcome.reason and not outcome.inferred for outcome in outcomes)
