"""What a hook knows of the live optimizer, and the groups that it gives back to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from optimstate.describe import describe
from optimstate.errors import StateMismatchError
from optimstate.installed_torch import torch
from optimstate.record import Record
from optimstate.state.algorithms.registry import ALGORITHMS, recognise_state
from optimstate.state.names import names_in

__all__ = ["Consecutive", "Live", "algorithm_name"]


class Consecutive(list[int]):
    """The keys of one param group's parameters: consecutive integers, of which membership is asked in O(1).

    For every tensor that it loads, torch looks for the parameter's key in the groups' lists one element after the
    other, which makes its loading quadratic.
    """

    def __init__(self, keys: range) -> None:
        super().__init__(keys)
        self._keys = keys

    def __contains__(self, key: object) -> bool:
        if type(key) is int and len(self) == len(self._keys):
            return key in self._keys
        return super().__contains__(key)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[int]:
        return list(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def algorithm_name(optimizer: torch.optim.Optimizer) -> str:
    """The algorithm of an optimizer's class, as plans name it in `optimizer = "..."`; empty where it is unknown."""
    for cls in type(optimizer).__mro__:
        library = cls.__module__.partition(".")[0]
        if library == "bitsandbytes":
            family = cls.__name__.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
            return f"{family}{getattr(getattr(optimizer, 'args', None), 'optim_bits', 32)}bit"
        if library in ("torch", "optimstate"):
            return cls.__name__ if cls.__name__ in _NAMES else ""
        if cls.__name__ in _NAMES and optimizer.param_groups:
            found = recognise_state(optimizer.state.values(), optimizer.param_groups[0])
            if found is not None and found.name.partition(" (")[0] == cls.__name__:
                return found.name
    return ""


_NAMES = frozenset(algorithm.name.partition(" (")[0] for algorithm in ALGORITHMS)


class Live(Record):
    """The parameters of a live optimizer.

    Attributes:
        names: For each param group its parameters' names, in order.
        parameters: The parameters, in the same order.
        options: For each param group everything else.
        keys: For each param group all its keys, in order.
        keeps_names: Whether the optimizer itself has the names.
        algorithm: Whose state it keeps, by the name in `state.algorithms`; empty for an optimizer that is not known.
    """

    names: tuple[tuple[str, ...], ...]
    parameters: tuple[tuple[torch.Tensor, ...], ...]
    options: tuple[Mapping[str, Any], ...]
    keys: tuple[tuple[str, ...], ...]
    keeps_names: bool
    algorithm: str = ""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None = None) -> Self:
        """Read a live optimizer, which is not changed.

        Args:
            optimizer: Any.
            model: Whose parameters it has, for one that was built without names.

        Raises:
            StateMismatchError: A parameter has no name, or two have the same.
        """
        groups = optimizer.param_groups
        keeps_names = all("param_names" in group for group in groups)
        if model is not None:
            names = names_in(optimizer, model)
        elif keeps_names:
            names = [list(group["param_names"]) for group in groups]
        else:
            raise StateMismatchError(
                f"the parameters of this {type(optimizer).__name__} have no names, so no state can be given to them "
                "by name",
                hint="Build it from model.named_parameters(), or tell the hook the model: "
                "hooks.match_names(model=model).",
            )
        made = cls(
            tuple(map(tuple, names)),
            tuple(tuple(group["params"]) for group in groups),
            tuple({key: group[key] for key in group if key not in ("params", "param_names")} for group in groups),
            tuple(tuple(key for key in group if key != "params") for group in groups),
            keeps_names,
            algorithm_name(optimizer),
        )
        made.refuse_twins(lambda name: name)
        return made

    @classmethod
    def by_position(cls, optimizer: torch.optim.Optimizer) -> Self:
        """Read a live optimizer whose parameters have no names: their numbers stand for them."""
        number = iter(range(sum(len(group["params"]) for group in optimizer.param_groups)))
        groups = optimizer.param_groups
        return cls(
            tuple(tuple(str(next(number)) for _ in group["params"]) for group in groups),
            tuple(tuple(group["params"]) for group in groups),
            tuple({key: group[key] for key in group if key not in ("params", "param_names")} for group in groups),
            tuple(tuple(key for key in group if key != "params") for group in groups),
            False,
            algorithm_name(optimizer),
        )

    def refuse_twins(self, rename: Callable[[str], str]) -> None:
        """Raise StateMismatchError if two parameters would have one name."""
        seen: dict[str, str] = {}
        for group in self.names:
            for name in group:
                new = rename(name)
                if new in seen:
                    raise StateMismatchError(
                        f"two parameters of the live optimizer, {describe(seen[new])} and {describe(name)}, "
                        f"would be called {describe(new)}"
                    )
                seen[new] = name

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same parameters under other names."""
        self.refuse_twins(rename)
        return self._replace(names=tuple(tuple(map(rename, group)) for group in self.names))

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The parameters' shapes by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.pairs()}

    def pairs(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Every name with its parameter."""
        for names, tensors in zip(self.names, self.parameters, strict=True):
            yield from zip(names, tensors, strict=True)
