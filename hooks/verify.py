"""The hooks that run after an optimizer has loaded: does it have what a resumed run should have?"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

from optimstate.errors import OptimStateWarning, StateMismatchError, UsageError
from optimstate.hooks.engine.hook import LOGGER, LoadHook
from optimstate.hooks.engine.live import algorithm_name
from optimstate.hooks.engine.match import foreign_slots
from optimstate.installed_torch import torch
from optimstate.plan.expressions.evaluate import number_of, shape_of
from optimstate.plan.slots.outcomes import flat_slots, slot_name
from optimstate.problems import Problem
from optimstate.state.algorithms.bitsandbytes import TABLES
from optimstate.state.algorithms.registry import conventional, named, recognise_state
from optimstate.state.algorithms.slots import Algorithm

__all__ = ["report", "resume_problems", "verify_resume"]

Check = Literal["slots", "coverage", "zeros", "steps", "lr", "dtypes", "aliases", "shapes"]
CHECKS: tuple[Check, ...] = ("slots", "coverage", "zeros", "steps", "lr", "dtypes", "aliases", "shapes")


class _VerifyResume(LoadHook):
    """See `verify_resume`."""

    problems: tuple[Problem, ...] = ()

    def __init__(self, otherwise: Literal["raise", "warn"], skip: Sequence[Check], scheduler: Any) -> None:
        self._otherwise, self._skip, self._scheduler = otherwise, tuple(skip), scheduler
        self._before: WeakKeyDictionary[torch.optim.Optimizer, tuple[Any, Any, list[Any]]] = WeakKeyDictionary()

    def finish(self, optimizer: torch.optim.Optimizer, made: dict[str, Any]) -> None:
        lrs = [group.get("lr") for group in made["param_groups"]]
        self._before[optimizer] = optimizer.state, optimizer.param_groups, lrs

    def __call__(
        self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """With a dict, what every load hook does; without, verify.

        Raises:
            StateMismatchError: Something is wrong with the state; if this is also a pre-hook, the optimizer has its
                state of before.
        """
        if state_dict is not None:
            return super().__call__(optimizer, state_dict)
        before = self._before.pop(optimizer, None)
        lrs = before[2] if before is not None else None
        self.problems = tuple(resume_problems(optimizer, lrs=lrs, scheduler=self._scheduler, skip=self._skip))
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info(f"verify_resume: {len(self.problems) or 'no'} problem{'s' * (len(self.problems) != 1)}")
        if self.problems and self._otherwise == "raise":
            if before is not None:
                optimizer.state, optimizer.param_groups = before[0], before[1]
            raise StateMismatchError("\n".join(map(str, self.problems)), problems=self.problems)
        for problem in self.problems:
            warnings.warn(str(problem), OptimStateWarning, stacklevel=3)
        return None

    def __str__(self) -> str:
        return "verify_resume"


def verify_resume(
    otherwise: Literal["raise", "warn"] = "raise", *, skip: Sequence[Check] = (), scheduler: Any = None
) -> _VerifyResume:
    """Check what was loaded: `optimizer.register_load_state_dict_post_hook(hooks.verify_resume())`.

    What is looked at: `slots` (state that is not that of the optimizer's class), `coverage` (trainable parameters
    without state beside others that have some), `zeros` (moments that are all zero after steps were made), `steps`
    (parameters with different step counts), `lr` (another learning rate than the loaded one, or than the scheduler's
    last), `dtypes` (a slot on another device than its parameter, or elementwise in another floating dtype), `aliases`
    (slots that share memory and would be updated twice), `shapes` (an elementwise slot of another shape than its
    parameter).

    Register the same object also as a load pre-hook, and a failure gives the optimizer back the state it had before.

    Args:
        otherwise: `raise` or `warn` (an OptimStateWarning for each problem).
        skip: What is not looked at.
        scheduler: The optimizer's, already loaded.

    Example:
        `optimizer.register_load_state_dict_post_hook(hooks.verify_resume("warn"))`
    """
    UsageError.refuse_other("otherwise", otherwise, ("raise", "warn"))
    _refuse_unknown(skip)
    return _VerifyResume(otherwise, skip, scheduler)


def _refuse_unknown(skip: Sequence[Check]) -> None:
    for check in skip:
        UsageError.refuse_other("skip", check, get_args(Check))


def resume_problems(
    optimizer: torch.optim.Optimizer,
    *,
    lrs: Sequence[Any] | None = None,
    scheduler: Any = None,
    skip: Sequence[Check] = (),
) -> list[Problem]:
    """What is wrong with the state of an optimizer that was resumed; see `verify_resume`.

    Args:
        optimizer: As loaded.
        lrs: The learning rates it should have, group by group.
        scheduler: Its scheduler, as loaded.
        skip: What is not looked at.

    Example:
        `hooks.resume_problems(optimizer)`
    """
    _refuse_unknown(skip)
    checks: Mapping[Check, Callable[[], Iterator[Problem]]] = {
        "slots": lambda: _foreign(optimizer),
        "coverage": lambda: _uncovered(optimizer),
        "zeros": lambda: _zeros(optimizer),
        "steps": lambda: _steps(optimizer),
        "lr": lambda: _learning_rates(optimizer, lrs, scheduler),
        "dtypes": lambda: _dtypes(optimizer),
        "aliases": lambda: _aliases(optimizer),
        "shapes": lambda: _shapes(optimizer),
    }
    return [problem for check in CHECKS if check not in skip for problem in checks[check]()]


def _algorithm(optimizer: torch.optim.Optimizer) -> Algorithm | None:
    slots = (found for found in optimizer.state.values() if isinstance(found, dict))
    return recognise_state(slots, optimizer.param_groups[0])


def _members(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor, Mapping[Any, Any]]]:
    """Name (or place), parameter and slots of every parameter."""
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"parameter {n} of group {number}" for n in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            yield name, parameter, optimizer.state.get(parameter, {})


def _elementwise(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor, str, torch.Tensor, int | None]]:
    """Name, parameter, slot name, slot and gradient degree of every slot that has its parameter's shape by meaning."""
    algorithm = _algorithm(optimizer)
    for name, parameter, slots in _members(optimizer):
        for path, value in flat_slots(slots):
            if not torch.is_tensor(value) or shape_of(value) is None:
                continue
            last = str(path[-1])
            slot = algorithm.slot(last) if algorithm is not None else None
            slot = slot or conventional(last, tuple(value.shape), tuple(value.shape))
            if slot is not None and slot.is_elementwise and value.is_floating_point():
                yield name, parameter, slot_name(path), value, slot.degree


def _foreign(optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    """State of another algorithm than the class of the optimizer."""
    live = algorithm_name(optimizer)
    known = named(live)
    if known is None:
        return
    found: dict[str, list[str]] = {}
    for name, _, slots in _members(optimizer):
        if difference := foreign_slots(known, {str(path[-1]) for path, _ in flat_slots(slots)}):
            found.setdefault(difference, []).append(name)
    for difference, names in found.items():
        remedy = f'convert the state (optimizer = "{live}" in a plan), or start without'
        yield Problem("algorithm", f"the state of {_some(names)} {difference}", names=tuple(names), remedy=remedy)


def _uncovered(optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    algorithm = _algorithm(optimizer)
    members = list(_members(optimizer))
    having = sum(bool(slots) for _, _, slots in members)
    if not having or (algorithm is not None and algorithm.is_flat):
        return
    bare = [name for name, parameter, slots in members if parameter.requires_grad and not slots]
    if bare:
        message = f"{_some(bare)} without state, while {having} others have some: they start without state beside them"
        yield Problem("coverage", message, names=tuple(bare), remedy="if that is meant, skip coverage")


def _zeros(optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    steps = {name: number_of(slots.get("step")) for name, _, slots in _members(optimizer)}
    found = [
        f"{name}.{slot}"
        for name, _, slot, value, degree in _elementwise(optimizer)
        if degree and steps[name] and value.numel() and not value.is_meta and not value.any()
    ]
    if found:
        yield Problem("zeros", f"all zero, though steps were made: {_some(found)}", names=tuple(found))


def _steps(optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    steps = {name: number_of(slots["step"]) for name, _, slots in _members(optimizer) if "step" in slots}
    counts = Counter(steps.values())
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [f"{name} at {step:g}" for name, step in steps.items() if step != usual]
        yield Problem("steps", f"step counts differ: {_some(odd)}, the others at {usual:g}")


def _learning_rates(optimizer: torch.optim.Optimizer, lrs: Sequence[Any] | None, scheduler: Any) -> Iterator[Problem]:
    now = [number_of(group.get("lr")) for group in optimizer.param_groups]
    sides: list[tuple[str, list[Any]]] = []
    if lrs is not None:
        sides.append(("was to be loaded", [number_of(lr) for lr in lrs]))
    last = getattr(scheduler, "get_last_lr", None)  # schedulers of other libraries may lack it
    if callable(last):
        sides.append(("is what the scheduler set last", [number_of(lr) for lr in last()]))
    for origin, wanted in sides:
        if len(wanted) != len(now):
            yield Problem("lr", f"{len(now)} param groups, but {len(wanted)} learning rates: {wanted} {origin}")
            continue
        for number, (have, want) in enumerate(zip(now, wanted, strict=True)):
            if have != want:
                yield Problem("lr", f"the learning rate of param group {number} is {have}, but {want} {origin}")


def _dtypes(optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    for name, parameter, slot, value, _ in _elementwise(optimizer):
        if value.device != parameter.device:
            message = f"{name}.{slot} is on {value.device}, its parameter on {parameter.device}"
            yield Problem("dtypes", message, names=(name,))
        elif value.dtype != parameter.dtype:
            message = f"{name}.{slot} is {value.dtype}, its parameter {parameter.dtype}"
            yield Problem("dtypes", message, names=(name,))


def _aliases(optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    owners: dict[Any, str] = {}
    for name, parameter, slots in _members(optimizer):
        values = [("the parameter", parameter), *((slot_name(path), value) for path, value in flat_slots(slots))]
        for slot, value in values:
            if not torch.is_tensor(value) or shape_of(value) is None or not value.numel() or slot in TABLES:
                continue
            start = value.data_ptr()
            other = owners.setdefault((value.device, start), f"{name}.{slot}")
            if other != f"{name}.{slot}":
                message = f"{other} and {name}.{slot} share memory: each step would update it twice"
                yield Problem("aliases", message, names=(name,))


def _shapes(optimizer: torch.optim.Optimizer) -> Iterator[Problem]:
    for name, parameter, slot, value, _ in _elementwise(optimizer):
        if value.shape != parameter.shape:
            message = f"{name}.{slot} has shape {list(value.shape)}, its parameter {list(parameter.shape)}"
            yield Problem("shapes", message, names=(name,))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


class _Report:
    """See `report`."""

    report: str | None = None

    def __init__(self, write: Callable[[str], object] | None) -> None:
        self._write = write

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        """Describe what the optimizer has."""
        lines = []
        for number, group in enumerate(optimizer.param_groups):
            found = [optimizer.state.get(parameter) or {} for parameter in group["params"]]
            slots = Counter(str(slot) for held in found for slot in held)
            steps = sorted({number_of(held["step"]) for held in found if "step" in held})
            listed = ", ".join(f"{slot} {count}" for slot, count in slots.items()) or "no state"
            at = f", step {steps[0]:g}" + (f" to {steps[-1]:g}" if len(steps) > 1 else "") if steps else ""
            lr = f", lr {number_of(group['lr']):g}" if number_of(group.get("lr")) is not None else ""
            lines.append(f"group {number}: {len(found)} parameters{lr}{at}; {listed}")
        self.report = "\n".join(lines)
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info("report: %s", " | ".join(lines))
        if self._write is not None:
            self._write(self.report)

    def __repr__(self) -> str:
        return "report"


def report(write: Callable[[str], object] | None = None) -> _Report:
    """Describe each group after every load: `optimizer.register_load_state_dict_post_hook(hooks.report(print))`.

    Args:
        write: Gets the text, one line a group; without, it is only logged and kept as `report`.

    Example:
        `optimizer.register_load_state_dict_post_hook(hooks.report(print))`
    """
    return _Report(write)
