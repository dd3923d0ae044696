"""Models that are built on the meta device, for the names, shapes and order of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.state.naming import Candidate

__all__ = ["from_config", "imported", "parameters_of"]


def parameters_of(build: Callable[[], Any]) -> list[Candidate]:
    """The trainable parameters of the model that `build` returns, in the order of `named_parameters()`."""
    from optimstate.installed_torch import torch

    with torch.device("meta"):
        made = build()
    return [Candidate(key, tuple(p.shape)) for key, p in made.named_parameters() if p.requires_grad]


def imported(model: str) -> Any:
    """The result of a callable without arguments, given as `module:factory`; this runs the code of that module."""
    module, _, factory = model.partition(":")
    if not module or not factory:
        raise ValueError("expected module:factory")
    return getattr(import_module(module), factory)()


def from_config(path: Path) -> Any:
    """A transformers model built from its config alone: no weights, no code of the checkpoint, no network."""
    transformers = import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    classes = [getattr(transformers, found, None) for found in config.architectures or ()]
    if len(classes) == 1 and classes[0] is not None:
        return classes[0](config)
    raise ValueError(f"the config names no class of transformers: architectures = {describe(config.architectures)}")
