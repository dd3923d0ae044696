"""The base of every scheduler: torch's stepping, hooks, and warnings about what a state does not restore."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from optimstate.errors import SchedulerStateWarning, StateMismatchError
from optimstate.installed_torch import SchedulerBase
from optimstate.optim._load import caller_level

StateDict = dict[str, Any]
StateHook = Callable[["LRScheduler", StateDict], StateDict | None]
LoadedHook = Callable[["LRScheduler"], None]

# Keys that may be missing: states of older torch releases lack them, and the constructor sets them too.
_BOOKKEEPING = {
    "verbose",
    "_step_count",
    "_is_initial",
    "_get_lr_called_within_step",
    "_last_lr",
    "default_min_lr",
    "use_beta1",
}


@dataclass
class _Runtime:
    """The part of a live scheduler that is not in its state."""

    state_dict_post: OrderedDict[int, StateHook] = field(default_factory=OrderedDict)
    load_pre: OrderedDict[int, StateHook] = field(default_factory=OrderedDict)
    load_post: OrderedDict[int, LoadedHook] = field(default_factory=OrderedDict)
    warned: set[str] = field(default_factory=set)
    loaded: bool = False
    nested: bool = False


_ATTACHED: WeakKeyDictionary[Optimizer, WeakSet[LRScheduler]] = WeakKeyDictionary()


class LRScheduler(SchedulerBase):
    """Base of all schedulers: every `step()` sets the learning rate of every param group.

    A subclass defines `get_lr`, as with torch, or `_next_lrs`, which `get_lr` calls.

    Args:
        optimizer: The optimizer whose param groups are scheduled.
        last_epoch: Index of the last epoch seen; -1 starts anew and records each group's `lr` as its `initial_lr`.

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        KeyError: `last_epoch` is not -1 and a group has no `initial_lr`.
    """

    # A slot, because the attributes are the state: frameworks save and copy `vars(scheduler)`.
    __slots__ = ("_live",)
    _live: _Runtime

    # Attributes with one entry per param group; `optimstate.state.scheduler` rebuilds them when groups change.
    _per_group: ClassVar[tuple[str, ...]] = ("base_lrs", "_last_lr")

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        # Not super(): subclasses also inherit from torch's class of the same name, whose __init__ must not run.
        torch.optim.lr_scheduler.LRScheduler.__init__(self, optimizer, last_epoch)
        attach(self)

    @property
    def _runtime(self) -> _Runtime:
        try:
            return self._live
        except AttributeError:
            self._live = _Runtime()
            return self._live

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__  # a copy starts without hooks, as an optimizer's does

    def get_lr(self) -> list[float | Tensor]:
        """The next learning rate of each param group, for `step()`. Use `get_last_lr()` for the current ones.

        Returns:
            One value per group, of the type of the group's `lr`; tensors are new ones.
        """
        defined = type(self)._next_lrs is not LRScheduler._next_lrs
        if defined and not self._get_lr_called_within_step:
            warnings.warn(
                "To get the last learning rate computed by the scheduler, please use `get_last_lr()`.",
                UserWarning,
                stacklevel=2,
            )
        return self._next_lrs()

    def _next_lrs(self) -> list[float | Tensor]:
        raise NotImplementedError

    def register_state_dict_post_hook(self, hook: StateHook, prepend: bool = False) -> RemovableHandle:
        """Call `hook(scheduler, state_dict)` at the end of every `state_dict()`.

        Args:
            hook: May change the state in place, or return another one, which is then used.
            prepend: Run before the hooks registered so far, not after them.

        Returns:
            A handle whose `remove()` unregisters the hook.
        """
        return _register(self._runtime.state_dict_post, hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: StateHook, prepend: bool = False) -> RemovableHandle:
        """Call `hook(scheduler, state_dict)` at the start of every `load_state_dict()`.

        Args:
            hook: Gets a shallow copy of the caller's state; may change it, or return another one, which is then used.
            prepend: Run before the hooks registered so far, not after them.

        Returns:
            A handle whose `remove()` unregisters the hook.
        """
        return _register(self._runtime.load_pre, hook, prepend)

    def register_load_state_dict_post_hook(self, hook: LoadedHook, prepend: bool = False) -> RemovableHandle:
        """Call `hook(scheduler)` at the end of every `load_state_dict()`.

        Args:
            hook: Gets the scheduler with its new state.
            prepend: Run before the hooks registered so far, not after them.

        Returns:
            A handle whose `remove()` unregisters the hook.
        """
        return _register(self._runtime.load_post, hook, prepend)

    def state_dict(self) -> StateDict:
        """The state in torch's form: every attribute but the optimizer and the hooks.

        Warns:
            SchedulerStateWarning: A part of the state cannot be saved; issued once for each scheduler.
        """
        state = self._export()
        for hook in list(self._runtime.state_dict_post.values()):
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state written by this class or by torch's class of the same name.

        The caller's dict is never changed, and the scheduler is unchanged if an error is raised.

        Args:
            state_dict: A state returned by `state_dict()`. Load the optimizer's state first.

        Raises:
            StateMismatchError: The state was written for another number of param groups or nested schedulers, or the
                optimizer's param groups lack options that this scheduler keeps in them.

        Warns:
            SchedulerStateWarning: The state cannot restore everything, or the optimizer has other learning rates.
        """
        state = dict(state_dict)
        for hook in list(self._runtime.load_pre.values()):
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        with _restored_on_error(self):
            self._check_groups(state)
            state = self._updated(state)
            self._check_keys(state)
            self._import(dict(state))
            self._check_group_options()
            if "_last_lr" in state:
                self._check_learning_rates()
        self._runtime.loaded = True
        for loaded_hook in list(self._runtime.load_post.values()):
            loaded_hook(self)

    def _export(self) -> StateDict:
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def _updated(self, state: StateDict) -> StateDict:
        """A state of an older torch in the form of today's."""
        return state

    def _import(self, state: StateDict) -> None:
        self.__dict__.update(state)

    def _functions(self) -> list[Callable[..., Any] | None]:
        """The callables whose attributes are part of the state."""
        return []

    def _group_options(self) -> set[str]:
        """The options that this scheduler keeps in the optimizer's param groups."""
        return set()

    def _warn_once(self, message: str) -> None:
        if message not in self._runtime.warned:
            self._runtime.warned.add(message)
            warn(message)

    def _check_groups(self, state: StateDict) -> None:
        """Compare every per-group list with the optimizer's groups."""
        groups = len(self.optimizer.param_groups)
        counts = {key: len(state[key]) for key in self._per_group if isinstance(state.get(key), (list, tuple))}
        if all(count == groups for count in counts.values()):
            return
        found = ", ".join(f"{key}: {count}" for key, count in counts.items())
        message = f"{type(self).__name__}: the state has another number of param groups ({found}) than the optimizer"
        hint = (
            "Rebuild the state for the new groups before loading it: "
            "optimstate.state.scheduler.regroup_scheduler_state(state, group_map)."
        )
        # A group that is added during a run gets an entry in _last_lr and in no other list.
        if counts.get("_last_lr") == groups:
            warn(f"{message} ({groups}): it was saved after groups had been added to the optimizer.\n{hint}")
            return
        raise StateMismatchError(f"{message} ({groups}).", hint=hint)

    def _check_group_options(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            if missing := sorted(self._group_options() - group.keys()):
                raise StateMismatchError(
                    f"{type(self).__name__}: param group {index} of the optimizer lacks {', '.join(missing)}, in which "
                    "this scheduler keeps its bounds.",
                    hint="Load the optimizer's state of the same checkpoint; new groups need these options too.",
                )

    def _check_keys(self, state: StateDict) -> None:
        """Warn about attributes that the state lacks, as when it was written by another class."""
        mine = vars(self).keys() - {"optimizer"}
        missing = sorted(mine - state.keys() - _BOOKKEEPING)
        if missing:
            foreign = sorted(state.keys() - mine - _BOOKKEEPING)
            also = f"; it has {', '.join(foreign)}, unknown to this class" if foreign else ""
            warn(
                f"{type(self).__name__}: the state lacks {', '.join(missing)}{also}. "
                "What it lacks stays as this scheduler was constructed."
            )

    def _check_learning_rates(self) -> None:
        """Warn if no scheduler of this optimizer agrees with the learning rates in its param groups.

        Each scheduler of an optimizer remembers the learning rates after its own last step. So this can be checked only
        when the last of them has been loaded, and never for nested schedulers.
        """
        if self._runtime.nested:
            return
        others = {other for other in _ATTACHED.get(self.optimizer, ()) if not other._runtime.nested} - {self}
        shown = group_values(self.optimizer, "lr")
        if not all(other._runtime.loaded for other in others):
            return
        if any(_agree(scheduler._last_lr, shown) for scheduler in (self, *others)):
            return
        differences = "; ".join(
            f"group {i}: {float(saved)} in the state, {float(live)} in the optimizer"
            for i, (saved, live) in enumerate(zip(self._last_lr, shown, strict=False))
            if not _agree([saved], [live])
        )
        warn(
            f"{type(self).__name__}: the loaded state and the optimizer disagree on the learning rate ({differences}). "
            "Load the optimizer's state of the same checkpoint, before the scheduler's."
        )


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError, with torch's message, for anything but a torch optimizer."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")


def attach(scheduler: LRScheduler) -> None:
    """Record that a scheduler belongs to its optimizer, without keeping either alive."""
    _ATTACHED.setdefault(scheduler.optimizer, WeakSet()).add(scheduler)


def group_values(optimizer: Optimizer, key: str) -> list[Any]:
    """`group[key]` of every param group; tensors are cloned."""
    return [value.clone() if isinstance(value, Tensor) else value for value in (g[key] for g in optimizer.param_groups)]


def set_group_value(group: dict[str, Any], key: str, value: float | Tensor) -> None:
    """Set `group[key]`; an existing tensor is filled in place, because compiled steps keep a reference to it."""
    held = group[key]
    if isinstance(held, Tensor):
        held.fill_(value.squeeze() if isinstance(value, Tensor) else value)
    else:
        group[key] = value


def per_group(name: str, optimizer: Optimizer, value: Any) -> list[Any]:
    """A list with one entry for each param group: the list `value`, or `value` for all; tensors are cloned.

    Raises:
        ValueError: `value` is a list or tuple of another length.
    """
    groups = len(optimizer.param_groups)
    if isinstance(value, (list, tuple)):
        if len(value) != groups:
            raise ValueError(
                f"{name} must have the same length as optimizer.param_groups. "
                f"{name} has {len(value)} values, param_groups has {groups}."
            )
    else:
        value = [value] * groups
    return [entry.clone() if isinstance(entry, Tensor) else entry for entry in value]


def warn(message: str) -> None:
    """Issue a SchedulerStateWarning that shows the line of the first caller outside this package."""
    warnings.warn(message, SchedulerStateWarning, stacklevel=caller_level({"optimstate"}))


def _agree(some: list[Any], others: list[Any]) -> bool:
    # Equal up to float32 rounding: a learning rate may be a float on one side and a tensor on the other.
    return len(some) == len(others) and all(
        math.isclose(float(a), float(b), rel_tol=1e-6) for a, b in zip(some, others, strict=True)
    )


def _register(hooks: OrderedDict[int, Any], hook: Callable[..., Any], prepend: bool) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    if prepend:
        hooks.move_to_end(handle.id, last=False)
    return handle


@contextmanager
def _restored_on_error(scheduler: LRScheduler) -> Iterator[None]:
    """If the body raises, restore the scheduler, its nested schedulers and their callables."""
    before = [(live, dict(live)) for live in _live_dicts(scheduler)]
    try:
        yield
    except BaseException:
        for live, saved in before:
            live.clear()
            live.update(saved)
        raise


def _live_dicts(scheduler: torch.optim.lr_scheduler.LRScheduler) -> Iterator[dict[str, Any]]:
    yield vars(scheduler)
    functions = scheduler._functions() if isinstance(scheduler, LRScheduler) else []
    for function in functions:
        attributes: Mapping[str, Any] = getattr(function, "__dict__", {})
        if isinstance(attributes, dict):
            yield attributes
    for nested in vars(scheduler).get("_schedulers", ()):
        yield from _live_dicts(nested)
