"""Accelerate: `accelerator.load_state` of a changed model.

```python
resume = Resume(accelerator, plan="plan.toml")
accelerator.load_state("checkpoint")
```
"""

from __future__ import annotations

from os import PathLike
from typing import Any, Literal

from optimstate.integrations import certify_once, ignore_next_load
from optimstate.plan.language.plan import Plan
from optimstate.resuming import Resumed, resume
from optimstate.resuming.certified import Given
from optimstate.resuming.owners import owner_of

__all__ = ["Resume"]


class Resume:
    """Loads models, optimizers and schedulers in place of `load_state`, which loads everything else.

    The state that `prepare` itself loads into an optimizer is not affected.

    Args:
        accelerator: The accelerator, on which this object registers hooks. DeepSpeed, FSDP1 and Megatron load
            checkpoints themselves.
        plan: What has changed, as a plan or the path of a plan file.
        schedule: `live` if schedulers keep their arguments and take only the position.
        saved: Names for the checkpoint's optimizers, if they have none.
        certificate: Certify the run in `save_state`, and check that the resumed run is the certified one: `True` for
            the certificate in the checkpoint, or the path of one.

    Attributes:
        resumed: The outcome of the last resumption; None before the first.
    """

    resumed: Resumed | None = None

    def __init__(
        self,
        accelerator: Any,
        plan: Plan | str | PathLike[str] | None = None,
        *,
        schedule: Literal["checkpoint", "live"] | None = None,
        saved: Any = None,
        certificate: Given = False,
    ) -> None:
        self._accelerator, self._plan, self._schedule, self._saved = accelerator, Plan.of(plan), schedule, saved
        self._certificate, self._certified = certificate, list[Any]()
        self._handle = accelerator.register_load_state_pre_hook(self)
        self._saving = accelerator.register_save_state_pre_hook(self._certify)

    def remove(self) -> None:
        """Let `load_state` load by itself again."""
        self._handle.remove()
        self._saving.remove()

    def _certify(self, models: list[Any], weights: list[Any], output_dir: str) -> None:  # noqa: ARG002
        """Called by `save_state` before it saves: let every optimizer certify the state that it saves."""
        own = self._accelerator
        for each in own._optimizers if self._certificate else ():
            model = owner_of(each.optimizer, [own.unwrap_model(model) for model in own._models])
            schedulers = [wrapper.scheduler for wrapper in own._schedulers]
            certify_once(self._certified, each.optimizer, model, schedulers)

    def __call__(self, models: list[Any], input_dir: str) -> None:
        """Called by `load_state` before it loads."""
        own = self._accelerator
        optimizers = [each.optimizer for each in own._optimizers]
        schedulers = [each.scheduler for each in own._schedulers]
        self.resumed = resume(
            input_dir,
            model=[own.unwrap_model(model) for model in models],
            optimizer=optimizers,
            scheduler=schedulers,
            plan=self._plan,
            schedule=self._schedule,
            saved=self._saved,
            certificate=self._certificate,
        )
        models.clear()
        for each in (*optimizers, *schedulers):
            ignore_next_load(each)
