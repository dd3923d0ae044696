"""The two runs of a rehearsal: copies of the given ones, which compute reproducibly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from optimstate.errors import StateMismatchError
from optimstate.rehearsal.tensors import difference, module_outputs
from optimstate.state.names import unwrapped
from optimstate.user_code import running

__all__ = ["Pass", "Run"]

_PARTS = ("model", "optimizer", "scheduler")


class Pass:
    """The result of one forward and backward pass.

    Attributes:
        loss: A scalar tensor.
        outputs: The outputs that the loss function returned with it.
        modules: The output of each module, in the order of their calls.
    """

    def __init__(self, loss: Any, outputs: Any, modules: dict[str, Any]) -> None:
        self.loss, self.outputs, self.modules = loss, outputs, modules


class Run:
    """A model, its optimizers and its schedulers."""

    def __init__(self, model: Any, optimizers: list[Any], schedulers: list[Any]) -> None:
        self.model, self.optimizers, self.schedulers = model, optimizers, schedulers
        self._plain: Callable[[str], str] | None = None

    @classmethod
    def of(cls, given: Any, *, double: bool) -> Run:
        """A copy of a run, or the run that a function builds.

        Args:
            given: `(model, optimizer)`, `(model, optimizer, scheduler)`, a dict of these, or a function that builds one
                of them. Several optimizers or schedulers are given in lists.
            double: Compute in float64.

        Raises:
            StateMismatchError: `given` has another form.
        """
        from optimstate.installed_torch import torch

        with running("what builds the run" if callable(given) else "copying the run"):
            found = given() if callable(given) else copy.deepcopy(given)
        listed = found if isinstance(found, tuple | list) else ()
        parts = found if isinstance(found, Mapping) else dict(zip(_PARTS, listed, strict=False))
        if not {"model", "optimizer"} <= parts.keys() <= {*_PARTS} or len(found) != len(parts):
            raise StateMismatchError(
                "a run is (model, optimizer), (model, optimizer, scheduler) or a dict with these keys",
                hint="Leave out other parts: averages and scalers do not change a step.",
            )
        made = cls(parts["model"], _listed(parts["optimizer"]), _listed(parts.get("scheduler")))
        if double:
            states = [optimizer.state_dict() for optimizer in made.optimizers]
            made.model.double()
            for optimizer, state in zip(made.optimizers, states, strict=True):
                optimizer.load_state_dict(state)  # slots take the dtype of their parameters
        for module in made.model.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return made

    def plain_name(self, name: str) -> str:
        """A name of the model without the prefixes of wrappers."""
        if self._plain is None:
            self._plain = unwrapped(name for name, _ in self.model.named_parameters())
        return self._plain(name)

    def parts(self) -> dict[str, Any]:
        """The arguments of `optimstate.resume`."""
        return {"model": self.model, "optimizer": self.optimizers, "scheduler": self.schedulers}

    def state(self) -> dict[str, Any]:
        """The run's state, with names."""
        from optimstate.hooks import name_params

        made: dict[str, Any] = {"model": copy.deepcopy(self.model.state_dict())}
        optimizers = []
        for optimizer in self.optimizers:
            state = copy.deepcopy(optimizer.state_dict())
            if not all("param_names" in group for group in state["param_groups"]):
                state = name_params(self.model)(optimizer, state)
            optimizers.append(state)
        made |= {"optimizer": optimizers[0]} if len(optimizers) == 1 else {"optimizers": optimizers}
        schedules = [copy.deepcopy(scheduler.state_dict()) for scheduler in self.schedulers]
        if schedules:
            made |= {"scheduler": schedules[0]} if len(schedules) == 1 else {"schedulers": schedules}
        return made

    def optimizer_states(self) -> list[dict[str, Any]]:
        """The optimizers' state, with names."""
        state = self.state()
        return state["optimizers"] if "optimizers" in state else [state["optimizer"]]

    def options(self) -> dict[str, dict[str, Any]]:
        """The options of each parameter's group."""
        return {
            name: {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for state in self.optimizer_states()
            for group in state["param_groups"]
            for name in group["param_names"]
        }

    def passed(self, loss: Callable[[Any, Any], Any], batch: Any) -> Pass:
        """Run forward and backward, with the same random numbers in every pass."""
        from optimstate.installed_torch import torch

        torch.manual_seed(0)
        self.model.zero_grad()
        with module_outputs(self.model) as modules, running("the loss"):
            made = loss(self.model, batch)
        value, outputs = _scalar(made)
        if not value.requires_grad:
            raise StateMismatchError(
                "the loss does not depend on the model's parameters: it has no gradient",
                hint="Compute it from the output of the model that the loss function is given.",
            )
        with running("going back from the loss"):
            value.backward()
        return Pass(value.detach(), outputs, modules)

    def step(self) -> None:
        """Make a step of every optimizer and scheduler."""
        for each in (*self.optimizers, *self.schedulers):
            with running(f"a step of {type(each).__name__}"):
                each.step()

    def is_random(self, loss: Callable[[Any, Any], Any], batch: Any) -> bool:
        """Whether the loss depends on random numbers."""
        from optimstate.installed_torch import torch

        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad(), running("the loss"):
                made = loss(copy.deepcopy(self.model), batch)
            found.append(_scalar(made)[0])
        return difference(*found) > 0


def _scalar(made: Any) -> tuple[Any, Any]:
    """The loss and the outputs that a loss function returned.

    Raises:
        StateMismatchError: The loss is not a scalar tensor.
    """
    from optimstate.installed_torch import torch

    value, outputs = made if isinstance(made, tuple) and len(made) == 2 else (made, ())
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value, outputs
    what = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
    raise StateMismatchError(
        f"the loss function returns {what}, not a scalar tensor", hint="Return a scalar, or a scalar and the outputs."
    )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
