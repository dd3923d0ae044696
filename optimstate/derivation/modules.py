"""Derivation from a script that copies weights between two live modules, in place.

The script is run on copies of both modules whose parameters and buffers are tagged tensors; the tags in the new module
then show the origins of its elements. The new module's own values are tagged too, which shows what the script does not
change: a parameter, or rows of one, with such tags keep the live model's values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from optimstate.derivation.derived import Derived, source_of
from optimstate.derivation.moves import Derivation
from optimstate.derivation.origins import Combined, Moved, New, Origin, Probe, Source, Unexplained
from optimstate.derivation.probe import probe
from optimstate.describe import describe
from optimstate.errors import DerivationError

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["derive_copying"]

Script = Callable[[Any, Any], object]


def derive_copying(script: Script, old: torch.nn.Module, new: torch.nn.Module, *, allow_drop: bool = False) -> Derived:
    """The plan that is equivalent to a script that copies weights from one module into another.

    Args:
        script: Called with copies of both modules; if it returns a module, that is the new module.
        old: The module whose checkpoints the plan is for. It is not changed.
        new: The module that replaces it. It is not changed.
        allow_drop: Whether parameters of the old module may be in no output.

    Raises:
        DerivationError: The script computes weights, leaves out some of the old module without `allow_drop`, or does
            something that the plan language cannot express.
    """
    copying = _Copying(script, old, new)
    return Derivation(
        copying.with_own_values,
        copying.sources,
        allow_drop,
        probing=copying.probe,
        live=copying.values,
        shared=_ties(copying.olds),
    ).run()


class _Copying:
    """The script as a function from the old state dict to the new one."""

    def __init__(self, script: Script, old: torch.nn.Module, new: torch.nn.Module) -> None:
        from optimstate.installed_torch import dtype_of, torch

        self.script, self.old, self.new = script, old, new
        self.olds, self.news = _tensors(old), _tensors(new)
        self.sources = {name: source_of(tensor) for name, tensor in self.olds.items()}
        self.own = {_own(name): source_of(tensor) for name, tensor in self.news.items()}
        shared = self.own.keys() & self.sources.keys()
        if shared:
            raise DerivationError(f"the old module has a parameter with the name {describe(min(shared))}")
        generator = torch.Generator().manual_seed(7)
        self.values = {
            name: torch.randint(0, 2 if tensor.dtype == torch.bool else 127, tensor.shape, generator=generator).to(
                dtype_of(source_of(tensor).dtype)
            )
            for name, tensor in self.news.items()
        }
        for name, first in _ties(self.news).items():
            self.values[name] = self.values[first]

    def with_own_values(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The new module's state dict, if it had `values` before."""
        own = {_own(name): value.clone() for name, value in self.values.items()}
        return self._run({**state, **own})

    def _run(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        old = _holding(self.old, self.olds, state)
        new = _holding(self.new, self.news, {name: state[_own(name)] for name in self.news})
        made = self.script(old, new)
        found: Mapping[str, Any] = (made if hasattr(made, "state_dict") else new).state_dict()
        return found

    def probe(self, _: object, sources: Mapping[str, Source]) -> Probe:
        """The origins of the outputs in the old module's tensors, apart from the new module's own values."""
        found = probe(self._run, {**sources, **self.own})
        limit = sum(prod(source.shape) for source in sources.values())
        outputs = {name: self._apart(name, origin, found, limit) for name, origin in found.outputs.items()}
        starts = {name: found.starts[name] for name in sources}
        return self._by_their_names(Probe(dict(sources), starts, outputs, found.calls))

    def _apart(self, name: str, origin: Origin, found: Probe, limit: int) -> Origin:
        """The origin of an output, in which elements with the new module's own values keep those of the live model."""
        from optimstate.installed_torch import torch

        if isinstance(origin, Combined):
            if any(bool((part >= limit).any()) for part, _ in origin.parts):
                return Unexplained("the new module's own values are part of it", self._named(origin, found))
            return origin
        if not isinstance(origin, Moved) or not bool((origin.ids >= limit).any()):
            return origin
        flat = origin.ids.reshape(-1)
        own = flat >= limit
        before = found.starts.get(_own(_ties(self.news).get(name, name)), -1)
        places = torch.arange(flat.numel()) + before
        if bool(own.all()) and origin.scale == 1 and not origin.shift:
            return New(tuple(origin.ids.shape), random=False, untouched=bool(torch.equal(flat, places)))
        if bool(own.all()):
            return New(tuple(origin.ids.shape), random=False)
        if origin.scale != 1 or origin.shift or not torch.equal(flat[own], places[own]) or bool((flat < 0).any()):
            reason = "the new module's own values are part of it, at other positions than before"
            return Unexplained(reason, (found.owner(int(flat[~own].max())),))
        return origin._replace(ids=torch.where(own, -1, flat).reshape(origin.ids.shape), fill="live")

    def _named(self, origin: Combined, found: Probe) -> tuple[str, ...]:
        owners = (found.owner(int(part.reshape(-1).max())) for part, _ in origin.parts)
        return tuple(name for name in owners if name in self.sources)

    def _by_their_names(self, found: Probe) -> Probe:
        """The probe with outputs of tied parameters of the old module distributed over their names.

        The script sees one tensor; a checkpoint has it under every name, and an optimizer under the first.
        """
        from optimstate.installed_torch import torch

        names: dict[str, list[str]] = {}
        for alias, first in _ties(self.olds).items():
            names.setdefault(first, [first]).append(alias)
        outputs = dict(found.outputs)
        for first, aliases in names.items():
            start, size = found.starts[first], prod(found.sources[first].shape)
            takers = [
                name
                for name, origin in outputs.items()
                if isinstance(origin, Moved) and bool(((origin.ids >= start) & (origin.ids < start + size)).any())
            ]
            left = [alias for alias in aliases if alias not in takers]
            for name in takers:
                alias = name if name in aliases else left.pop(0) if left else first
                origin = outputs[name]
                assert isinstance(origin, Moved)
                mine = (origin.ids >= start) & (origin.ids < start + size)
                ids = torch.where(mine, origin.ids - start + found.starts[alias], origin.ids)
                outputs[name] = origin._replace(ids=ids)
        return found._replace(outputs=outputs)


def _own(name: str) -> str:
    return f"{name} (of the new module)"


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones under each name.

    Raises:
        DerivationError: The state dict has a tensor that is not one of the module.
    """
    held = {id(tensor) for _, tensor in module.named_parameters(remove_duplicate=False)}
    held |= {id(tensor) for _, tensor in module.named_buffers(remove_duplicate=False)}
    found: dict[str, torch.Tensor] = module.state_dict(keep_vars=True)
    for name, tensor in found.items():
        if id(tensor) not in held:
            raise DerivationError(
                f"{describe(name)} is made by the state_dict of {type(module).__qualname__}, which does not hold it",
                hint="Derive from a function from state dict to state dict.",
            )
    return dict(found)


def _ties(tensors: Mapping[str, Any]) -> dict[str, str]:
    """For each further name of a tensor the first one."""
    first: dict[int, str] = {}
    return {name: first[id(t)] for name, t in tensors.items() if first.setdefault(id(t), name) != name}


def _holding(module: torch.nn.Module, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> torch.nn.Module:
    """A copy of a module with these values; tied parameters stay tied."""
    from optimstate.installed_torch import torch

    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in memo:
            value = values[name]
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    return copy.deepcopy(module, memo)
