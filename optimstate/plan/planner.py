"""From names and rules to a migration: what becomes of every parameter, with every problem found at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optimstate.errors import MigrationError
from optimstate.plan.rules import Plan, Rule
from optimstate.state.names import in_module_order

__all__ = ["Migration", "Move", "SectionMoves", "plan_migration"]


@dataclass(frozen=True)
class Move:
    """One parameter of the result.

    Attributes:
        target: Its name.
        source: Where its state comes from.
        rule: The rule that says so, or None where the name is kept because no rule matches it.
        clone: Whether another parameter takes the same source before it.
    """

    target: str
    source: str
    rule: Rule | None
    clone: bool = False


@dataclass(frozen=True)
class SectionMoves:
    """What becomes of the parameters of one section.

    Attributes:
        moves: In the order of the result.
        dropped: Sources that go nowhere, with the rule that drops them.
    """

    moves: tuple[Move, ...]
    dropped: tuple[tuple[str, Rule], ...]

    @property
    def changes(self) -> bool:
        """Whether anything is renamed, duplicated or dropped."""
        return bool(self.dropped) or any(move.target != move.source for move in self.moves)


@dataclass(frozen=True)
class Migration:
    """A plan resolved for one checkpoint.

    Attributes:
        sections: By the caller's key for each section.
        counts: For each rule, how many parameters of all sections it matched.
    """

    sections: Mapping[str, SectionMoves]
    counts: tuple[tuple[Rule, int], ...]


def plan_migration(plan: Plan, names: Mapping[str, Sequence[str]]) -> Migration:
    """Resolve a plan for the parameters of a checkpoint.

    Args:
        plan: The rules.
        names: For each section its parameters' names in order, without wrapper prefixes.

    Raises:
        MigrationError: A rule matches nothing, or two sources would have one name; every case is listed.
    """
    problems: list[str] = []
    counts = [0] * len(plan.rules)
    sections = {key: _plan_section(plan, key, list(found), counts, problems) for key, found in names.items()}
    for rule, count in zip(plan.rules, counts, strict=True):
        if not count:
            problems.append(_unmatched(rule, names))
    if problems:
        raise MigrationError(problems)
    return Migration(sections, tuple(zip(plan.rules, counts, strict=True)))


def _plan_section(plan: Plan, key: str, names: list[str], counts: list[int], problems: list[str]) -> SectionMoves:
    moves: list[Move] = []
    dropped: list[tuple[str, Rule]] = []
    run: list[Move] = []  # neighbours that become several each: their results are put in module order

    def end_run() -> None:
        moves.extend(run[index] for index in in_module_order([move.target for move in run]))
        run.clear()

    for name in names:
        for index, rule in enumerate(plan.rules):
            targets = rule.match(name)
            if targets is None:
                continue
            counts[index] += 1
            if not targets:
                dropped.append((name, rule))
            if len(targets) != 1:
                run.extend(Move(target, name, rule) for target in targets)
            else:
                end_run()
                moves.append(Move(targets[0], name, rule))
            break
        else:
            end_run()
            moves.append(Move(name, name, None))
    end_run()
    return SectionMoves(tuple(_with_clones(key, moves, problems)), tuple(dropped))


def _with_clones(key: str, moves: Sequence[Move], problems: list[str]) -> list[Move]:
    producers: dict[str, Move] = {}
    used: set[str] = set()
    made: list[Move] = []
    for move in moves:
        other = producers.setdefault(move.target, move)
        if other is not move:
            problems.append(
                f"{key}: {_origin(other)} and {_origin(move)} would both become {move.target!r}; "
                "rename or drop one of them"
            )
        made.append(Move(move.target, move.source, move.rule, move.source in used))
        used.add(move.source)
    return made


def _origin(move: Move) -> str:
    return f"{move.source!r} (by {move.rule})" if move.rule else f"{move.source!r} (kept)"


def _unmatched(rule: Rule, names: Mapping[str, Sequence[str]]) -> str:
    known = list(dict.fromkeys(name for found in names.values() for name in found))
    if not known:
        return f"rule {rule}: the checkpoint names no parameters"
    import difflib

    close = difflib.get_close_matches(rule.source.text, known[:5000], n=3, cutoff=0.3) or known[:3]
    return (
        f"rule {rule}: {rule.source.text!r} matches none of {len(known)} names; there are {', '.join(map(repr, close))}"
    )
