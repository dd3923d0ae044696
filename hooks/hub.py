"""Weights in the layout they are published in, loaded into the model that trains."""

from __future__ import annotations

from typing import Any

from optimstate.derivation.transformers import derive_transformers
from optimstate.hooks.modules import ModelHook, ModelLoad
from optimstate.installed_torch import torch

__all__ = ["hub_layout"]


class _HubHook(ModelHook):
    """Applies the plan to weights in the hub's layout, and leaves those that are in the live layout as they are."""

    def __call__(self, module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not ModelLoad(module, state_dict, prefix).has_the_same_shapes:
            super().__call__(module, state_dict, prefix, *rest)

    def __repr__(self) -> str:
        return "hub_layout"


def hub_layout(model: torch.nn.Module) -> ModelHook:
    """Let a transformers model load weights in the layout that Trainer saves and the hub publishes.

    Since transformers 5 a mixture of experts is saved with one tensor for each expert and trained with fused ones;
    `Trainer(resume_from_checkpoint=...)` then loads the optimizer's state and leaves the experts' weights as they were
    initialised. With this hook the weights are moved as they are loaded, by the plan that is read off the installed
    library's own converters; no file is rewritten. Weights in the live layout load as ever. Call this before
    `trainer.train(resume_from_checkpoint=True)`.

    Args:
        model: Of transformers; the hook is registered on it.

    Returns:
        The hook, whose `report` says what the last load did.

    Raises:
        DerivationError: transformers is not installed or has no converters, or does something that no plan says.

    Example:
        `hooks.hub_layout(model)`
    """
    plan = derive_transformers(model, to="live").plan
    hook = _HubHook(plan.with_policy(missing="fresh"))  # Trainers save tied weights once
    model.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    return hook
