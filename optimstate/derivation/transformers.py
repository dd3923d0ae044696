"""The weight conversions of the installed transformers, as functions from which plans are derived.

A transformers model has a hub layout, in which weights are published and saved by Trainer, and a live layout, that of
its modules; for mixtures of experts they differ since transformers 5. The library's own converters are run here with a
model on the meta device, and plans are derived from them; nothing is translated by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

from optimstate.derivation.derive import derive
from optimstate.derivation.derived import Derived, source_of
from optimstate.derivation.origins import Function, Source
from optimstate.derivation.scaled import Basis, derive_scaled
from optimstate.errors import DerivationError

__all__ = ["Layout", "Shrinking", "derive_transformers", "live_model", "to_hub", "to_live"]

Layout = Literal["live", "hub"]
_SCALED_FROM = 1 << 22  # elements; shrinking is safe, because the converters take sizes from the model only


def derive_transformers(source: Any, *, to: Layout = "live", shapes: Mapping[str, Any] | None = None) -> Derived:
    """The plan between the two layouts of a transformers model.

    Args:
        source: A model, a configuration, or a folder or file with one (`config.json`).
        to: The layout after the plan.
        shapes: Names with tensors or shapes of the checkpoint; by default those of the model in the other layout. If
            they are already in the layout `to`, the plan starts from the other layout, and a note says so.

    Raises:
        DerivationError: transformers is not installed, is too old, cannot build the model, or its converters do
            something that no plan can express.
    """
    model = live_model(source)
    convert = to_hub if to == "hub" else to_live
    if shapes is None:
        shapes = {name: value for name, value in model.state_dict().items() if not _is_tied(model, name)}
        if to == "live":
            shapes = to_hub(model)({name: value.to("meta") for name, value in shapes.items()})
    given, note = _turned(model, {name: source_of(value) for name, value in shapes.items()}, to)
    found = _derived(model, convert, given)
    return found._replace(notes=(note, *found.notes)) if note else found


def _turned(model: Any, given: dict[str, Source], to: Layout) -> tuple[dict[str, Source], str]:
    """The sources of the plan, and a note if these are not the given ones."""
    live = model.state_dict().keys()
    if (given.keys() <= live) is (to == "hub"):
        return given, ""
    convert, back = (to_hub, to_live) if to == "hub" else (to_live, to_hub)
    if _run(convert(model), given) != given or (other := _run(back(model), given)) == given:
        return given, ""
    here, there = ("hub", "live") if to == "hub" else ("live", "hub")
    return other, f"the checkpoint stands in the {here} layout already: the plan leads there from the {there} layout"


def _derived(model: Any, convert: Callable[[Any], Function], given: dict[str, Source]) -> Derived:
    if sum(prod(value.shape) for value in given.values()) < _SCALED_FROM:
        return derive(convert(model), given, allow_drop=True, scaled=False)
    shrinking = Shrinking(model, convert)
    basis = None
    if not given.keys() <= model.state_dict().keys():  # sizes of the hub's layout are sums of the model's
        basis = _basis(model)
        basis = basis if basis.shrunk({}) == given else None
    return derive_scaled(shrinking.at, given, allow_drop=True, basis=basis)


def _basis(model: Any) -> Basis:
    """The tensors of a model, and what they are in the hub's layout when their dimensions are shrunk."""
    saving = Shrinking(model, to_hub)
    state = model.state_dict().items()
    live = {name: source_of(value) for name, value in state if not _is_tied(model, name)}
    known: dict[tuple[tuple[int, int], ...], dict[str, Source]] = {}

    def shrunk(scale: Mapping[int, int]) -> dict[str, Source]:
        key = tuple(scale.items())
        if key not in known:
            known[key] = made(scale)
        return known[key]

    def made(scale: Mapping[int, int]) -> dict[str, Source]:
        given = {name: s._replace(shape=tuple(scale.get(size, size) for size in s.shape)) for name, s in live.items()}
        return _run(saving.at(scale), given)

    return Basis(live, shrunk)


def _run(function: Function, given: Mapping[str, Source]) -> dict[str, Source]:
    """The names, shapes and dtypes that a function makes, from tensors without elements."""
    from optimstate.installed_torch import torch

    made = {n: torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta") for n, s in given.items()}
    return {name: source_of(value) for name, value in function(made).items()}


class Shrinking:
    """A conversion by a copy of the model that answers with shrunk shapes where converters ask for its parameters."""

    def __init__(self, model: Any, convert: Callable[[Any], Function]) -> None:
        from optimstate.installed_torch import torch

        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        held = [*model.parameters(), *model.buffers()]
        made = [torch.empty_like(tensor, device="meta") for tensor in held]
        for place, tensor in enumerate(held):
            if isinstance(tensor, torch.nn.Parameter):
                made[place] = torch.nn.Parameter(made[place], tensor.requires_grad)
        # No tensor is copied: a model may be as large as the memory.
        self.model = copy.deepcopy(model, {id(tensor): other for tensor, other in zip(held, made, strict=True)})
        self.convert = convert(self.model)
        self.scale: dict[int, int] = {}

    def at(self, scale: Mapping[int, int]) -> Function:
        """The conversion for shrunk dimensions."""

        def shrunk(state: dict[str, Any]) -> Mapping[str, Any]:
            self._shrink(scale)
            return self.convert(state)

        return shrunk

    def _shrink(self, scale: Mapping[int, int]) -> None:
        from optimstate.installed_torch import torch

        if scale == self.scale:
            return
        self.scale = dict(scale)
        for name, parameter in self.model.named_parameters():
            sizes = [scale.get(size, size) for size in self.shapes[name]]
            parameter.data = torch.empty(sizes, dtype=parameter.dtype, device="meta")


def live_model(source: Any) -> Any:
    """A model on the meta device: given, or built from a configuration.

    Raises:
        DerivationError: transformers is not installed, or no model can be built.
    """
    transformers = _library()
    if hasattr(source, "state_dict"):
        return source
    from optimstate.installed_torch import torch

    try:
        config = source
        if isinstance(source, str | Path):
            path = Path(source)
            config = transformers.AutoConfig.from_pretrained(path.parent if path.is_file() else path)
        names = getattr(config, "architectures", None) or []
        kind = next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)
        with torch.device("meta"):
            return kind(config) if kind is not None else transformers.AutoModel.from_config(config)
    except (ValueError, KeyError, OSError, ImportError, AttributeError, TypeError) as error:
        given = source if isinstance(source, str | Path) else type(source).__name__
        raise DerivationError(f"{given}: transformers builds no model from it: {error}") from error


def to_hub(model: Any) -> Function:
    """What transformers does to a model's state dict when it saves it (`revert_weight_conversion` of the library)."""
    loading = _loading()
    used = getattr(model, "_weight_conversions", None)  # of the checkpoint that the model was loaded from
    steps = [step.reverse_transform() for step in reversed(_conversions(model) if used is None else used)]
    return _Conversion(model, steps, loading, saving=True)


def to_live(model: Any) -> Function:
    """What transformers does to the tensors of a published checkpoint when it loads them."""
    return _Conversion(model, _conversions(model), _loading(), saving=False)


def _conversions(model: Any) -> list[Any]:
    """The library's converters for a model, in the order of loading."""
    loading = _loading()
    from transformers import conversion_mapping

    steps = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    # Whether prefixes were changed depends on how the model was made; the checkpoint's own names decide.
    return [step for step in steps if not isinstance(step, loading.PrefixChange)]


class _Conversion:
    """The library's converters in one direction; names are converted once, for many calls.

    Args:
        model: The model from which converters take the configuration and shapes.
        steps: The converters in the order of this direction.
        loading: The library's module of converters.
        saving: Whether names are changed after the converters instead of before.
    """

    def __init__(self, model: Any, steps: list[Any], loading: Any, *, saving: bool) -> None:
        self.model, self.loading, self.saving = model, loading, saving
        self.renamings = [step for step in steps if isinstance(step, loading.WeightRenaming)]
        self.converters = [step for step in steps if isinstance(step, loading.WeightConverter)]
        self.by_pattern = {pattern: step for step in self.converters for pattern in step.source_patterns}
        self._names: dict[str, tuple[str, str | None]] = {}
        self._asked: tuple[list[Any], list[Any]] = ([], [])
        self._targets: dict[str, str] = {}

    def __call__(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._names.keys() != state.keys():
            self._place(state)
        made: dict[str, Any] = {}
        gathered: dict[str, Any] = {}
        for name, (new, pattern) in self._names.items():
            if new not in gathered:
                gathered[new] = state[name] if pattern is None else copy.deepcopy(self.by_pattern[pattern])
            if isinstance(gathered[new], self.loading.WeightConverter):
                gathered[new].add_tensor(new, name, pattern or name, state[name])
        for first, held in gathered.items():
            if not isinstance(held, self.loading.WeightConverter):
                made[first] = held
                continue
            for name, value in held.convert(first, model=self.model, config=self.model.config).items():
                made[self._target(name)] = value[0] if isinstance(value, list) else value
        return made

    def _place(self, state: Mapping[str, Any]) -> None:
        """Find for each name the tensor of which it becomes a part, and the pattern of the converter that makes it."""
        # Steps remember names, and some change a name only after another one.
        self._asked = copy.deepcopy(self.renamings), copy.deepcopy(self.converters)
        renamings, converters = self._asked
        self._names, self._targets = {}, {}
        for name in sorted(state, key=self.loading.dot_natural_key):
            if self.saving:
                new, pattern = self.loading.apply_converters(name, converters)
                if pattern is None:
                    new = self.loading.apply_renamings(name, renamings)
            else:
                new, pattern = self.loading.rename_source_key(name, renamings, converters)
            self._names[name] = new, pattern

    def _target(self, name: str) -> str:
        if not self.saving:
            return name
        if name not in self._targets:
            self._targets[name] = self.loading.apply_renamings(name, self._asked[0])
        return self._targets[name]


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise DerivationError("transformers is not installed", hint="pip install transformers") from None
    return transformers


def _loading() -> Any:
    _library()
    try:
        from transformers import core_model_loading
    except ImportError:
        import transformers

        raise DerivationError(
            f"transformers {transformers.__version__} has no weight converters", hint="Version 5 and later have."
        ) from None
    return core_model_loading


def _is_tied(model: Any, name: str) -> bool:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return name in tied
