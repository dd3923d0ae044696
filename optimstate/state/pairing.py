"""The model of a checkpoint that an optimizer belongs to, and the names that it gives the optimizer's parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from optimstate.describe import describe
from optimstate.record import Record
from optimstate.state.grouping import Trainer, excluded_places
from optimstate.state.names import unwrapped, wrapper_prefix
from optimstate.state.naming import (
    Candidate,
    Naming,
    model_candidates,
    name_in_order,
    name_parameters,
)
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section

__all__ = ["ModelNames", "Namer", "Order"]

Order = Literal["model", "optimizer"]


# The parts of a module that LoRA adapts, in the order in which PEFT adds them to it.
_ADAPTER_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_ADAPTER = re.compile(rf"base_model\.model\.(?P<module>.+)\.(?P<part>{'|'.join(_ADAPTER_PARTS)})(\.weight)?$")


class Namer:
    """Finds, for each optimizer, its model and the names of its parameters.

    Args:
        models: The models of the checkpoint.
        given: Names that the user gave, by the label of the optimizer.
        order: The order of the given names: the model's or the optimizer's.
        built: The parameters of a model that was built for this purpose, in its order.
        trainer: The trainer whose rule made the param groups, if known.
    """

    def __init__(
        self,
        models: Sequence[ModelNames],
        given: Mapping[str, Sequence[str]] | None = None,
        *,
        order: Order = "model",
        built: list[Candidate] | None = None,
        trainer: Trainer | None = None,
    ) -> None:
        self._models, self._given, self._order, self._built = models, given or {}, order, built
        self._trainer = trainer

    def named(self, section: Section) -> Naming:
        """The names of one optimizer's parameters."""
        state = section.optimizer()
        names = self._given.get(section.label)
        if names is not None and state.is_named:
            own = [str(name) for _, name, _ in state.parameters()]
            if sorted(own) == sorted(names):
                return name_parameters(state, [], ordered=False)
            problem = f"it already has other names than those that are given: {describe(own[0])}, ..."
            return Naming.unknown(len(own), problem)
        if names is not None:
            return self._contradicted(state, [Candidate(name, None) for name in names]) or self._as_given(state, names)
        if self._built is not None:
            adapters = [model for model in self._models if model.order_by_base(self._built)]
            if len(adapters) == 1:
                return self._inferred(state, adapters[0].candidates, ordered=True)
            contradicted = None if state.is_named else self._contradicted(state, self._built)
            return contradicted or self._inferred(state, self._built, ordered=True)
        tried = [(model, self._inferred(state, model.candidates, ordered=model.ordered)) for model in self._models]
        if not tried:
            return name_parameters(state, [], ordered=False)
        return _of_the_right_model(section, tried)

    def _contradicted(self, state: OptimizerState, given: Sequence[Candidate]) -> Naming | None:
        """Why the given names or model cannot belong to the weights of the checkpoint; None if they can.

        Args:
            state: The optimizer.
            given: The given parameters, in their order.
        """
        names = [candidate.name for candidate in given]
        spellings = [(model, model.spelled(names)) for model in self._models]
        if not names or not spellings:
            return None
        model, spelling = max(spellings, key=lambda one: len(one[1].saved_names))
        label = model.section.label or "the checkpoint"
        problem = ""
        if not spelling.saved_names and (self._order == "model" or self._built is not None):
            problem = f"the weights at {label} have none of the names: {describe(names[0])}, ..."
        for candidate in given:
            shape = spelling.shape(candidate.name)
            if shape is not None and candidate.shape is not None and shape != candidate.shape:
                shapes = f"{list(shape)} at {label}, and {list(candidate.shape)} here"
                problem = problem or f"{describe(candidate.name)} has the shape {shapes}"
        if model.ordered and (self._order == "model" or self._built is not None):
            position = {candidate.name: index for index, candidate in enumerate(model.candidates)}
            known = [spelling.saved_names[name] for name in names if name in spelling.saved_names]
            for before, after in pairwise(known):
                if position[before] > position[after] and not problem:
                    problem = f"{describe(before)} comes before {describe(after)} here, and after it at {label}"
        if not problem:
            return None
        return Naming.unknown(sum(len(group.params) for group in state.groups), problem)

    def _inferred(self, state: OptimizerState, candidates: Sequence[Candidate], *, ordered: bool) -> Naming:
        excluded = excluded_places(self._trainer, state, candidates)
        found = name_parameters(state, candidates, ordered=ordered, excluded=excluded)
        return found if found.complete or not excluded else name_parameters(state, candidates, ordered=ordered)

    def _as_given(self, state: OptimizerState, names: Sequence[str]) -> Naming:
        best = max(
            self._models, key=lambda model: sum(model.spelled(names).shape(n) is not None for n in names), default=None
        )
        spelling = best.spelled(names) if best is not None else _Spelling({}, {})
        if self._order == "optimizer":
            found = name_in_order(state, names, {given: spelling.shape(given) for given in names})
        else:
            candidates = [Candidate(given, spelling.shape(given)) for given in names]
            found = name_parameters(state, candidates, ordered=True, given=True)
            if not found.complete and (excluded := excluded_places(self._trainer, state, candidates)):
                found = name_parameters(state, candidates, ordered=True, given=True, excluded=excluded)
        return found._replace(names=tuple(name and spelling.saved(name) for name in found.names))


class ModelNames:
    """The names, shapes and order of a model's parameters.

    Args:
        section: The model.
        ordered: Whether its tensors are in the order of `named_parameters()`.
    """

    def __init__(self, section: Section, *, ordered: bool) -> None:
        self.section, self.ordered = section, ordered
        tensors = section.tensors()
        prefix = wrapper_prefix(tensors)
        self.candidates = model_candidates({key.removeprefix(prefix): value for key, value in tensors.items()})
        self._shapes = {candidate.name: candidate.shape for candidate in self.candidates}
        self._plain = {unwrapped([key])(key): key for key in self._shapes}

    def order_like(self, parameters: Sequence[tuple[Candidate, Sequence[str]]], every: Collection[str]) -> None:
        """Take the order of a live model, if it has the same tensors.

        Args:
            parameters: The trainable parameters of the live model, in its order, each with all its names.
            every: The names of all its tensors, including buffers and frozen parameters.
        """
        own = {unwrapped([name])(name): shape for name, shape in self._shapes.items()}
        if self.ordered or not parameters or not own.keys() <= set(every):
            return
        found = [next((name for name in names if own.get(name) == one.shape), None) for one, names in parameters]
        if all(name is not None for name in found) and len(set(found)) == len(found):
            self.candidates = [one for one, _ in parameters]
            self.ordered = True

    def order_by_base(self, base: Sequence[Candidate]) -> bool:
        """Sort an adapter's weights by the modules of its base model; False if these are not an adapter's weights."""
        modules = {candidate.name.rpartition(".")[0]: index for index, candidate in enumerate(base)}
        keys: dict[str, tuple[int, int]] = {}
        for candidate in self.candidates:
            found = _ADAPTER.match(candidate.name)
            if found is None or found["module"] not in modules:
                return False
            keys[candidate.name] = modules[found["module"]], _ADAPTER_PARTS.index(found["part"])
        if not keys or len(set(keys.values())) != len(keys):
            return False
        self.candidates = sorted(self.candidates, key=lambda candidate: keys[candidate.name])
        self.ordered = True
        return True

    def spelled(self, names: Sequence[str]) -> _Spelling:
        """The given names as this model spells them."""
        rename = unwrapped(names)
        saved = {given: given if given in self._shapes else self._plain.get(rename(given)) for given in names}
        return _Spelling({given: name for given, name in saved.items() if name is not None}, self._shapes)


class _Spelling(Record):
    """Names as they are given, and as the weights of the checkpoint have them, which is without an adapter's name.

    Attributes:
        saved_names: The weights' name for each given name that they have.
        shapes: The shapes of the weights, by the weights' names.
    """

    saved_names: Mapping[str, str]
    shapes: Mapping[str, Any]

    def shape(self, given: str) -> tuple[int, ...] | None:
        """The shape of a parameter; None if the weights do not show it."""
        name = self.saved_names.get(given)
        return None if name is None else self.shapes.get(name)

    def saved(self, given: str) -> str:
        """The weights' name, with which rules match the parameter in the model and in the optimizer."""
        return self.saved_names.get(given, given)


def _of_the_right_model(section: Section, tried: Sequence[tuple[ModelNames, Naming]]) -> Naming:
    """The naming by the optimizer's model: one whose parameters are all used, or one with a similar path."""
    fitting = [(model, naming) for model, naming in tried if naming.complete]
    for choice in ([found for found in fitting if not found[1].unused], fitting):
        distinct = {naming.names: naming for _, naming in choice}
        if len(distinct) == 1:
            return next(iter(distinct.values()))
        if distinct:
            related = max(_kinship(section.path, model.section.path) for model, _ in choice)
            nearest = {n.names: n for m, n in choice if _kinship(section.path, m.section.path) == related}
            if len(nearest) == 1 and related > 0:
                return next(iter(nearest.values()))
            labels = " and ".join(model.section.label for model, _ in choice[:3])
            naming = choice[0][1]
            problem = f"its parameters fit the models at {labels}, and nothing says which of them it belongs to"
            return Naming.unknown(len(naming.names), problem)
    best = max(tried, key=lambda found: (_kinship(section.path, found[0].section.path), len(found[0].candidates)))
    return best[1]


def _kinship(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How similar two paths are: shared keys, equal list indices, words common to both keys."""
    score = 0
    for a, b in zip(one, other, strict=False):
        if a == b:
            score += 2
        else:
            words = ({w for w in re.split(r"[^a-z0-9]+", str(key).lower()) if w} for key in (a, b))
            score += len(set.intersection(*words) - {"optimizer", "model", "state", "dict", "optim", "opt", "net"})
    return score
