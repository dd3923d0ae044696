"""The sources of the elements of outputs, and the components of sources and outputs that they connect."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from optimstate.derivation.origins import Combined, Moved, Probe
from optimstate.derivation.programs import Wanted
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.installed_torch import torch

__all__ = ["Component", "Owners", "taken_in_part"]


class Component(Record):
    """Sources and outputs that share elements."""

    sources: tuple[str, ...]
    outputs: tuple[str, ...]


class Owners:
    """The sources of the elements of all outputs."""

    def __init__(self, found: Probe, moved: Mapping[str, Moved]) -> None:
        from optimstate.installed_torch import torch

        self.names = list(found.sources)
        self.starts = torch.tensor([found.starts[name] for name in self.names], dtype=torch.int64)
        self._flat = {name: origin.ids.reshape(-1) for name, origin in moved.items()}
        self._shapes = {name: tuple(origin.ids.shape) for name, origin in moved.items()}
        self._owner = {
            name: torch.where(flat >= 0, torch.searchsorted(self.starts, flat, right=True) - 1, -1)
            for name, flat in self._flat.items()
        }
        self._sources = {
            name: [self.names[number] for number in owner.unique().tolist() if number >= 0]  # type: ignore[no-untyped-call]
            for name, owner in self._owner.items()
        }
        self._number = {name: number for number, name in enumerate(self.names)}

    def sources_of(self, output: str) -> list[str]:
        """The sources whose elements an output takes, in order."""
        return self._sources[output]

    def mask(self, output: str, source: str) -> torch.Tensor:
        """A mask of the elements of an output, flat, that are from the source."""
        return self._owner[output] == self._number[source]

    def own_ids(self, output: str, source: str) -> torch.Tensor:
        """The positions of these elements in the source, in the output's order."""
        number = self._number[source]
        return self._flat[output][self._owner[output] == number] - int(self.starts[number])

    def split(self, output: str, sources: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """For every element of an output, flat, its position in its source and the source's index in `sources`."""
        from optimstate.installed_torch import torch

        numbers = torch.full((len(self.names) + 1,), -1, dtype=torch.int64)  # the last is for elements without source
        numbers[[self._number[name] for name in sources]] = torch.arange(len(sources))
        owner = self._owner[output]
        ids = torch.where(owner >= 0, self._flat[output] - self.starts[owner.clamp(min=0)], -1)
        return ids, numbers[owner]

    def relative(self, output: str, source: str) -> Wanted:
        """The positions in a source of all elements of an output that has no other source."""
        from optimstate.installed_torch import torch

        flat = self._flat[output]
        start = int(self.starts[self._number[source]])
        return Wanted(self._shapes[output], torch.where(flat >= 0, flat - start, -1))

    def components(self) -> list[Component]:
        """Sources and outputs that share elements, in the order of the sources."""
        parent: dict[str, str] = {name: name for name in self.names}

        def root(name: str) -> str:
            while parent[name] != name:
                parent[name] = parent[parent[name]]
                name = parent[name]
            return name

        for sources in self._sources.values():
            for name in sources[1:]:
                one, other = root(sources[0]), root(name)
                first, second = sorted((one, other), key=self._number.__getitem__)
                parent[second] = first
        members: dict[str, list[str]] = defaultdict(list)
        outputs: dict[str, list[str]] = defaultdict(list)
        for output, sources in self._sources.items():
            if sources:
                outputs[root(sources[0])].append(output)
        for name in self.names:
            members[root(name)].append(name)
        return [Component(tuple(members[key]), tuple(outputs[key])) for key in members if key in outputs]


def taken_in_part(found: Probe) -> list[str]:
    """Sources of which some elements are in outputs and others are not."""
    from optimstate.installed_torch import torch

    taken = torch.zeros(sum(prod(source.shape) for source in found.sources.values()), dtype=torch.bool)
    for origin in found.outputs.values():
        parts = [origin.ids] if isinstance(origin, Moved) else []
        parts += [ids for ids, _ in origin.parts] if isinstance(origin, Combined) else []
        for ids in parts:
            taken[ids[ids >= 0]] = True
    partly = []
    for name, source in found.sources.items():
        start, size = found.starts[name], prod(source.shape)
        if 0 < int(taken[start : start + size].sum()) < size:
            partly.append(name)
    return partly
