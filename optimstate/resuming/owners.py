"""The model that a live optimizer was built from, and its similarity to parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optimstate.state.names import names_in, unwrapped
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section

if TYPE_CHECKING:
    import torch

    from optimstate.hooks.engine.live import Live

__all__ = ["becomes", "live_names", "live_of", "common_names", "common_tensors", "keeps_names", "owner_of", "shares"]


def keeps_names(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the groups of an optimizer have their parameters' names."""
    return all("param_names" in group for group in optimizer.param_groups)


def shares(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> bool:
    """Whether an optimizer has parameters of a model, or no parameters at all."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return not own or any(id(parameter) in own for parameter in model.parameters())


def owner_of(optimizer: torch.optim.Optimizer, models: Sequence[torch.nn.Module]) -> torch.nn.Module | None:
    """The model, or the models as one, with all parameters of an optimizer; the last model if there is none.

    The last is returned so that an error message can name it.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in models:
        if own <= {id(parameter) for parameter in model.parameters()}:
            return model
    if len(models) > 1 and own <= {id(parameter) for model in models for parameter in model.parameters()}:
        return _together([model for model in models if shares(optimizer, model)])
    return models[-1] if models else None


def _together(models: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """Several models as one; names get the model's number as a prefix if two models have the same name."""
    from optimstate.installed_torch import torch

    class Models(torch.nn.Module):
        def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
            found = [list(model.named_parameters(*args, **options)) for model in models]
            names = [name for own in found for name, _ in own]
            apart = len(set(names)) == len(names)
            for number, own in enumerate(found):
                yield from ((name if apart else f"{number}.{name}", parameter) for name, parameter in own)

    return Models()


def live_of(optimizer: torch.optim.Optimizer, models: Sequence[torch.nn.Module], *, is_named: bool) -> Live:
    """A live optimizer with the names of its parameters, or with their numbers if neither side has names.

    Args:
        optimizer: The optimizer.
        models: The live models.
        is_named: Whether the checkpoint's parameters have names.

    Raises:
        StateMismatchError: The optimizer is not of these models, or its parameters have no names.
    """
    from optimstate.hooks.engine.live import Live

    if keeps_names(optimizer):
        if models and not any(shares(optimizer, model) for model in models):
            names_in(optimizer, models[-1])  # raises, because it was built from another model
        return Live.of(optimizer)
    return Live.of(optimizer, owner_of(optimizer, models)) if models or is_named else Live.by_position(optimizer)


def live_names(optimizer: torch.optim.Optimizer, models: Sequence[torch.nn.Module]) -> list[str]:
    """The names of a live optimizer's parameters without wrapper prefixes; empty if they have no names."""
    if not keeps_names(optimizer) and not models:
        return []
    from optimstate.hooks.engine.live import Live

    live = Live.of(optimizer, None if keeps_names(optimizer) else owner_of(optimizer, models))
    own = [name for group in live.names for name in group]
    rename = unwrapped(own)
    return [rename(name) for name in own]


def becomes(state: OptimizerState, live: str) -> str:
    """The algorithm to which a state must be converted for a live optimizer; empty if it is the same."""
    from optimstate.plan.slots.converted_options import option_names
    from optimstate.state.algorithms.registry import recognise_state

    saved = recognise_state(state.state.values(), state.groups[0].options) if state.groups else None
    other = saved is not None and saved.name != live and bool(option_names(live))
    return live if other else ""


def common_tensors(section: Section, module: torch.nn.Module) -> int:
    """The number of tensors that a section and a module have in common, by name and shape."""
    live = {name: tuple(value.shape) for name, value in module.state_dict().items() if hasattr(value, "shape")}
    tensors = section.tensors()
    plain, plain_live = unwrapped(tensors), unwrapped(live)
    known = {plain_live(name): shape for name, shape in live.items()}
    return sum(known.get(plain(name)) == getattr(tensor, "shape", ()) for name, tensor in tensors.items())


def common_names(section: Section, optimizer: torch.optim.Optimizer, models: Sequence[torch.nn.Module]) -> int:
    """The number of parameter names that a section and an optimizer have in common."""
    state, owner = section.optimizer(), owner_of(optimizer, models)
    if not state.is_named:
        return 0
    if keeps_names(optimizer):
        own = [name for group in optimizer.param_groups for name in group["param_names"]]
    elif owner is not None:
        own = [name for group in names_in(optimizer, owner) for name in group]
    else:
        return 0
    saved = [str(name) for _, name, _ in state.parameters()]
    return len(set(map(unwrapped(own), own)) & set(map(unwrapped(saved), saved)))
