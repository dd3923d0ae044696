"""A line search for the strong Wolfe conditions (Nocedal and Wright, "Numerical Optimization", algorithms 3.5 and
3.6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from optimstate.record import Record

__all__ = ["strong_wolfe"]

SUFFICIENT = 1e-4  # the least decrease of the loss, as a part of the decrease that the slope predicts
CURVATURE = 0.9  # the steepest final slope, as a part of the first one
SMALLEST_BRACKET = 1e-9


class Point(Record):
    """A point on the line: step length, loss, gradient, and slope along the line."""

    t: Any
    loss: float
    grad: Tensor
    slope: Tensor


def strong_wolfe(
    evaluate: Callable[[Any], tuple[float, Tensor]],
    t: Any,
    d: Tensor,
    loss: float,
    grad: Tensor,
    slope: Tensor,
    *,
    max_calls: int,
) -> tuple[float, Tensor, Any, int]:
    """Find a step length with sufficient decrease and a small slope.

    Args:
        evaluate: Returns the loss and the flat gradient at a step length.
        t: First step length to try.
        d: The direction, flat.
        loss: The loss at 0.
        grad: The gradient at 0.
        slope: The slope at 0, negative.
        max_calls: Most evaluations, beyond the first.

    Returns:
        Loss, gradient and step length of the best point, and the number of evaluations.
    """
    calls = 0

    def at(t: Any) -> Point:
        nonlocal calls
        calls += 1
        loss, grad = evaluate(t)
        return Point(t, loss, grad, grad.dot(d))

    start = Point(0, loss, grad, slope)
    bracket, done, rounds = bracketed(at, start, at(t), max_calls)
    if not done:
        bracket = zoomed(at, start, bracket, d.abs().max(), max_calls - rounds)
    best = bracket[0] if len(bracket) == 1 or bracket[0].loss <= bracket[1].loss else bracket[1]
    return best.loss, best.grad, best.t, calls


def insufficient(start: Point, point: Point) -> Any:
    """Whether the loss is above the line of sufficient decrease."""
    return point.loss > (start.loss + SUFFICIENT * point.t * start.slope)


def flat_enough(start: Point, point: Point) -> Any:
    """Whether the slope is small enough."""
    return abs(point.slope) <= -CURVATURE * start.slope


def bracketed(at: Callable[[Any], Point], start: Point, point: Point, max_rounds: int) -> tuple[list[Point], bool, int]:
    """Search outwards from the start.

    Returns:
        Two points with a good one between them, or one good point; whether it is the latter; the rounds used.
    """
    previous = start
    for rounds in range(max_rounds):
        if insufficient(start, point) or (rounds > 1 and point.loss >= previous.loss):
            return [previous, point], False, rounds
        if flat_enough(start, point):
            return [point], True, rounds
        if point.slope >= 0:
            return [previous, point], False, rounds
        bounds = (point.t + 0.01 * (point.t - previous.t), point.t * 10)
        previous, point = point, at(cubic_minimum(previous, point, bounds))
    return [start, point], False, max_rounds


def zoomed(
    at: Callable[[Any], Point], start: Point, bracket: list[Point], width: Tensor, max_rounds: int
) -> list[Point]:
    """Narrow a bracket until a point in it satisfies the conditions or the bracket is too small to matter."""
    stalled = False
    low = 0 if bracket[0].loss <= bracket[1].loss else 1
    for _ in range(max_rounds):
        if abs(bracket[1].t - bracket[0].t) * width < SMALLEST_BRACKET:
            break
        t, stalled = inside(cubic_minimum(bracket[0], bracket[1]), bracket, stalled)
        point = at(t)
        if insufficient(start, point) or point.loss >= bracket[low].loss:
            bracket[1 - low] = point
            low = 0 if bracket[0].loss <= bracket[1].loss else 1
            continue
        done = flat_enough(start, point)
        if not done and point.slope * (bracket[1 - low].t - bracket[low].t) >= 0:
            bracket[1 - low] = bracket[low]
        bracket[low] = point
        if done:
            return [point]
    return [bracket[low]]


def inside(t: Any, bracket: list[Point], stalled: bool) -> tuple[Any, bool]:
    """Keep a trial point a tenth of the bracket away from its ends, if it hits one or was close to one before."""
    least, most = min(point.t for point in bracket), max(point.t for point in bracket)
    margin = 0.1 * (most - least)
    if not min(most - t, t - least) < margin:
        return t, False
    if stalled or t >= most or t <= least:
        return (most - margin if abs(t - most) < abs(t - least) else least + margin), False
    return t, True


def cubic_minimum(one: Point, other: Point, bounds: tuple[Any, Any] | None = None) -> Any:
    """Where the cubic through two losses and slopes is least, within bounds (by default the two points)."""
    x1, f1, g1, x2, f2, g2 = one.t, one.loss, one.slope, other.t, other.loss, other.slope
    least, most = bounds or ((x1, x2) if x1 <= x2 else (x2, x1))
    d1 = g1 + g2 - 3 * (f1 - f2) / (x1 - x2)
    square = d1**2 - g1 * g2
    if not square >= 0:
        return (least + most) / 2.0
    d2 = square.sqrt()
    if x1 <= x2:
        t = x2 - (x2 - x1) * ((g2 + d2 - d1) / (g2 - g1 + 2 * d2))
    else:
        t = x1 - (x1 - x2) * ((g1 + d2 - d1) / (g1 - g2 + 2 * d2))
    return min(max(t, least), most)
