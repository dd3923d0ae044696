"""The weight conversions of the installed transformers, as functions that plans are derived from.

A model of transformers has a hub layout, in which weights are published and Trainer saves them, and a live layout, that
of its modules; for mixtures of experts they differ since transformers 5. The library's own converters are run here on a
model on the meta device; what they do is read off, never translated.
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
from optimstate.derivation.scaled import derive_scaled
from optimstate.errors import DerivationError

__all__ = ["Layout", "derive_transformers", "live_model", "to_hub", "to_live"]

Layout = Literal["live", "hub"]
_SCALED_FROM = 1 << 22  # elements; the converters know sizes by the model alone, so that shrinking is safe


def derive_transformers(source: Any, *, to: Layout = "live", shapes: Mapping[str, Any] | None = None) -> Derived:
    """The plan between the two layouts of a transformers model.

    Args:
        source: A model, a configuration, or a folder or file with one (`config.json`).
        to: The layout that the plan leads to.
        shapes: Names with tensors or shapes of the checkpoint; without, those of the model in the other layout. Where
            they stand in the layout that the plan leads to, it leads there from what they are in the other; a note
            says so.

    Raises:
        DerivationError: transformers is not installed or too old, builds no such model, or its converters do something
            that no plan says.
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
    """What the plan leads from, and what is to be said of it where that is not what was given."""
    live = model.state_dict().keys()
    if (given.keys() <= live) is (to == "hub"):
        return given, ""
    from optimstate.installed_torch import torch

    convert, back = (to_hub, to_live) if to == "hub" else (to_live, to_hub)

    def run(function: Function) -> dict[str, Source]:
        made = {n: torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta") for n, s in given.items()}
        return {name: source_of(value) for name, value in function(made).items()}

    if run(convert(model)) != given or (other := run(back(model))) == given:
        return given, ""
    here, there = ("hub", "live") if to == "hub" else ("live", "hub")
    return other, f"the checkpoint stands in the {here} layout already: the plan leads there from the {there} layout"


def _derived(model: Any, convert: Callable[[Any], Function], given: dict[str, Source]) -> Derived:
    if sum(prod(value.shape) for value in given.values()) < _SCALED_FROM:
        return derive(convert(model), given, allow_drop=True, scaled=False)
    known: dict[tuple[tuple[int, int], ...], Function] = {}

    def at(scale: Mapping[int, int]) -> Function:
        key = tuple(scale.items())
        if key not in known:
            known[key] = convert(_shrunk(model, scale))
        return known[key]

    return derive_scaled(at, given, allow_drop=True)


def _shrunk(model: Any, scale: Mapping[int, int]) -> Any:
    """A model on the meta device that answers with shrunk shapes where converters ask for its parameters."""
    from optimstate.installed_torch import torch

    with torch.device("meta"):
        made = copy.deepcopy(model).to("meta")
        for parameter in made.parameters():
            parameter.data = torch.empty([scale.get(size, size) for size in parameter.shape], dtype=parameter.dtype)
    return made


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
    """What transformers does to a model's state dict when it saves it."""
    loading = _loading()

    def saved(state: dict[str, Any]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = loading.revert_weight_conversion(model, dict(state))
        return found

    return saved


def to_live(model: Any) -> Function:
    """What transformers does to the tensors of a published checkpoint when it loads them."""
    loading = _loading()
    from transformers import conversion_mapping

    steps = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    # Whether prefixes were changed depends on how the model was made; the checkpoint's own names decide.
    steps = [step for step in steps if not isinstance(step, loading.PrefixChange)]
    renamings = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    converters = [step for step in steps if isinstance(step, loading.WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    asked = copy.deepcopy(renamings), copy.deepcopy(converters)  # which note that they were used
    renamed: dict[str, tuple[str, Any]] = {}
    places: dict[str, Any] = {}

    def place(item: tuple[str, Any]) -> Any:
        if item[0] not in places:
            places[item[0]] = loading.dot_natural_key(item[0])
        return places[item[0]]

    def loaded(state: dict[str, Any]) -> Mapping[str, Any]:
        gathered: dict[str, Any] = {}
        for name, tensor in sorted(state.items(), key=place):
            if name not in renamed:
                renamed[name] = loading.rename_source_key(name, *asked)
            new, pattern = renamed[name]
            if new not in gathered:
                renames = pattern is None
                gathered[new] = loading.WeightRenaming(name, new) if renames else copy.deepcopy(by_pattern[pattern])
            gathered[new].add_tensor(new, name, name if pattern is None else pattern, tensor)
        made: dict[str, Any] = {}
        for first, step in gathered.items():
            for name, value in step.convert(first, model=model, config=model.config).items():
                made[name] = value[0] if isinstance(value, list) else value
        return made

    return loaded


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
