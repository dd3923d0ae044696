"""What the planner needs to know of a model or an optimizer, collected in one pass over its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimstate.errors import MigrationError
from optimstate.plan.expressions.evaluate import shape_of
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.slots.outcomes import Parameter, SlotPath, flattened, nested
from optimstate.plan.solve.migration import Inventory, Target
from optimstate.state.algorithms.registry import parameter_shape, recognise_state
from optimstate.state.optimizer import OptimizerState

__all__ = ["decoded", "model_inventory", "optimizer_inventory"]


def model_inventory(tensors: Mapping[str, Any], *, target: Target | None = None) -> Inventory:
    """What the planner needs to know of a model."""
    return Inventory({name: shape_of(value) for name, value in tensors.items()}, tensors, target=target)


def optimizer_inventory(
    state: OptimizerState,
    *,
    target: Target | None = None,
    shapes: Mapping[str, Shape | None] | None = None,
) -> Inventory:
    """What the planner needs to know of an optimizer.

    Raises:
        MigrationError: A parameter has no name.
    """
    if not state.is_named and any(group.params for group in state.groups):
        raise MigrationError.of(
            "name",
            "the optimizer's parameters have no names, so nothing can be moved by name",
            hint="Give them in order: state.named([...]), or save from an optimizer built on named_parameters().",
        )
    used: dict[str, None] = {}
    for slots in state.state.values():
        used.update(dict.fromkeys(slots))
    algorithm = recognise_state(state.state.values(), state.groups[0].options) if state.groups else None
    kinds = {slot: algorithm.slot(slot) for slot in used} if algorithm is not None else {}
    telling = [(slot,) for slot, kind in kinds.items() if kind is not None and kind.is_elementwise]
    parameters: dict[str, Parameter] = {}
    paths: dict[tuple[Any, ...], list[SlotPath]] = {}
    for _, name, found in state.parameters():
        flat = _flat(found, paths) if found else {}
        shape = shapes.get(str(name)) if shapes is not None else None
        if shape is None and flat:
            for path in telling:
                if path in flat:
                    shape = shape_of(flat[path])
                    break
            if shape is None:
                shape = parameter_shape({str(path[-1]): shape_of(value) for path, value in flat.items()}, algorithm)
        parameters[str(name)] = Parameter(shape, flat)
    return Inventory(
        {name: parameter.shape for name, parameter in parameters.items()},
        state=state,
        target=target,
        parameters=parameters,
        algorithm=algorithm,
    )


def _flat(slots: Mapping[Any, Any], paths: dict[tuple[Any, ...], list[SlotPath]]) -> dict[SlotPath, Any]:
    """As `flattened`, with the same paths for all parameters that have the same slots."""
    if dict in map(type, slots.values()):
        return flattened(slots)
    key = tuple(slots)
    if key not in paths:
        paths[key] = [(slot,) for slot in key]
    return dict(zip(paths[key], slots.values(), strict=True))


def decoded(inventory: Inventory) -> Inventory:
    """The inventory, with its 8-bit slots described as what they decode to, for rules that cut or join."""
    if inventory.algorithm is None or inventory.algorithm.name != "bitsandbytes":
        return inventory
    from optimstate.plan.slots import quantized

    parameters = {
        name: Parameter(found.shape, {(slot,): value for slot, value in quantized.plain(nested(found.slots)).items()})
        for name, found in inventory.parameters.items()
    }
    return inventory._replace(parameters=parameters)
