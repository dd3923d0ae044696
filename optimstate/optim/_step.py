"""One optimizer step: gather, choose an implementation, prepare gradients and hand them to the algorithm's rule.

    param group ──gather──▶ parameters, gradients, one column per slot
                                  │
          ┌───────────────┬───────┴────────┐
       for loop        foreach           fused          chosen as torch chooses
     (cache blocks)       │                │
          └──── rule ─────┘             kernel

What all algorithms share is done here, once: counting steps, maximize, weight decay, complex views, grouping by device
and dtype, and checks. A `Rule` is the rest: which numbers a step needs, and how they change the tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from inspect import signature
from itertools import chain, repeat
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import optimizer as torch_machinery

from optimstate.optim._blocks import Program, UnrecordedError, block_size, split
from optimstate.optim._load import Slots
from optimstate.optim._ops import Ops, many, one, traced
from optimstate.optim.optimizer import Optimizer, Options, ParamsT, aligned, evaluated, to_scalar, zeros
from optimstate.record import Record, field

__all__ = [
    "Columns",
    "Complex",
    "Condition",
    "Group",
    "Rule",
    "RuleOptimizer",
    "Setting",
    "Traits",
    "effective",
    "fused_batches",
    "has_l2",
    "repeats",
    "rows_of",
    "run_fused",
    "shrinking",
]

Group = dict[str, Any]
Columns = Mapping[str, list[Any]]
Condition = Callable[[Group], bool]

# The options that this module implements for every algorithm, with their defaults.
COMMON: Options = {
    "foreach": None,
    "maximize": False,
    "differentiable": False,
    "capturable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}

# The options of a group that this module reads. `fused` is not one: where the kernel is ours, groups may lack it.
DRIVEN = ("weight_decay", "amsgrad", *(name for name in COMMON if name != "fused"))


class Complex(Enum):
    """When complex tensors are viewed as real ones with a last dimension of 2, for rules that take real tensors."""

    AFTER_DECAY = "L2 decay is added to the complex gradient"
    BEFORE_DECAY = "L2 decay is added to the real gradient"
    NATIVE = "never: the rule takes complex numbers"


class Traits(Record):
    """The properties of an algorithm, besides its rule, on which a step depends.

    Args:
        options: The common options that its param groups have, in the order in which torch adds them to old groups.
        optional: Slots that only some param groups keep, each with the condition on a group's options.
        kernel: Whether there is a fused implementation.
        sparse_error: The error message for sparse gradients; empty if the rule takes them.
        complex: When complex tensors are viewed as real ones.
        complex_parameter: Whether the rule of the for loop takes the parameter complex nevertheless.
        blocks: Whether the rule makes enough passes over memory to gain from cache blocks.
        live_when_differentiable: Whether the step count stays a tensor for autograd.
        capturable_subjects: What must be on an accelerator if ``capturable``, in torch's words: for loop, foreach.
        capturable_on_xla: Whether XLA is such an accelerator: for loop, foreach.
    """

    options: tuple[str, ...] = ("foreach", "maximize", "differentiable", "capturable")
    optional: Mapping[str, Condition] = field(default_factory=dict)
    kernel: bool = False
    sparse_error: str = ""
    complex: Complex = Complex.AFTER_DECAY
    complex_parameter: bool = False
    blocks: bool = True
    live_when_differentiable: bool = False
    capturable_subjects: tuple[str, str] = ("params and state_steps", "params and state_steps")
    capturable_on_xla: tuple[bool, bool] = (True, False)


class Rule(NamedTuple):
    """One algorithm's arithmetic with its hyperparameters bound.

    Args:
        update: Called with the parameter, its gradient, the tensor slots in the order of the class's `_columns` (None
            for a slot that the options do not use; no slots at all if they use none) and the numbers.
        numbers: Called with the step count and the other scalar slots, in the order of `_columns`; returns the numbers.
            None if the rule needs no numbers.
        rowwise: Whether `numbers` takes the scalars of one tensor; else, in the list backend, it takes whole columns.
    """

    update: Callable[..., Any]
    numbers: Callable[..., Sequence[Any]] | None = None
    rowwise: bool = True


class Setting(NamedTuple):
    """What a rule is built for. A NamedTuple, because `torch.compile` traces its construction.

    Args:
        k: The backend.
        group: The param group's options.
        lr: The learning rate, a number or a 0-d tensor.
        live: Whether step counts stay tensors, because a graph is captured or traced.
        owned: Whether the gradients are temporaries that may be overwritten (list backend only).
    """

    k: Ops
    group: Group
    lr: Any
    live: bool
    owned: bool

    @classmethod
    def of(cls, k: Ops, group: Group, *, live: bool = False, owned: bool = False) -> Self:
        """The setting with the learning rate of a param group."""
        return cls(k, group, to_scalar(group.get("lr")), live, owned)


class RuleOptimizer(Optimizer):
    """An optimizer whose step is a rule over each parameter's tensors.

    Subclasses define the slots (`_columns`, `_scalars`), the `_traits` and the `_rule`. `_columns` has the order in
    which `_init_group` of torch's class fills its lists, because `torch.compile` relies on it. Every group gets the
    common options that the algorithm has (see `Traits`), whether the constructor names them or not.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dicts of either with options of their own.
        defaults: The algorithm's own options.
        common: Common options; those not given are off.

    Raises:
        TypeError: The algorithm has no such common option.
        RuntimeError: ``fused`` is given together with ``differentiable`` or ``foreach``.
    """

    _columns: ClassVar[tuple[str, ...]] = ()
    _traits: ClassVar[Traits] = Traits()
    _foreign_options: ClassVar[tuple[str, ...]] = ()  # of DRIVEN, those that the algorithm does not have

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Checkpoints of a torch older than an option lack it.
        cls._later_options = {name: COMMON[name] for name in cls._traits.options} | {**cls._later_options}
        own = {name for base in cls.__mro__ if issubclass(base, RuleOptimizer) for name in signature(base).parameters}
        cls._foreign_options = tuple(name for name in DRIVEN if name not in own and name not in cls._traits.options)

    def __init__(self, params: ParamsT, defaults: Options, **common: Any) -> None:
        known = self._traits.options
        # `fused` is an option of every group only where torch's class has it; else groups have it if it is given.
        allowed = {*known, "fused"} if self._traits.kernel else {*known}
        if unknown := sorted(common.keys() - allowed):
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}")
        given = {name: value for name, value in common.items() if name in known or value is not None}
        missing = {name: COMMON[name] for name in known if name not in given and name not in defaults}
        super().__init__(params, {**defaults, **given, **missing})
        if common.get("fused"):
            if common.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            if common.get("foreach"):
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if common.get("fused") and "fused" in known:
            self._step_supports_amp_scaling = True
            self._need_device_dtype_check_for_fused = True

    def _rule(self, s: Setting) -> Rule:
        """The algorithm's update rule."""
        raise NotImplementedError

    def _new_state(self, p: Tensor, group: Group) -> dict[str, Any]:
        """A parameter's state before its first step: zeros."""
        slots = self._active(group)
        scalars = {name: self._scalar(0.0, p, group) for name in self._scalars}
        return scalars | {name: zeros(p) for name in slots if name not in scalars}

    def _fused(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> bool:
        """Run the fused kernel; False if it does not apply and the rule must be run instead."""
        raise NotImplementedError

    def _active(self, group: Group) -> list[str]:
        """The slots that a group with these options keeps, in the order of `_columns`."""
        optional = self._traits.optional
        return [name for name in self._columns if name not in optional or optional[name](group)]

    def _slot_shapes(self, p: Tensor, group: Group) -> Slots:
        return {name: None if name in self._scalars else tuple(p.shape) for name in self._active(group)}, {}

    @torch_machinery._use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss; optional.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A gradient is sparse and the algorithm has no rule for it, or an option does not fit.
        """
        self._accelerator_graph_capture_health_check()
        loss = evaluated(closure)
        for param_group in self.param_groups:
            group = self._without_foreign_options(param_group)
            params: list[Tensor] = []
            grads: list[Tensor] = []
            lists: list[list[Any]] = [[] for _ in self._columns]
            has_sparse, has_complex = self._init_group(group, params, grads, *lists)
            if params:
                columns = dict(zip(self._columns, lists, strict=True))
                self._step_group(group, params, grads, columns, has_sparse=has_sparse, has_complex=has_complex)
        return loss

    def _without_foreign_options(self, group: Group) -> Group:
        """A group without options that other algorithms have and this one does not, because torch ignores them.

        Trainers, for example, put `weight_decay` into the groups of every optimizer.
        """
        names = self._foreign_options
        if torch.compiler.is_compiling():  # the compiler itself adds `capturable` to every group
            names = tuple(name for name in names if name != "capturable")
        foreign = [name for name in names if name in group]
        return {name: value for name, value in group.items() if name not in foreign} if foreign else group

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], *lists: list[Any]
    ) -> tuple[bool, bool]:
        """Fill the lists from the parameters with gradients, and create the state of those that have none."""
        has_sparse = has_complex = False
        states = []
        every_state = self.state
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            params.append(p)
            if grad.is_sparse:
                if self._traits.sparse_error:
                    raise RuntimeError(self._traits.sparse_error)
                has_sparse = True
            grads.append(grad)
            if p.is_complex():
                has_complex = True
            state = every_state[p]
            if not state:
                state.update(self._new_state(p, group))
            states.append(state)
        active = self._active(group)
        for name, column in zip(self._columns, lists, strict=True):
            if name in active:
                column.extend([state[name] for state in states])
        return has_sparse, has_complex

    def _step_group(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        columns: Columns,
        *,
        has_sparse: bool,
        has_complex: bool,
    ) -> None:
        fused, foreach = choose(group, params, has_kernel=self._traits.kernel)
        if fused:
            if self._by_kernel(group, params, grads, columns):
                return
            _, foreach = choose(group, params, has_kernel=False)
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise AssertionError("Expected grad_scale and found_inf to be None")
        if foreach and group.get("differentiable"):
            raise AssertionError("_foreach ops don't support autograd")
        if group.get("capturable") and not torch.compiler.is_compiling():
            self._check_capturable(params, columns, foreach)
        if not foreach:
            for some_params, some_grads, some_columns in in_turn(group, params, grads, columns):
                self._run_each(group, some_params, some_grads, some_columns, has_complex)
            return
        names = [name for name in self._columns if columns[name]]
        for _, (batch_params, batch_grads, *lists) in batches(
            self, [params, grads, *(columns[name] for name in names)]
        ):
            batch: Columns = {name: [] for name in self._columns} | dict(zip(names, lists, strict=True))
            if has_sparse and any(grad.is_sparse for grad in batch_grads):
                self._run_each(group, batch_params, batch_grads, batch, has_complex)
            else:
                self._run_lists(group, batch_params, batch_grads, batch, has_complex)

    @_disable_dynamo  # as torch does: the compiler cannot functionalize kernels on lists of tensors
    def _by_kernel(self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns) -> bool:
        """Run the fused kernel on state with its parameters' strides; False if the rule must be run instead."""
        self._align(group, params, columns)
        return self._fused(group, params, grads, columns)

    def _align(self, group: Group, params: list[Tensor], columns: Columns) -> None:
        """Give state tensors the strides of their parameters, unless they are those of the last call."""
        tensors = [columns[name] for name in self._columns if name not in self._scalars]
        seen = self.__dict__.setdefault("_aligned", {})
        now = list(chain(*tensors))
        before = seen.get(id(group), ())
        if len(now) == len(before) and all(map(operator.is_, now, before)):
            return
        for name, column in columns.items():
            if column and name not in self._scalars:
                for index, (p, value) in enumerate(zip(params, column, strict=True)):
                    own = None if value is None else aligned(value, p)
                    if own is not value:
                        column[index] = self.state[p][name] = own
        seen[id(group)] = list(chain(*tensors))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.pop("_aligned", None)  # so that replaced state can be freed
        super().__setstate__(state)

    def _slots(self, columns: Columns, absent: Any) -> list[Any]:
        names = [name for name in self._columns if name not in self._scalars]
        return [columns[name] or absent for name in names] if any(columns[name] for name in names) else []

    def _check_capturable(self, params: list[Tensor], columns: Columns, foreach: bool) -> None:
        supported = torch_machinery._get_capturable_supported_devices(
            supports_xla=self._traits.capturable_on_xla[foreach]
        )
        scalars = [columns[name] for name in self._scalars]
        if all(
            p.device.type in supported and all(row.device.type == p.device.type for row in rows)
            for p, *rows in zip(params, *scalars, strict=True)
        ):
            return
        subjects = self._traits.capturable_subjects[foreach]
        raise AssertionError(f"If capturable=True, {subjects} must be on supported devices: {supported}.")

    def _prepared(self, k: Ops, group: Group, columns: Columns, *, owned: bool) -> tuple[Rule, Sequence[Any]]:
        """Count the step; return the rule and, as columns, the numbers that it needs."""
        live = self._live(group)
        rule = self._rule(Setting.of(k, group, live=live, owned=owned))
        steps = columns.get("step", [])
        count_steps(steps)
        if rule.numbers is None:
            return rule, ()
        if not steps:
            raise TypeError(f"{type(self).__name__}: a rule with numbers needs the slot 'step' in `_columns`")
        times = steps if live else [step.item() for step in steps]
        others = [columns[name] for name in self._scalars if name != "step"]
        if k.is_list and (live or not rule.rowwise):
            return rule, rule.numbers(steps, *others)
        if others or live:
            rows = list(map(rule.numbers, times, *others))
        else:
            known: dict[float, Sequence[Any]] = {}
            rows = [known[t] if t in known else known.setdefault(t, rule.numbers(t)) for t in times]
        return rule, [list(column) for column in zip(*rows, strict=True)]

    def _live(self, group: Group) -> bool:
        """Whether step counts stay tensors."""
        traced_step = self._traits.live_when_differentiable and group.get("differentiable")
        return bool(group.get("capturable") or traced_step or torch.compiler.is_compiling())

    def _run_lists(
        self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns, has_complex: bool
    ) -> None:
        """Run the rule on all tensors of one device and dtype at once."""
        slots = self._slots(columns, None)
        if has_complex and self._traits.complex is not Complex.NATIVE:
            params, grads, *slots = ([real(t) for t in c] if c else None for c in (params, grads, *slots))  # type: ignore[assignment]
        owned = bool(group["maximize"] or has_l2(group))
        rule, numbers = self._prepared(many, group, columns, owned=owned)
        grads = effective(many, group, params, grads)
        rule.update(params, grads, *slots, *numbers)

    def _run_each(
        self, group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns, has_complex: bool
    ) -> None:
        """Run the rule on one tensor after the other, on large ones in cache blocks."""
        differentiable = group.get("differentiable", False)
        factor = shrinking(group)  # before the numbers, for the order in which autograd adds up gradients of `lr`
        rule, numbers = self._prepared(traced if differentiable else one, group, columns, owned=False)
        slots = self._slots(columns, repeat(None))
        plain = not (differentiable or has_complex or torch.compiler.is_compiling())
        size = block_size(params, len(slots)) if plain and self._traits.blocks else None
        if size is None:
            self._run_column(rule.update, group, params, grads, slots, numbers, factor, has_complex=has_complex)
            return
        for p, g, *rest in zip(params, grads, *slots, *numbers, strict=False):
            tensors, own_numbers = rest[: len(slots)], [repeat(number) for number in rest[len(slots) :]]
            fresh = any(t is None and isinstance(c, list) for t, c in zip(tensors, slots, strict=True))
            if fresh or not self._run_blocks(group, [p, g, *tensors], rest[len(slots) :], size):
                whole: list[Any] = [[t] for t in tensors]
                self._run_column(rule.update, group, [p], [g], whole, own_numbers, factor, has_complex=has_complex)

    def _run_blocks(self, group: Group, tensors: list[Tensor | None], numbers: Sequence[Any], size: int) -> bool:
        """Run the rule on one parameter's tensors block by block; False if it must be updated as a whole."""
        columns = split(tensors, size)
        if columns is None or isinstance(group.get("weight_decay"), Tensor):
            return False
        program = Program(columns[0][0].dtype, len(columns))
        p, g, *slots = [None if t is None else program.operand(index) for index, t in enumerate(tensors)]
        rule = self._rule(Setting.of(program.ops, group, live=self._live(group)))
        try:
            rule.update(p, effective(program.ops, group, p, g), *slots, *numbers)
        except UnrecordedError:
            return False
        program.run(columns, size)
        return True

    def _run_column(
        self,
        update: Callable[..., Any],
        group: Group,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        slots: Sequence[Iterable[Any]],
        numbers: Sequence[Iterable[Any]],
        factor: Any,
        *,
        has_complex: bool,
    ) -> None:
        """Run the rule on each row. Gradients are prepared lazily: only one tensor's temporaries exist at a time."""
        p_values: Iterable[Tensor] = params
        g_values: Iterable[Tensor] = grads
        decay = group.get("weight_decay", 0)
        views = has_complex and self._traits.complex is not Complex.NATIVE
        if group["maximize"]:
            g_values = map(Tensor.neg, g_values)
        if views and self._traits.complex is Complex.BEFORE_DECAY:
            p_values, g_values = list(map(real, params)), map(real, g_values)
        if factor is not None:
            p_values = map(Tensor.mul_, p_values, repeat(factor))
        elif decay != 0:
            g_values = map(l2(decay), g_values, p_values)
        if views:
            if not self._traits.complex_parameter:
                p_values = map(real, p_values)
            g_values = map(real, g_values)
            slots = [map(real, column) for column in slots]
        for _ in map(update, p_values, g_values, *slots, *numbers):
            pass


def choose(group: Group, params: list[Tensor], *, has_kernel: bool) -> tuple[bool, bool]:
    """(fused, foreach) as the group says; else, as torch does, foreach if all devices have native kernels for it."""
    fused, foreach = group.get("fused") if has_kernel else None, group.get("foreach")
    if fused is None and foreach is None:
        _, foreach = torch_machinery._default_to_fused_or_foreach(params, group.get("differentiable", False), False)
        if foreach and isinstance(group.get("lr"), Tensor) and "amsgrad" in group and not group["capturable"]:
            foreach = False
    return bool(fused), bool(foreach)


def repeats(params: list[Tensor]) -> bool:
    """Whether a parameter is listed twice, as tied ones may be."""
    return len(set(map(id, params))) < len(params)


def in_turn(
    group: Group, params: list[Tensor], grads: list[Tensor], columns: Columns
) -> Iterable[tuple[list[Tensor], list[Tensor], Columns]]:
    """The lists as they are, or one row at a time where the order of operations matters.

    It matters if a parameter is listed twice, because its step count changes in between, and for autograd, which adds
    up gradients in the order in which the graph was built.
    """
    if torch.compiler.is_compiling() or not (group.get("differentiable") or repeats(params)):
        return [(params, grads, columns)]
    return [rows_of(params, grads, columns, [index]) for index in range(len(params))]


def rows_of(
    params: list[Tensor], grads: list[Tensor], columns: Columns, indices: Iterable[int]
) -> tuple[list[Tensor], list[Tensor], Columns]:
    """The lists with these rows only; columns that the options do not use stay empty."""
    some = {name: [column[i] for i in indices] if column else [] for name, column in columns.items()}
    return [params[i] for i in indices], [grads[i] for i in indices], some


def count_steps(steps: list[Tensor]) -> None:
    """Add one to every step count, in one call."""
    if not steps:
        return
    if torch.compiler.is_compiling() or not steps[0].is_cpu or not all(s.is_floating_point() for s in steps):
        torch._foreach_add_(steps, 1)
    else:
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)


def real(t: Any) -> Any:
    """A complex tensor as real numbers with a last dimension of 2; anything else as it is."""
    return torch.view_as_real(t) if t is not None and t.is_complex() else t


def has_l2(group: Group) -> bool:
    """Whether weight decay is added to the gradient (L2), not applied to the parameter directly (decoupled)."""
    return bool(group.get("weight_decay", 0) != 0 and not group.get("decoupled_weight_decay", False))


def effective(k: Ops, group: Group, p: Any, g: Any) -> Any:
    """The gradient after maximize and L2 decay; the same object if there is neither.

    Decoupled weight decay is applied to the parameter.
    """
    decay = group.get("weight_decay", 0)
    if group["maximize"]:
        g = k.neg(g)
    if has_l2(group):
        # In place only where torch does so too: in place, list kernels round alpha to the tensors' dtype.
        return (k.add_ if group["maximize"] else k.add)(g, p, alpha=decay)
    factor = shrinking(group)
    if factor is not None:
        k.mul_(p, factor)
    return g


def shrinking(group: Group) -> Any:
    """The factor by which decoupled weight decay shrinks parameters; None without it."""
    decay = group.get("weight_decay", 0)
    return 1 - to_scalar(group["lr"]) * decay if decay != 0 and group.get("decoupled_weight_decay", False) else None


def l2(decay: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that adds `decay * p` to a gradient."""
    if isinstance(decay, Tensor) and decay.requires_grad:
        return lambda g, p: g.addcmul_(p.clone(), decay)  # as torch does, so that the decay gets a gradient
    return partial(torch.add, alpha=decay)


def batches(optimizer: Optimizer, lists: list[list[Any]]) -> Iterator[tuple[Any, list[Any]]]:
    """The lists divided by device and dtype of the first list, each batch with its device."""
    for (device, _), (batch, _) in optimizer._group_tensors_by_device_and_dtype(lists).items():
        yield device, batch


def run_fused(
    kernel: Any,
    optimizer: Optimizer,
    group: Group,
    params: list[Tensor],
    grads: list[Tensor],
    lists: list[list[Any]],
    **options: Any,
) -> None:
    """Run one of torch's fused kernels that read step counts, which are the last of the lists.

    A step is not counted if AMP has found an infinity.
    """
    common = {name: group[name] for name in ("weight_decay", "eps", "maximize")}
    for batch, lr, scaling in fused_batches(optimizer, group, params, grads, lists):
        steps = batch[-1]
        torch._foreach_add_(steps, 1)
        kernel(*batch, lr=lr, **common, **options, **scaling)
        if scaling["found_inf"] is not None:
            torch._foreach_sub_(steps, [scaling["found_inf"]] * len(steps))


def fused_batches(
    optimizer: Optimizer, group: Group, params: list[Tensor], grads: list[Tensor], lists: list[list[Any]]
) -> Iterator[tuple[list[Any], Any, dict[str, Any]]]:
    """Batches of one device and dtype for a fused kernel: the lists, the learning rate and AMP's two tensors.

    AMP's tensors, and a learning rate that is a tensor on an accelerator, are copied to the batch's device. A learning
    rate on the CPU stays there: kernels read it as a number.
    """
    scaling = {name: getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")}
    lr = group["lr"]
    for device, batch in batches(optimizer, [params, grads, *lists]):
        on_device = {name: None if t is None else t.to(device, non_blocking=True) for name, t in scaling.items()}
        moved = isinstance(lr, Tensor) and lr.device.type != "cpu" and device is not None
        yield batch, lr.to(device, non_blocking=True) if moved else lr, on_device
