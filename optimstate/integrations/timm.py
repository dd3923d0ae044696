"""timm: `resume_checkpoint` of a changed model, in a script like its `train.py`.

```python
from optimstate.integrations.timm import resume_checkpoint

start_epoch = resume_checkpoint(model, args.resume, optimizer, loss_scaler, plan="plan.toml")
```
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from optimstate.formats.registry import open_checkpoint
from optimstate.plan.language.plan import Plan
from optimstate.resuming import resume
from optimstate.resuming.certified import Given

if TYPE_CHECKING:
    import torch

__all__ = ["resume_checkpoint"]

_LOGGER = logging.getLogger("optimstate")


def resume_checkpoint(
    model: torch.nn.Module,
    checkpoint_path: str | PathLike[str],
    optimizer: torch.optim.Optimizer | None = None,
    loss_scaler: Any = None,
    log_info: bool = True,
    *,
    model_ema: torch.nn.Module | None = None,
    plan: Plan | str | PathLike[str] | None = None,
    saved: Any = None,
    certificate: Given = False,
) -> int | None:
    """Load like `timm.models.resume_checkpoint`, but by a plan and with the average; nothing in the file is executed.

    Args:
        model: Gets the weights (not those of the average).
        checkpoint_path: A file that `CheckpointSaver` wrote.
        optimizer: Gets its state by name.
        loss_scaler: timm's `NativeScaler` or a `GradScaler`; it keeps its state if the checkpoint has none.
        log_info: Log the outcome.
        model_ema: `ModelEmaV3` or a similar module, which gets the average.
        plan: What has changed, as a plan or the path of a plan file.
        saved: Names for the checkpoint's optimizer, in the order of its groups, if it has none; or `live`.
        certificate: Check that model and optimizer are the certified ones: `True` for the certificate in the file, or
            the path of one. To write it, call `optimizer.register_state_dict_post_hook(hooks.certify(model))` before
            saving.

    Returns:
        The epoch to start with; None if the checkpoint has only weights.

    Raises:
        OptimStateError: Any error of `optimstate.resume`; nothing is changed.
    """
    tree = open_checkpoint(checkpoint_path).tree
    whole = isinstance(tree, Mapping) and "state_dict" in tree
    with_scaler = loss_scaler is not None and whole and "amp_scaler" in tree
    found = resume(
        checkpoint_path,
        model=model,
        optimizer=optimizer if whole else None,
        ema=model_ema if whole else None,
        scaler=getattr(loss_scaler, "_scaler", loss_scaler) if with_scaler else None,
        plan=plan,
        saved=saved if whole else None,
        certificate=certificate,
    )
    if log_info:
        _LOGGER.info("%s", found)
    if not whole or "epoch" not in tree:
        return None
    return int(tree["epoch"]) + (1 if tree.get("version", 1) > 1 else 0)  # from version 2 on, the epoch is complete
