"""Judge what was read from a checkpoint by its truth file: names, groups, slots and values, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optimstate.state.names import wrapper_prefix
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import find_sections
from optimstate.tensors.lazy import LazyTensor


@dataclass
class Verdict:
    """What was compared, and every difference."""

    parameters: int = 0
    slots: int = 0
    tensors: int = 0
    wrong: list[str] = field(default_factory=list)


def digest(tensor: LazyTensor) -> str:
    return hashlib.sha256(tensor.tobytes()).hexdigest()[:16]


def judge(tree: Any, truth: Mapping[str, Any]) -> Verdict:
    """Compare the sections of a tree with a truth."""
    verdict = Verdict()
    sections = find_sections(tree)
    states = [section.optimizer() for section in sections if section.kind == "optimizer"]
    if "optimizers" in truth:
        for name, expected in truth["optimizers"].items():
            _judge_best(states, expected, verdict, name)
    elif truth.get("state"):
        _judge_best(states, truth, verdict, "optimizer")
    if truth.get("model"):
        models = [section.tensors() for section in sections if section.kind in ("model", "ema")]
        results = [_judge_model(found, truth["model"]) for found in models] or [["no model was found"]]
        verdict.wrong += min(results, key=len)
        verdict.tensors = len(truth["model"])
    return verdict


def _judge_best(states: list[OptimizerState], truth: Mapping[str, Any], verdict: Verdict, what: str) -> None:
    results = []
    for state in states:
        found = Verdict()
        _judge_optimizer(state, truth, found)
        results.append(found)
    if not results:
        verdict.wrong.append(f"{what}: no optimizer was found")
        return
    best = min(results, key=lambda found: len(found.wrong))
    verdict.parameters += best.parameters
    verdict.slots += best.slots
    verdict.wrong += best.wrong


def _judge_optimizer(state: OptimizerState, truth: Mapping[str, Any], verdict: Verdict) -> None:
    names = [name for group in truth.get("groups", []) for name in group["params"]]
    if truth.get("groups_names"):
        names = [name for group in truth["groups_names"] for name in group if name is not None]
    listed = list(state.parameters())
    if state.is_named:
        prefix = wrapper_prefix([str(name) for _, name, _ in listed])
        shift = wrapper_prefix(names)
        by_name = {shift + str(name).removeprefix(prefix): slots for _, name, slots in listed}
    else:
        if len(names) != len(listed):
            verdict.wrong.append(f"{len(listed)} parameters, the truth has {len(names)}")
            return
        by_name = {name: slots for name, (_, _, slots) in zip(names, listed, strict=True)}
    for group, expected in zip(state.groups, truth.get("groups", []), strict=False):
        for option in group.options.keys() & expected.keys():
            _judge_option(option, group.options[option], expected[option], verdict)
    for name, expected in truth["state"].items():
        verdict.parameters += 1
        slots = _merged(by_name.get(name))
        for slot, value in expected.items():
            if slot == "__param__":
                continue
            verdict.slots += 1
            if slots is None or slot not in slots:
                verdict.wrong.append(f"{name}: no {slot}, only {list(slots or ())}")
            else:
                verdict.wrong += [f"{name} {slot}: {what}" for what in differences(slots[slot], value)]


def _merged(slots: Mapping[Any, Any] | None) -> dict[str, Any] | None:
    """Slots by name, those that bitsandbytes nests among the others."""
    if slots is None:
        return None
    made = {str(slot): value for slot, value in slots.items()}
    return {**made, **made.pop("__bnb_optimizer_quant_state__", {})}


def _judge_option(option: str, value: Any, expected: Any, verdict: Verdict) -> None:
    if isinstance(expected, bool | int | float) and isinstance(value, bool | int | float) and value != expected:
        verdict.wrong.append(f"option {option}: {value!r} != {expected!r}")
    if isinstance(expected, list) and isinstance(value, list | tuple) and list(value) != expected:
        verdict.wrong.append(f"option {option}: {value!r} != {expected!r}")


def differences(value: Any, expected: Mapping[str, Any]) -> list[str]:
    """How a value differs from its truth."""
    kind = expected.get("kind", "tensor")
    if "sha256" in expected and isinstance(value, LazyTensor):
        found = (list(value.shape), value.dtype, digest(value))
        wanted = (expected["shape"], expected["dtype"].removeprefix("torch."), expected["sha256"])
        return [] if found == wanted else [f"{found} != {wanted}"]
    if kind in ("int", "float", "bool", "str"):
        return [] if value == expected["value"] else [f"{value!r} != {expected['value']!r}"]
    if kind == "NoneType":
        return [] if value is None else [f"{value!r} is not None"]
    if kind == "dict" and isinstance(value, Mapping):
        items = {str(key): inner for key, inner in value.items()}
        wrong = [f"no {key!r}" for key in expected["items"] if key not in items]
        return wrong + [
            f"{key}: {what}"
            for key, inner in expected["items"].items()
            if key in items
            for what in differences(items[key], inner)
        ]
    if kind.removeprefix("builtins.") in ("list", "tuple", "set") and isinstance(value, list | tuple | set):
        items = expected.get("items")
        if not isinstance(items, list) or len(items) != len(value):
            return [] if items is None else [f"{len(value)} items != {len(items)}"]
        if isinstance(value, set):
            return []
        return [what for a, b in zip(value, items, strict=True) if isinstance(b, Mapping) for what in differences(a, b)]
    return [f"{type(value).__name__} {value!r} cannot be compared with {kind}"[:200]]


def _judge_model(found: Mapping[str, Any], truth: Mapping[str, Any]) -> list[str]:
    prefix, shift = wrapper_prefix(found), wrapper_prefix(truth)
    by_name = {name.removeprefix(prefix): value for name, value in found.items()}
    wrong = []
    for name, expected in truth.items():
        value = by_name.get(name.removeprefix(shift))
        if value is None:
            wrong.append(f"model: no {name}")
        else:
            wrong += [f"model {name}: {what}" for what in differences(value, expected)]
    return wrong
