"""Names for an optimizer that has none: inferred from evidence, never guessed.

A parameter's state shows its shape: by slots of its shape, means over rows and columns, or the sides of
preconditioners. Its group and its index there are further evidence if every group lists its parameters in the model's
order, as groups made from `named_parameters()` do; if the shapes show that one group does not, the order of none is
used. `matching` proves that only one assignment of names fits. Otherwise the report lists the alternatives and what
would decide between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from optimstate.describe import describe, few
from optimstate.record import Record
from optimstate.state.algorithms.registry import parameter_shape, recognise_state
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.matching import Matching, match
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.dtypes import INEXACT
from optimstate.tensors.lazy import LazyTensor

__all__ = [
    "Candidate",
    "Evidence",
    "Naming",
    "model_candidates",
    "name_in_order",
    "name_parameters",
    "observed_shapes",
]

Evidence = Literal["confirmed", "given", "group", "inferred", "unknown"]
Shape = tuple[int, ...]

# Buffers of batch normalisation, which every state dict has beside its weight and bias.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Candidate(Record):
    """A parameter that the model has.

    Attributes:
        name: Its name in `named_parameters()`.
        shape: Its shape, or None if only the name is known.
    """

    name: str
    shape: Shape | None


class Naming(Record):
    """Names for the parameters of an optimizer.

    Attributes:
        names: For each parameter, in group order, its name or None.
        evidence: Why each name is known: `confirmed` was in the file, `given` by the user, `group` is the name of the
            group, `inferred` is the only possibility.
        problems: Why names are missing, with the parameters concerned; empty if all parameters have names.
        unused: How many parameters of the model the optimizer does not have.
    """

    names: tuple[str | None, ...]
    evidence: tuple[Evidence, ...]
    problems: tuple[str, ...]
    unused: int = 0

    @classmethod
    def unknown(cls, count: int, *problems: str) -> Naming:
        """No names for this many parameters."""
        return cls((None,) * count, tuple("unknown" for _ in range(count)), problems)

    @property
    def complete(self) -> bool:
        """Whether every parameter has a name."""
        return not self.problems and all(name is not None for name in self.names)


def model_candidates(tensors: Mapping[str, Any]) -> list[Candidate]:
    """The parameters among a model's tensors: without batch-norm buffers and integer tensors; tied ones once."""
    owners = {name.rpartition(".")[0] for name in tensors if name.endswith(".running_mean") or name == "running_mean"}
    seen: set[tuple[int, int]] = set()
    found = []
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(tensor, LazyTensor) or (leaf in _BUFFERS and owner in owners):
            continue
        if not tensor.dtype.startswith(INEXACT):
            continue
        view = (id(tensor.storage), tensor.offset)
        if tensor.nbytes and view in seen:
            continue
        seen.add(view)
        found.append(Candidate(name, tensor.shape))
    return found


# --- what the optimizer's state shows ---------------------------------------------------------------------------------


def observed_shapes(state: OptimizerState) -> list[list[Shape | None]]:
    """The shapes of an optimizer's parameters as their slots show them, group by group; None if they do not."""
    algorithm = recognise_state(state.state.values(), state.groups[0].options) if state.groups else None
    return [[_shape(state.state.get(key) or {}, algorithm) for key in group.params] for group in state.groups]


def _shape(slots: Mapping[Any, Any], algorithm: Algorithm | None) -> Shape | None:
    flat = _flat(slots)
    shapes = {name: value.shape for name, value in flat.items() if isinstance(value, LazyTensor)}
    found = parameter_shape(shapes, algorithm)
    return found if found is not None else _of_preconditioners(slots)


def _flat(slots: Mapping[Any, Any]) -> dict[str, Any]:
    """Slots by name, including those that bitsandbytes keeps one level down."""
    made: dict[str, Any] = {}
    for name, value in slots.items():
        if isinstance(value, Mapping):
            made.update((str(inner), found) for inner, found in value.items())
        else:
            made[str(name)] = value
    return made


_PRECONDITIONER = re.compile(r"^(?:precond_(\d+)|pre_conds|GG)$")


def _of_preconditioners(slots: Mapping[Any, Any]) -> Shape | None:
    """The shape shown by one square matrix for each dimension, as Shampoo and similar optimizers keep them."""
    sides: dict[int, int] = {}
    for name, value in slots.items():
        found = _PRECONDITIONER.match(str(name))
        if found is None:
            continue
        matrices = [value] if found[1] is not None else value if isinstance(value, list | tuple) else []
        for number, matrix in enumerate(matrices, int(found[1] or 0)):
            if not isinstance(matrix, LazyTensor) or len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
                return None
            sides[number] = matrix.shape[0]
    complete = bool(sides) and sides.keys() == set(range(len(sides)))
    return tuple(sides[number] for number in range(len(sides))) if complete else None


# --- names ------------------------------------------------------------------------------------------------------------


def name_in_order(state: OptimizerState, names: Sequence[str], shapes: Mapping[str, Shape | None]) -> Naming:
    """Check names that are given in the optimizer's own order, group by group.

    Args:
        state: The optimizer.
        names: One for each parameter.
        shapes: The shapes of the model's parameters, as far as they are known.
    """
    observed = [shape for group in observed_shapes(state) for shape in group]
    if len(names) != len(observed):
        return Naming.unknown(len(observed), f"{len(names)} names are given for {len(observed)} parameters")
    problems = [
        f"parameter {index} has shape {list(shape)}, but {describe(name)} has {list(known)}"
        for index, (shape, name) in enumerate(zip(observed, names, strict=True))
        if shape is not None and (known := shapes.get(name)) is not None and known != shape
    ]
    if problems:
        return Naming.unknown(len(observed), *problems)
    return Naming(tuple(names), tuple("given" for _ in names), ())


def name_parameters(
    state: OptimizerState,
    candidates: Sequence[Candidate],
    *,
    ordered: bool,
    given: bool = False,
    excluded: Mapping[int, frozenset[int]] | None = None,
) -> Naming:
    """Name the parameters of an optimizer from a model's.

    Args:
        state: The optimizer; existing names are kept.
        candidates: The model's parameters; empty if there is no model.
        ordered: Whether the candidates are in the order of `named_parameters()`. Those of safetensors files are not,
            because they are sorted by name.
        given: Whether the names were given for this optimizer, not read from a model.
        excluded: For the number of a group, the candidates that it cannot have (see `grouping`).
    """
    if state.is_named:
        names = tuple(name for _, name, _ in state.parameters())
        return Naming(names, tuple("confirmed" for _ in names), ())
    groups = observed_shapes(state)
    observed = [shape for group in groups for shape in group]
    known = {candidate.name: candidate.shape for candidate in candidates}
    own = _group_names(state)
    if own is not None and (not candidates or _are_the_models(own, observed, known)):
        return Naming(tuple(own), tuple("group" for _ in own), (), max(0, len(candidates) - len(own)))
    if not candidates:
        problem = "the checkpoint has no model from which names could be taken"
        return Naming.unknown(len(observed), problem)
    if len(observed) > len(candidates):
        source = "given names" if given else "parameters of the model"
        problem = f"it has {len(observed)} parameters, and there are only {len(candidates)} {source}"
        return Naming.unknown(len(observed), problem)
    model = [candidate.shape for candidate in candidates]
    found = match(groups, model, in_order=ordered, excluded=excluded)
    keeps_order = ordered and found.fits
    if ordered and not found.fits:
        found = match(groups, model, in_order=False, excluded=excluded)
    if not found.unique:
        obstacles = _obstacles(groups, candidates, found, ordered=ordered, keeps_order=keeps_order)
        return Naming.unknown(len(observed), *obstacles)
    evidence: Evidence = "given" if given else "inferred"
    named = tuple(candidates[indices[0]].name for indices in found.domains)
    return Naming(named, tuple(evidence for _ in named), (), len(candidates) - len(named))


def _are_the_models(names: Sequence[str], observed: Sequence[Shape | None], known: Mapping[str, Shape | None]) -> bool:
    """Whether the model has parameters with these names and the observed shapes."""
    pairs = [(known[name], shape) for name, shape in zip(names, observed, strict=True) if name in known]
    return len(pairs) == len(names) and all(a is None or b is None or a == b for a, b in pairs)


def _group_names(state: OptimizerState) -> list[str] | None:
    """The names of groups that have one parameter and a unique name each, as Gaussian splatting has them; else None."""
    groups = [group for group in state.groups if group.params]
    names = [group.options.get("name") for group in groups]
    if any(len(group.params) != 1 for group in groups):
        return None
    found = [name for name in names if isinstance(name, str) and name]
    return found if found and len(set(found)) == len(groups) else None


# --- what is left open ------------------------------------------------------------------------------------------------


def _obstacles(
    groups: Sequence[Sequence[Shape | None]],
    candidates: Sequence[Candidate],
    found: Matching,
    *,
    ordered: bool,
    keeps_order: bool,
) -> list[str]:
    """Why names are not determined: the alternatives for the parameters of each shape, with the reason."""
    observed = [shape for group in groups for shape in group]
    group_of = [number for number, group in enumerate(groups) for _ in group]
    by_shape: dict[Shape | None, list[int]] = {}
    for index, shape in enumerate(observed):
        by_shape.setdefault(shape, []).append(index)
    problems = []
    for shape, indices in by_shape.items():
        possible = [c.name for c in candidates if shape is None or c.shape is None or c.shape == shape]
        shown = f"{_listed(indices)} of shape {list(shape)}" if shape is not None else _listed(indices)
        if not possible:
            problems.append(f"{shown}: the model has no parameter of that shape")
        elif len(possible) < len(indices):
            problems.append(f"{shown}: the model has only {len(possible)} ({few(possible)})")
        elif any(len(found.domains[index]) != 1 for index in indices) or not found.fits:
            if len(possible) == 1 == len(indices):
                continue
            numbers = sorted({group_of[index] for index in indices})
            reason = _reason(shape, len(indices), len(possible), numbers, ordered=ordered, keeps_order=keeps_order)
            problems.append(f"{shown} can be {few(possible)}: {reason}")
    return problems or ["no assignment of the model's parameters fits its param groups"]


def _reason(
    shape: Shape | None, count: int, possible: int, groups: Sequence[int], *, ordered: bool, keeps_order: bool
) -> str:
    if shape is None and count == possible == 1:
        return "no state shows its shape"
    if shape is None:
        return "no state shows their shape"
    if count < possible:
        return "not all are in the optimizer, and nothing says which"
    if not ordered:
        return "this container does not keep the model's order"
    if not keeps_order:
        return "the param groups do not list their parameters in the model's order"
    if len(groups) > 1:
        return f"nothing says which of them is in which of the groups {', '.join(map(str, groups))}"
    return "several assignments fit"


def _listed(indices: Sequence[int]) -> str:
    return f"parameter{'s' if len(indices) > 1 else ''} {few(list(map(str, indices)), 4)}"
