"""What a move leaves behind: rows of a source that no parameter of the result takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Leaf, Node
from optimstate.plan.slots.outcomes import Outcome
from optimstate.plan.solve.migration import Move

__all__ = ["with_losses"]

_Cut = ex.Narrow | ex.Take
_CUTS = (ex.Narrow, ex.Take)
_COUNTED = 1 << 20  # cells that are looked at one by one where several dimensions are cut


def with_losses(moves: Sequence[Move]) -> list[Move]:
    """The moves, with what they lose: a parameter or slot of which only part arrives is not exact."""
    expressions = [move.expression for move in moves if isinstance(move.expression, Node)]
    if not any(isinstance(step, _CUTS) for expression in expressions for step in ex.steps(expression)):
        return list(moves)
    losses = _losses([move.expression for move in moves if move.expression is not None])
    if not losses:
        return list(moves)
    return [_labelled(move, _of(move.expression, losses)) if move.expression is not None else move for move in moves]


def _key(expression: Expr) -> object:
    return expression.name if isinstance(expression, Leaf) else id(expression)


def _nodes(expressions: Iterable[Expr]) -> Iterable[Node]:
    seen: set[int] = set()
    stack = list(expressions)
    while stack:
        item = stack.pop()
        if isinstance(item, Node) and id(item) not in seen:
            seen.add(id(item))
            yield item
            stack.extend(item.inputs)


def _losses(expressions: Sequence[Expr]) -> dict[object, str]:
    """What is lost of each source or intermediate result that is not taken whole."""
    whole = {_key(expression) for expression in expressions}
    cuts: dict[object, tuple[tuple[int, ...], list[_Cut]]] = {}
    for node in _nodes(expressions):
        for item in node.inputs:
            if isinstance(node.step, _CUTS) and item.shape is not None:
                cuts.setdefault(_key(item), (item.shape, []))[1].append(node.step)
            else:
                whole.add(_key(item))
    found = {}
    for key, (shape, taken) in cuts.items():
        lost = None if key in whole else _lost(shape, taken)
        if lost:
            found[key] = lost
    return found


def _rows(cut: _Cut) -> Sequence[int]:
    if isinstance(cut, ex.Take):
        return cut.index
    return range(cut.start, cut.start + (cut.length - 1) * cut.step + 1, cut.step) if cut.length else range(0)


def _lost(shape: Sequence[int], taken: Sequence[_Cut]) -> str:
    dims = sorted({cut.dim for cut in taken})
    if len(dims) == 1:
        (dim,) = dims
        lost = shape[dim] - len({row for cut in taken for row in _rows(cut)})
        return f"{lost} of {shape[dim]} rows of dimension {dim} are lost" if lost else ""
    cells = prod(shape[dim] for dim in dims)
    if cells > _COUNTED:
        return "a part may be lost"
    left = set(product(*(range(shape[dim]) for dim in dims)))
    for cut in taken:
        rows, place = set(_rows(cut)), dims.index(cut.dim)
        left = {cell for cell in left if cell[place] not in rows}
    return f"{len(left)} of {cells} indices of the dimensions {', '.join(map(str, dims))} are lost" if left else ""


def _of(expression: Expr, losses: Mapping[object, str]) -> str:
    """What is lost of the sources of an expression."""
    keys = [_key(leaf) for leaf in ex.leaves(expression)] + [_key(node) for node in _nodes([expression])]
    return "; ".join(dict.fromkeys(losses[key] for key in keys if key in losses))


def _labelled(move: Move, lost: str) -> Move:
    if not lost:
        return move

    def labelled(outcome: Outcome) -> Outcome:
        if outcome.kind == "scalar" or outcome.level not in ("exact", "approximate"):
            return outcome
        return outcome._replace(level="approximate", reason="; ".join(filter(None, (outcome.reason, lost))))

    value = None if move.value is None else labelled(move.value)
    slots = {path: labelled(outcome) for path, outcome in move.slots.items()}
    return Move(move.target, move.expression, move.rules, value, slots, move.clone)
