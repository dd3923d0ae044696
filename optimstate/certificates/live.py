"""The certificate of a live run, and the next update of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary
from zlib import crc32

from optimstate.certificates.certificate import Ancestor, Certificate
from optimstate.certificates.digests import Digest, digest
from optimstate.errors import StateMismatchError
from optimstate.state.names import names_in, unwrapped
from optimstate.state.optimizer import OptimizerState

if TYPE_CHECKING:
    import torch

__all__ = ["being_compared", "certificate_of", "histories", "next_update"]

being_compared: ContextVar[bool] = ContextVar("being_compared", default=False)
"""Whether a state dict is requested only to compare it, so that `hooks.certify` must not add a certificate."""

histories: WeakKeyDictionary[Any, tuple[Ancestor, ...]] = WeakKeyDictionary()
"""The certificates from which the runs of live optimizers were resumed, as `optimstate.resume` records them."""


def certificate_of(
    optimizer: torch.optim.Optimizer,
    model: torch.nn.Module | None = None,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    state_dict: Mapping[str, Any] | None = None,
) -> Certificate:
    """The certificate of a run as it is now. In a sharded run, every process must call it and gets the same result.

    Args:
        optimizer: The optimizer. Its parameters need names, or a model that has them.
        model: The model whose weights and buffers are certified; without it, the optimizer's parameters are.
        scheduler: A scheduler, or several in a list.
        scaler: A `GradScaler`.
        state_dict: The optimizer's state dict, if hooks change it.

    Raises:
        StateMismatchError: The optimizer has no names, or has parameters that the model does not have.
    """
    from optimstate import __version__
    from optimstate.installed_torch import torch

    names = _names(optimizer, model)
    state = OptimizerState.from_node(state_dict if state_dict is not None else _uncertified(optimizer))
    weights = model.state_dict() if model is not None else _own(optimizer, names)
    schedulers = [] if scheduler is None else list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler]
    kept = {str(number): each.state_dict() for number, each in enumerate(schedulers)}
    made = Certificate.of_parts(
        weights,
        state.named([name for group in names for name in group]),
        schedule=kept["0"] if len(kept) == 1 else kept,
        scaler=scaler.state_dict() if scaler is not None else None,
    )
    return made._replace(
        algorithm=type(optimizer).__name__,
        update=next_update(optimizer, names),
        versions={"torch": str(torch.__version__), "optimstate": __version__},
        history=histories.get(optimizer, ()),
    )


def _uncertified(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    token = being_compared.set(True)
    try:
        return optimizer.state_dict()
    finally:
        being_compared.reset(token)


def _names(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> list[list[str]]:
    if all("param_names" in group for group in optimizer.param_groups):
        return [list(group["param_names"]) for group in optimizer.param_groups]
    if model is None:
        raise StateMismatchError(
            "the optimizer's parameters have no names",
            hint="Give the model, or build it from model.named_parameters().",
        )
    return names_in(optimizer, model)


def _own(optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {
        name: parameter
        for group, own in zip(optimizer.param_groups, names, strict=True)
        for name, parameter in zip(own, group["params"], strict=True)
    }


def next_update(optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]]) -> dict[str, Digest]:
    """The digest of every parameter after one step of copies, with gradients that depend only on its name and shape.

    Each parameter makes its step alone, which needs no more memory than the largest of them. The run is not changed,
    including its random state.

    Args:
        optimizer: The optimizer; if its `step` needs a closure, the result is empty.
        names: The names of its parameters, by group.
    """
    from optimstate.installed_torch import torch

    plain = unwrapped([name for group in names for name in group])
    made: dict[str, Digest] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # for optimizers with stochastic rounding
        for group, own in zip(optimizer.param_groups, names, strict=True):
            for name, parameter in zip(own, group["params"], strict=True):
                if not parameter.requires_grad:
                    continue
                try:
                    made[plain(name)] = _stepped(optimizer, group, parameter, plain(name))
                except Exception:  # noqa: BLE001 - it needs a closure, or the other parameters
                    return {}
    return made


def _stepped(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Any, name: str) -> Digest:
    from optimstate.installed_torch import torch

    copy = torch.nn.Parameter(_copied(parameter.detach()))
    copy.grad = _gradient(copy, name)
    alone = object.__new__(type(optimizer))
    alone.__dict__.update(optimizer.__dict__)
    alone.__dict__.pop("step", None)  # a scheduler's wrapper, which counts calls
    for key in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        alone.__dict__[key] = type(optimizer.__dict__.get(key, {}))()
    alone.param_groups = [{**_copied(dict(group)), "params": [copy]}]
    alone.state = type(optimizer.state)(dict)
    if parameter in optimizer.state:
        alone.state[copy] = _copied(optimizer.state[parameter])
    alone.step()
    return digest(copy.detach())


def _copied(value: Any) -> Any:
    """A copy of a parameter's state; tensors that are sharded over processes are made whole."""
    from optimstate.installed_torch import torch

    if isinstance(value, torch.Tensor):
        value = value.detach()
        return whole() if (whole := getattr(value, "full_tensor", None)) is not None else value.clone()
    if isinstance(value, Mapping):
        return {key: item if key == "params" else _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _gradient(like: Any, name: str) -> Any:
    """Numbers between -1 and 1 that are equal on every device: integers divided by a power of two."""
    from optimstate.installed_torch import torch

    indices = torch.arange(like.numel(), device=like.device, dtype=torch.int64)
    numbers = (indices * 7919 + crc32(name.encode())) % 2001 - 1000
    return (numbers.to(torch.float32) / 1024).to(like.dtype).reshape(like.shape)
