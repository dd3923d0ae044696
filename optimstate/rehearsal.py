"""Rehearse a resume: the old run and the new one side by side, before a night is spent on it.

The old run's state is loaded into the new one under the plan, and both make the same few steps. What a resume must keep
is compared: the function (loss and outputs before any step), the gradients under the plan, and after each step the
parameters and slots, those of the old run carried over by the plan. So a swapped pair of equal shape, lost state or a
scale without its degree is told from state that can only be approximated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Guard
from optimstate.plan.solve.planner import plan_model, plan_optimizer
from optimstate.record import Record
from optimstate.reporting import Report, to_json
from optimstate.resuming import resume
from optimstate.state.optimizer import OptimizerState

if TYPE_CHECKING:
    from optimstate.plan.solve.migration import SectionMoves

__all__ = ["Deviation", "Rehearsal", "rehearse"]

Verdict = Literal["exact", "approximate", "wrong state", "another function"]
Tensors = dict[str, Any]


class Deviation(Record):
    """Where the new run is not what the plan makes of the old one.

    Attributes:
        what: `output`, `gradient`, `slot` or `parameter`.
        name: The parameter of the new model; of a module for an output.
        slot: The slot; empty for anything else.
        step: After how many steps; 0 is before the first.
        size: The largest difference, over the largest value; infinite where one side has nothing.
        announced: Whether the plan says that this parameter can only be approximated.
    """

    what: Literal["output", "gradient", "slot", "parameter"]
    name: str
    slot: str
    step: int
    size: float
    announced: bool

    def __str__(self) -> str:
        place = f"{self.name} {self.slot}".strip()
        when = "before the first step" if not self.step else f"after step {self.step}"
        size = "is missing" if self.size == float("inf") else f"differs by {self.size:.2g}"
        return f"{self.what} {place} {size} {when}"


class Rehearsal(Report):
    """What a rehearsal showed.

    Attributes:
        verdict: `exact`: the run goes on as it was, to rounding. `approximate`: it differs only where the plan says it
            must. `wrong state`: the function is kept, the state or the gradient's scale is not. `another function`:
            the new model computes something else.
        losses: Of the old and of the new run, before the first step and after each.
        deviations: In the order in which they showed; the first step at which something differs decides.
        tolerance: Relative differences up to this are rounding.
        notes: What the plan says of itself.
    """

    verdict: Verdict
    losses: tuple[tuple[float, float], ...]
    deviations: tuple[Deviation, ...]
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing differs that the plan does not announce."""
        return self.verdict in ("exact", "approximate")

    @property
    def decisive(self) -> tuple[Deviation, ...]:
        """The deviations that the verdict rests on, without those that follow from them."""
        first = min((deviation.step for deviation in self.deviations), default=0)
        early = [deviation for deviation in self.deviations if deviation.step == first]
        if self.verdict == "another function":
            early = [deviation for deviation in early if deviation.what == "output"]
        elif self.verdict == "wrong state":
            early = [deviation for deviation in early if not deviation.announced]
        return tuple(early)

    def __str__(self) -> str:
        lines = [_VERDICTS[self.verdict].format(tolerance=self.tolerance)]
        shown = self.decisive
        lines += [f"  {deviation}" for deviation in shown[:10]]
        if len(shown) > 10:
            lines.append(f"  and {len(shown) - 10} more")
        lines += [f"loss after {step} steps: {a:.9g} and {b:.9g}" for step, (a, b) in enumerate(self.losses)]
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        rows = [{**item._asdict(), "size": item.size if item.size < float("inf") else None} for item in self.deviations]
        fields = {**self._asdict(), "holds": self.holds, "deviations": rows}
        return to_json("rehearse", fields)


_VERDICTS = {
    "exact": "exact: the new run goes on as the old one does (differences up to {tolerance:.0e} are rounding)",
    "approximate": "approximate: the new run differs from the old one only where the plan says that it must",
    "wrong state": "wrong state: the new model computes the same, but its optimizer does not go on as the old one does",
    "another function": "another function: the new model does not compute what the old one does",
}


def rehearse(
    old: Callable[[], Any] | Any,
    new: Callable[[], Any] | Any,
    plan: Plan | str | PathLike[str] | None,
    batch: Any,
    loss: Callable[[Any, Any], Any],
    *,
    steps: int = 2,
    checkpoint: str | PathLike[str] | Mapping[str, Any] | None = None,
    load: Callable[[Mapping[str, Any], Any, Any], object] | None = None,
) -> Rehearsal:
    """Compare a run with its continuation in a changed model.

    Models are computed with in float64 where they can, so that what differs is not rounding; dropout is switched off.
    Neither run that is given is changed.

    Args:
        old: The old run, as `(model, optimizer)` or a function that builds it.
        new: The new run, likewise; nothing need be loaded.
        plan: What has changed, as a plan or the path of a plan file.
        batch: What `loss` takes; tensors may stand in dicts, lists and tuples.
        loss: Of a model and the batch; gives a scalar tensor, or that and the outputs to compare.
        steps: How many steps both make.
        checkpoint: What the old run is loaded from first; without, it is taken as it stands.
        load: How the new run is loaded, where it is not `optimstate.resume`: called with the old run's state
            (`model`, `optimizer`), the new model and the new optimizer.

    Raises:
        MigrationError: The plan does not fit.
        StateMismatchError: The checkpoint or the old run lacks a part.
    """
    given = Plan.of(plan) if plan is not None else Plan()
    for double in (True, False):
        before, after = _Run.of(old, double), _Run.of(new, double)
        if checkpoint is not None:
            resume(checkpoint, model=before.model, optimizer=before.optimizer)
        try:
            return _Comparison(before, after, given, batch, loss, double).run(steps, load)
        except RuntimeError as error:  # a constant or a kernel of another dtype
            if not double or ("dtype" not in str(error).lower() and "double" not in str(error).lower()):
                raise
    raise AssertionError("the second attempt returns or raises")


class _Run:
    """A model and its optimizer, copies of what was given."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    @classmethod
    def of(cls, given: Any, double: bool) -> _Run:
        from optimstate.installed_torch import torch

        model, optimizer = given() if callable(given) else copy.deepcopy(given)
        if double:
            state = optimizer.state_dict()
            model.double()
            optimizer.load_state_dict(state)  # slots take the dtype of their parameters
        for module in model.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return cls(model, optimizer)

    def state(self) -> dict[str, Any]:
        """The run's state, with names."""
        from optimstate.hooks import name_params

        made = copy.deepcopy(self.optimizer.state_dict())
        if not all("param_names" in group for group in made["param_groups"]):
            made = name_params(self.model)(self.optimizer, made)
        return {"model": copy.deepcopy(self.model.state_dict()), "optimizer": made}


class _Comparison:
    def __init__(self, old: _Run, new: _Run, plan: Plan, batch: Any, loss: Any, double: bool) -> None:
        self.old, self.new, self.plan, self.loss = old, new, plan, loss
        self.batch = _converted(batch) if double else batch
        self.tolerance = 1e-8 if double else 1e-3
        # Each section is planned by itself, so a rule may match nothing in one of them.
        self.lenient = plan._replace(guard=Guard()).with_policy(unused="ignore")
        self.deviations: list[Deviation] = []
        self.announced: set[str] = set()
        self.notes: list[str] = []

    def run(self, steps: int, load: Callable[[Mapping[str, Any], Any, Any], object] | None) -> Rehearsal:
        state = self.old.state()
        if load is None:
            resume(state, model=self.new.model, optimizer=self.new.optimizer, plan=self.plan)
        else:
            load(state, self.new.model, self.new.optimizer)
        self._announce(state)
        losses = []
        self._compare(0)
        for step in range(steps + 1):
            one, other = self._backward(self.old), self._backward(self.new)
            losses.append((float(one[0]), float(other[0])))
            if not step:
                self._function(one, other)
            if step < steps:
                if not step:
                    self._gradients()
                self.old.optimizer.step()
                self.new.optimizer.step()
                self._compare(step + 1)
        return Rehearsal(self._verdict(), tuple(losses), tuple(self.deviations), self.tolerance, tuple(self.notes))

    # --- what the plan says ----------------------------------------------------------------------------------------

    def _announce(self, state: Mapping[str, Any]) -> None:
        """Which parameters the plan can only approximate: new ones, copies, filled places, slots it drops."""
        weights, optimizer = self._sections(state)
        sources: dict[str, int] = {}
        for move in weights.moves:
            for name in move.sources:
                sources[name] = sources.get(name, 0) + 1
        for section in (weights, optimizer):
            for move in section.moves:
                slots = [outcome.level for outcome in move.slots.values()]
                value = move.value.level if move.value is not None else "exact"
                copied = any(sources.get(name, 0) > 1 for name in move.sources) and move.is_moved_whole
                if move.expression is None or copied or value != "exact" or any(item != "exact" for item in slots):
                    self.announced.add(move.target)
        known = {move.target for move in optimizer.moves}
        self.announced |= {name for name, _ in self.new.model.named_parameters() if name not in known}
        self.notes = list(dict.fromkeys([*weights.notes, *optimizer.notes]))

    def _sections(self, state: Mapping[str, Any]) -> tuple[SectionMoves, SectionMoves]:
        found = OptimizerState.from_node(state["optimizer"])
        shapes = {name: tuple(value.shape) for name, value in self.old.model.named_parameters()}
        return (
            plan_model(self.lenient, state["model"]).sections["model"],
            plan_optimizer(self.lenient, found, shapes=shapes).sections["optimizer"],
        )

    # --- comparing -------------------------------------------------------------------------------------------------

    def _backward(self, run: _Run) -> tuple[Any, Any, dict[str, Any]]:
        """The loss, the outputs that `loss` gave, and what each module gave, in the order of their calls."""
        from optimstate.installed_torch import torch

        torch.manual_seed(0)
        run.optimizer.zero_grad()
        with _outputs(run.model) as modules:
            made = self.loss(run.model, self.batch)
        value, outputs = made if isinstance(made, tuple) else (made, ())
        value.backward()
        return value.detach(), outputs, modules

    def _function(self, one: tuple[Any, Any, dict[str, Any]], other: tuple[Any, Any, dict[str, Any]]) -> None:
        pairs = [(other[0], one[0]), *zip(_flat(other[1]), _flat(one[1]), strict=False)]
        worst = max(_difference(mine, expected) for mine, expected in pairs)
        if worst <= self.tolerance:
            return
        for name in self._suspects(one[2], other[2]):
            self.deviations.append(Deviation("output", name, "", 0, worst, name in self.announced))

    def _suspects(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
        """Parameters of the first module whose output differs, and those before it that may be mistaken."""
        weights, _ = self._sections(self.old.state())
        origin: dict[str, set[str]] = {}
        whole: dict[str, bool] = {}
        for move in weights.moves:
            home = move.target.rpartition(".")[0]
            origin.setdefault(home, set()).update(name.rpartition(".")[0] for name in move.sources)
            whole[home] = whole.get(home, True) and move.is_moved_whole
        pending: list[str] = []
        renamed: list[str] = []
        for module, value in new.items():
            mine = [name for name, _ in self.new.model.named_parameters() if name.rpartition(".")[0] == module]
            if not mine:
                continue
            sources = origin.get(module, set())
            if len(sources) != 1 or not whole.get(module) or next(iter(sources)) not in old:
                pending += mine
            elif _difference(value, old[next(iter(sources))]) > self.tolerance:
                return pending or [*renamed, *mine]
            else:
                pending = []
                if next(iter(sources)).rpartition(".")[2] != module.rpartition(".")[2]:
                    renamed += mine  # equal by the plan, which may take one for another
        return pending or renamed or ["(the model)"]

    def _gradients(self) -> None:
        """The new gradients against the old ones, carried over as a first moment would be."""
        state = self.old.state()["optimizer"]
        grads = {name: p.grad for name, p in self.old.model.named_parameters() if p.grad is not None}
        keys = [
            (key, name)
            for group in state["param_groups"]
            for key, name in zip(group["params"], group["param_names"], strict=True)
        ]
        node = {
            "state": {key: {"momentum_buffer": grads[name]} for key, name in keys if name in grads},
            "param_groups": [
                {"lr": 0.0, "params": [key for key, _ in keys], "param_names": [name for _, name in keys]}
            ],
        }
        found = OptimizerState.from_node(node)
        plan = Plan(self.lenient.rules, self.lenient.stages, policy=self.lenient.policy)
        shapes = {name: tuple(value.shape) for name, value in self.old.model.named_parameters()}
        moved = execute_optimizer(plan_optimizer(plan, found, shapes=shapes).sections["optimizer"], found)
        expected = {name: slots["momentum_buffer"] for _, name, slots in moved.parameters() if slots and name}
        for name, parameter in self.new.model.named_parameters():
            if name in expected and parameter.grad is not None:
                self._record("gradient", name, "", 0, parameter.grad, expected[name])

    def _compare(self, step: int) -> None:
        """Parameters and slots of the new run against those of the old one, carried over."""
        state = self.old.state()
        weights, section = self._sections(state)
        expected = execute_model(weights, state["model"])
        for name, parameter in self.new.model.named_parameters():
            if name in expected:
                self._record("parameter", name, "", step, parameter, expected[name])
        carried = execute_optimizer(section, OptimizerState.from_node(state["optimizer"]))
        mine = OptimizerState.from_node(self.new.state()["optimizer"])
        found = {name: slots or {} for _, name, slots in mine.parameters() if name}
        for _, name, slots in carried.parameters():
            if name is None or name not in found:
                continue
            for slot, value in (slots or {}).items():
                if _flat(value):
                    self._record("slot", name, str(slot), step, found[name].get(slot), value)

    def _record(self, what: Any, name: str, slot: str, step: int, mine: Any, expected: Any) -> None:
        size = _difference(mine, expected)
        if size > self.tolerance:
            self.deviations.append(Deviation(what, name, slot, step, size, name in self.announced))

    def _verdict(self) -> Verdict:
        """What differs at the first step at which anything does; later differences follow from it."""
        if not self.deviations:
            return "exact"
        first = min(deviation.step for deviation in self.deviations)  # what differs later follows from it
        early = [deviation for deviation in self.deviations if deviation.step == first]
        surprising = [deviation for deviation in early if not deviation.announced]
        if not surprising:
            return "approximate"
        if any(deviation.what == "output" for deviation in surprising):
            return "another function"
        changed = any(deviation.what == "output" for deviation in early)
        only_gradients = all(deviation.what == "gradient" for deviation in surprising)
        return "approximate" if changed and only_gradients else "wrong state"


@contextmanager
def _outputs(model: Any) -> Iterator[dict[str, Any]]:
    """What each module gives at its first call, by name, in the order of the calls."""
    found: dict[str, Any] = {}
    handles = []

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, made: Any) -> None:
            tensors = _flat(made)
            if name not in found and tensors:
                found[name] = tensors[0].detach().clone()

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(keep(name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _flat(value: Any) -> list[Any]:
    """The tensors in a value, in order."""
    from optimstate.installed_torch import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _flat(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _flat(item)]
    return []


def _converted(value: Any) -> Any:
    """A batch with its floating tensors in float64."""
    from optimstate.installed_torch import torch

    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _converted(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_converted(item) for item in value)
    return value


def _difference(mine: Any, expected: Any) -> float:
    """The largest difference over the largest value; infinite where there is nothing to compare with."""
    from optimstate.installed_torch import torch

    if not isinstance(mine, torch.Tensor) or not isinstance(expected, torch.Tensor) or mine.shape != expected.shape:
        return float("inf")
    if not mine.numel():
        return 0.0
    one, other = mine.detach().double(), expected.detach().double()
    if not bool(torch.isfinite(one).all()) or not bool(torch.isfinite(other).all()):
        return 0.0 if bool(torch.equal(one.nan_to_num(), other.nan_to_num())) else float("inf")
    largest = max(float(other.abs().max()), 1e-12)
    return float((one - other).abs().max()) / largest
