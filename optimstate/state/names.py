"""Parameter names: wrapper prefixes, and the order in which modules list their parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from optimstate.errors import StateMismatchError

if TYPE_CHECKING:
    import torch

__all__ = [
    "WRAPPERS",
    "in_module_order",
    "mentions_wrapper",
    "names_in",
    "renamed_modules",
    "unwrapped",
    "wrapper_prefix",
]

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
"""The prefixes that DataParallel, torch.compile, FSDP, activation checkpointing and DeepSpeed add to names."""

_PARALLEL = "module."
# Submodules can be wrapped too, so these occur anywhere in a name. Modules of models do not have such names.
_ANYWHERE = frozenset(wrapper.rstrip(".") for wrapper in WRAPPERS if wrapper != _PARALLEL)


def unwrapped(names: Iterable[str]) -> Callable[[str], str]:
    """A function that removes what wrappers add to parameter names, in any nesting and at any depth.

    `layers.0._checkpoint_wrapped_module.weight` becomes `layers.0.weight`. A submodule may be called `module` too, so
    `module.` is removed only at the beginning, and only if all names begin with it. The name of a single PEFT adapter
    is removed too: `q.lora_A.default.weight` becomes `q.lora_A.weight`, as in PEFT's own files.

    Args:
        names: All names of the model, or of the optimizer.

    Returns:
        A function that takes one of these names and returns it without the additions.
    """
    plain = [_without_markers(name) for name in names]
    prefix = ""
    while plain and all(name.startswith(_PARALLEL, len(prefix)) for name in plain):
        prefix += _PARALLEL
    adapter = _adapter(plain)
    if adapter:
        return lambda name: _without_adapter(_without_markers(name), adapter).removeprefix(prefix)
    return lambda name: _without_markers(name).removeprefix(prefix)


# PEFT has each tensor of an adapter in a dict keyed by the adapter's name, which it leaves out of its files.
_ADAPTED = (
    r"(?:^|\.)(?:(modules_to_save)|((?:lora|vera|dora|hada|lokr|oft|boft|ia3|fourier|vblora|trainable_tokens)_\w+))"
    r"\.([^.]+)(?=\.|$)"
)


def _adapter(names: Iterable[str]) -> str:
    """The name of the adapter whose tensors these are; empty if there is none, or there are several."""
    found = {match[3] for name in names if (match := re.search(_ADAPTED, name)) is not None}
    return next(iter(found)) if len(found) == 1 and not found & {"weight", "bias"} else ""


def _without_adapter(name: str, adapter: str) -> str:
    """A parameter's name as PEFT saves it."""

    def saved(match: re.Match[str]) -> str:
        if match[3] != adapter:
            return match[0]
        return "" if match[1] else match[0].removesuffix(f".{adapter}")

    return re.sub(_ADAPTED, saved, name, count=1).removeprefix(".")


def _without_markers(name: str) -> str:
    parts = name.split(".")
    return name if _ANYWHERE.isdisjoint(parts) else ".".join(part for part in parts if part not in _ANYWHERE)


def mentions_wrapper(text: str) -> bool:
    """Whether a name or template contains a part that wrappers add."""
    return text.startswith(_PARALLEL) or not _ANYWHERE.isdisjoint(text.split("."))


def wrapper_prefix(names: Iterable[str]) -> str:
    """The wrapper prefixes, possibly several, that every name begins with."""
    names = list(names)
    prefix = ""
    while names:
        for wrapper in WRAPPERS:
            if all(name.startswith(prefix + wrapper) and len(name) > len(prefix + wrapper) for name in names):
                prefix += wrapper
                break
        else:
            break
    return prefix


def in_module_order(names: Sequence[str]) -> list[int]:
    """Indices that put names in the order of a walk over the module tree they spell.

    Modules and leaves keep the order of their first appearance: `a.w, b.w, a.b, b.b` becomes `a.w, a.b, b.w, b.b`.
    """
    root: dict[str, Any] = {}
    for index, name in enumerate(names):
        node = root
        *modules, leaf = name.split(".")
        for module in modules:
            node = node.setdefault(module + ".", {})
        node.setdefault(leaf, []).append(index)
    order: list[int] = []
    stack = [iter(root.values())]
    while stack:
        for entry in stack[-1]:
            if isinstance(entry, dict):
                stack.append(iter(entry.values()))
                break
            order.extend(entry)
        else:
            stack.pop()
    return order


def renamed_modules(moves: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Old and new names of modules, derived from the names of their parameters.

    `blocks.0.attn.q.weight -> layers.0.attn.q.weight` shows that blocks.0.attn.q, blocks.0.attn, blocks.0 and blocks
    became layers.0.attn.q, layers.0.attn, layers.0 and layers; `fc.weight -> net.fc.weight` shows that fc became net.fc
    and the root, whose name is empty, became net.
    """
    found: dict[str, dict[str, None]] = {}
    for old, new in moves:
        old_parts, new_parts = old.split("."), new.split(".")
        while old_parts and new_parts and old_parts[-1] == new_parts[-1]:
            old_parts.pop()
            new_parts.pop()
            found.setdefault(".".join(old_parts), {})[".".join(new_parts)] = None
    return {old: list(new) for old, new in found.items()}


def names_in(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, rename: Callable[[str], str] = str
) -> list[list[str]]:
    """The names of an optimizer's parameters in a model, group by group; for a tied parameter, its first name.

    Args:
        optimizer: The optimizer; only its groups are used.
        model: The model that it was built from.
        rename: Applied to each name.

    Raises:
        StateMismatchError: A parameter is not in the model.
    """
    found = {id(parameter): rename(name) for name, parameter in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in found:
                raise StateMismatchError(
                    f"parameter {index} of param group {number}, of shape {list(parameter.shape)}, "
                    f"is not one of the model's ({type(model).__name__})",
                    hint="Give the model that the optimizer was built from. Build the optimizer after the model was "
                    "sharded or moved, which may create new parameters.",
                )
    return [[found[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
