"""The hook that certifies a run when it saves."""

from __future__ import annotations

from os import PathLike
from typing import Any

from optimstate.certificates.certificate import KEY
from optimstate.certificates.live import being_compared, certificate_of
from optimstate.errors import UsageError
from optimstate.hooks.save import SaveHook, StateDict
from optimstate.installed_torch import torch
from optimstate.plan.apply.stamps import METADATA

__all__ = ["certify"]


def certify(
    model: torch.nn.Module | None = None,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    path: str | PathLike[str] | None = None,
) -> SaveHook:
    """Write a certificate of the run into every state dict, for `resume(..., certificate=True)`.

    It has digests of the weights and of every slot by name, the param groups, what the schedulers and the gradient
    scaler keep, the release of torch, how the next update will be, and the certificates that the run was resumed from.
    All tensors are read once more for it. Register it last: what hooks before it leave is certified.

    Args:
        model: Its weights are certified too, and it names the parameters of an optimizer that was built without names.
        scheduler: The optimizer's, or several in a list.
        scaler: A `GradScaler`.
        path: A JSON file that is written too, each time anew; for a check that must not trust the checkpoint.

    Example:
        `optimizer.register_state_dict_post_hook(hooks.certify(model))`
    """
    if path is not None and not str(path):
        raise UsageError("the path of the certificate is empty")

    def change(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> tuple[StateDict, str]:
        if being_compared.get():
            return state_dict, "nothing, as the state is only compared"
        made = certificate_of(optimizer, model, scheduler=scheduler, scaler=scaler, state_dict=state_dict)
        if path is not None:
            made.write(path)
        beside = {**state_dict.get(METADATA, {}), KEY: made.document()}
        return {**state_dict, METADATA: beside}, f"{len(made.weights)} weights, {len(made.state)} parameters"

    return SaveHook("certify", change)
