"""Names for an optimizer that has none: concluded from a model's names, order and shapes, never guessed.

A parameter's slots have its shape. Parameters of one shape that stand in one group can be told apart only by their
order, and only when the names come in the order of `named_parameters()` and are as many. Whatever is left open is
reported with what would settle it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from optimstate.record import Record
from optimstate.state.algorithms.registry import recognise
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.lazy import LazyTensor

__all__ = ["Candidate", "Evidence", "Naming", "name_parameters"]

Evidence = Literal["confirmed", "inferred", "unknown"]
Shape = tuple[int, ...]

# Buffers that batch normalisation keeps beside its weight and bias, in every state dict.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Candidate(Record):
    """A parameter that the model has.

    Attributes:
        name: As `named_parameters()` gives it.
        shape: Its shape, or None where only names are known.
    """

    name: str
    shape: Shape | None


class Naming(Record):
    """Names for the parameters of an optimizer.

    Attributes:
        names: For each parameter in group order its name, or None.
        evidence: How each name is known: `confirmed` was in the file, `inferred` is the only possibility.
        problems: Why names are missing, each with the parameters concerned; empty when all are named.
    """

    names: tuple[str | None, ...]
    evidence: tuple[Evidence, ...]
    problems: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every parameter has a name."""
        return not self.problems and all(name is not None for name in self.names)


def model_candidates(tensors: Mapping[str, Any]) -> list[Candidate]:
    """The parameters among a model's tensors: no batch-norm buffers, no integers, and tied ones once."""
    owners = {name.rpartition(".")[0] for name in tensors if name.endswith(".running_mean") or name == "running_mean"}
    seen: set[tuple[int, int]] = set()
    found = []
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(tensor, LazyTensor) or (leaf in _BUFFERS and owner in owners):
            continue
        if not tensor.dtype.startswith(("float", "bfloat", "complex")):
            continue
        view = (id(tensor.storage), tensor.offset)
        if tensor.nbytes and view in seen:
            continue
        seen.add(view)
        found.append(Candidate(name, tensor.shape))
    return found


def parameter_shapes(state: OptimizerState) -> list[Shape | None]:
    """For each parameter in group order the shape its slots show, or None where they show none."""
    slots = {slot for found in state.state.values() for slot in found}
    algorithm = recognise(slots, state.groups[0].options) if state.groups else None
    like = {slot for slot, kind in algorithm.slots.items() if kind.kind == "like_param"} if algorithm else None
    return [_shape(found or {}, like) for _, _, found in state.parameters()]


def _shape(slots: Mapping[str, Any], like: set[str] | None) -> Shape | None:
    tensors = {slot: value for slot, value in slots.items() if isinstance(value, LazyTensor)}
    if like is not None:
        shapes = {value.shape for slot, value in tensors.items() if slot in like}
    else:  # an unknown algorithm: only what several slots agree on
        counted: dict[Shape, int] = {}
        for slot, value in tensors.items():
            if slot != "step":
                counted[value.shape] = counted.get(value.shape, 0) + 1
        shapes = set(counted) if len(counted) == 1 else set()
    return shapes.pop() if len(shapes) == 1 else None


def name_parameters(state: OptimizerState, candidates: Sequence[Candidate], *, ordered: bool) -> Naming:
    """Name the parameters of an optimizer.

    Args:
        state: The optimizer; names it has already are kept.
        candidates: What the model has.
        ordered: Whether the candidates are in the order of `named_parameters()`. Safetensors files are not: they are
            sorted by name.
    """
    if state.is_named:
        names = tuple(name for _, name, _ in state.parameters())
        return Naming(names, _all("confirmed", names), ())
    shapes = parameter_shapes(state)
    if ordered and len(state.groups) == 1 and len(shapes) == len(candidates):
        return _by_position(shapes, candidates)
    group_of = [index for index, group in enumerate(state.groups) for _ in group.params]
    return _by_shape(shapes, group_of, candidates, ordered=ordered)


def _all(evidence: Evidence, items: Sequence[Any]) -> tuple[Evidence, ...]:
    return tuple(evidence for _ in items)


def _by_position(shapes: Sequence[Shape | None], candidates: Sequence[Candidate]) -> Naming:
    """One group with as many parameters as the model has: they are in the model's order, or something is wrong."""
    problems = [
        f"parameter {index} has shape {list(shape)}, but {candidate.name!r} has {list(candidate.shape)}"
        for index, (shape, candidate) in enumerate(zip(shapes, candidates, strict=True))
        if shape is not None and candidate.shape is not None and shape != candidate.shape
    ]
    if problems:
        return Naming((None,) * len(shapes), _all("unknown", shapes), tuple(problems))
    return Naming(tuple(candidate.name for candidate in candidates), _all("inferred", shapes), ())


def _by_shape(
    shapes: Sequence[Shape | None], group_of: Sequence[int], candidates: Sequence[Candidate], *, ordered: bool
) -> Naming:
    by_shape: dict[Shape | None, list[str]] = {}
    for candidate in candidates:
        by_shape.setdefault(candidate.shape, []).append(candidate.name)
    members: dict[Shape | None, list[int]] = {}
    for index, shape in enumerate(shapes):
        members.setdefault(shape, []).append(index)
    names: list[str | None] = [None] * len(shapes)
    problems: list[str] = []
    for shape, indices in members.items():
        possible = by_shape.get(shape, [])
        problem = _obstacle(shape, indices, possible, {group_of[index] for index in indices}, ordered=ordered)
        if problem:
            problems.append(problem)
            continue
        for index, name in zip(indices, possible, strict=True):
            names[index] = name
    evidence: list[Evidence] = ["unknown" if name is None else "inferred" for name in names]
    return Naming(tuple(names), tuple(evidence), tuple(problems))


def _obstacle(
    shape: Shape | None, indices: Sequence[int], possible: Sequence[str], groups: set[int], *, ordered: bool
) -> str | None:
    """Why the parameters of one shape cannot be named, or None."""
    shown = f"{_listed(indices)} of shape {list(shape)}" if shape is not None else _listed(indices)
    if shape is None:
        return f"{shown}: no state shows their shape"
    if not possible:
        return f"{shown}: the model has no parameter of that shape"
    if len(indices) > len(possible):
        return f"{shown}: the model has only {len(possible)} ({_some(possible)})"
    if len(indices) < len(possible):
        return f"{shown}: the model has {len(possible)} ({_some(possible)}), and not all are in the optimizer"
    if len(possible) > 1 and not ordered:
        return f"{shown}: {_some(possible)} have it, and this container does not keep the model's order"
    if len(possible) > 1 and len(groups) > 1:
        return f"{shown}: {_some(possible)} have it, spread over groups {', '.join(map(str, sorted(groups)))}"
    return None


def _listed(indices: Sequence[int]) -> str:
    head = ", ".join(map(str, indices[:4])) + (f" and {len(indices) - 4} more" if len(indices) > 4 else "")
    return f"parameter{'s' if len(indices) > 1 else ''} {head}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
