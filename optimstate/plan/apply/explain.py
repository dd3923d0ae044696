"""A migration as plain rows, for reports and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Leaf
from optimstate.plan.slots.outcomes import OUTCOMES
from optimstate.plan.solve.migration import Migration, Move, SectionMoves
from optimstate.record import Record

__all__ = ["Row", "described", "explained", "rows_of", "summary"]


class Row(Record):
    """What becomes of one parameter or slot.

    Attributes:
        section: Where it is.
        target: The parameter of the result; empty for what is dropped.
        slot: Empty for the parameter itself.
        sources: Where it comes from.
        how: What is done to them; empty where it is only moved.
        outcome: `exact`, `approximate`, `fresh` or `dropped`.
        reason: Why, where there is something to say.
        rule: The rule that says so; empty where none does.
    """

    section: str
    target: str
    slot: str
    sources: tuple[str, ...]
    how: str
    outcome: str
    reason: str
    rule: str


def explained(migration: Migration) -> Iterator[Row]:
    """Every parameter and slot of the result, and everything that is dropped."""
    for key, section in migration.sections.items():
        for move in section.moves:
            yield from rows_of(key, move, section)
        for name, rule in section.dropped:
            origin = str(rule) if rule is not None else 'the policy unexpected = "drop"'
            yield Row(key, "", "", (name,), "", "dropped", "", origin)


def rows_of(key: str, move: Move, section: SectionMoves) -> Iterator[Row]:
    """What becomes of one parameter of the section `key`: of its value, or of each of its slots."""
    rule = "; ".join(map(str, move.rules))
    how = "" if move.expression is None or isinstance(move.expression, Leaf) else described(move.expression)
    copied = "a copy" if move.clone else ""
    if move.value is not None:
        reason = move.value.reason or copied
        yield Row(key, move.target, "", move.sources, how, move.value.level, reason, rule)
    elif not move.slots and not (section.flat and move.expression is not None):
        reason = "new" if move.expression is None else "it has no state in the checkpoint"
        yield Row(key, move.target, "", move.sources, how, "fresh", reason, rule)
    conversion = section.conversion if move.slots else None
    changed = f"{conversion.source} to {conversion.target}" if conversion else ""
    known = set()
    shape = None if move.expression is None else move.expression.shape
    for path, outcome in move.slots.items():
        slot = ".".join(map(str, path))
        known.add(slot)
        line = conversion.line(slot, shape) if conversion else None
        inferred = f"taken for {outcome.kind} by its shape" if outcome.inferred else ""
        reason = "; ".join(filter(None, (outcome.reason, inferred, copied, line.reason if line else "")))
        level = max(outcome.level, line.outcome if line else "exact", key=OUTCOMES.index)
        done = "; ".join(filter(None, (how, changed)))
        yield Row(key, move.target, slot, move.sources, done, level, reason, rule)
    for new in conversion.new_slots(shape) if conversion else ():
        if new.slot not in known:
            yield Row(key, move.target, new.slot, (), changed, new.outcome, new.reason, rule)


def summary(migration: Migration) -> dict[str, dict[str, int]]:
    """For each section, how many parameters and slots are exact, approximate, fresh and dropped."""
    made: dict[str, Counter[str]] = {key: Counter() for key in migration.sections}
    for row in explained(migration):
        made[row.section][row.outcome] += 1
    return {key: dict(counts) for key, counts in made.items()}


def described(expression: Expr) -> str:
    """An expression in few words: `concat(q.weight, k.weight; 0)`."""
    if isinstance(expression, Leaf):
        return expression.name
    inner = ", ".join(map(described, expression.inputs))
    match expression.step:
        case ex.Cat(dim):
            return f"concat({inner}; {dim})"
        case ex.Narrow(dim, start, length, 1):
            return f"{inner}[{start}:{start + length} of {dim}]"
        case ex.Narrow(dim, start, length, step):
            return f"{inner}[{start}:{start + length * step}:{step} of {dim}]"
        case ex.Take(dim, index):
            return f"take({inner}; {len(index)} rows of {dim})"
        case ex.Mean(_, weights) if weights:
            return f"average({inner}; {', '.join(f'{weight:g}' for weight in weights)})"
        case ex.Shift(param):
            return f"shift({inner}; {param:g})"
        case ex.Permute(dims):
            return f"permute({inner}; {list(dims)})"
        case ex.Reshape(shape):
            return f"reshape({inner}; {list(shape)})"
        case ex.Pad(dim, count, _):
            return f"grow({inner}; {count} of {dim})"
        case ex.Tile(dim, times, each):
            return f"repeat({inner}; {times} times {'each of ' if each else ''}{dim})"
        case ex.Scale(param, grad):
            return f"scale({inner}; param {param:g}, grad {grad:g})"
        case ex.Cast(dtypes):
            return f"cast({inner}; {', '.join(f'{k} {v}' for k, v in dtypes.items())})"
        case step:
            return f"{type(step).__name__.lower()}({inner})"
