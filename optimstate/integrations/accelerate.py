"""Accelerate: `accelerator.load_state` of a changed model.

```python
resume = Resume(accelerator, plan="plan.toml")
accelerator.load_state("checkpoint")
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal

from optimstate.hooks import certify
from optimstate.plan.language.plan import Plan
from optimstate.resuming import Resumed, resume
from optimstate.resuming.certified import Given
from optimstate.resuming.owners import owner_of

__all__ = ["Resume", "ignore_next_load"]


class Resume:
    """Loads models, optimizers and schedulers in place of `load_state`, which goes on with everything else.

    What `prepare` loads into an optimizer is its own, and goes through as it is.

    Args:
        accelerator: On which it registers itself. Runs of DeepSpeed, FSDP1 and Megatron load by themselves.
        plan: What has changed, as a plan or the path of a plan file.
        schedule: `live` lets schedules keep their arguments and take the position alone.
        saved: The names that the checkpoint's optimizers have not got.
        certificate: Let `save_state` certify the run, and demand that what is resumed is what was certified: `True`
            for the certificate in the checkpoint, or the path of one.

    Attributes:
        resumed: What the last resumption did; None before.
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
        self._certificate, self._certifying = certificate, set[int]()
        self._handle = accelerator.register_load_state_pre_hook(self)
        self._saving = accelerator.register_save_state_pre_hook(self._certify)

    def remove(self) -> None:
        """Let `load_state` load by itself again."""
        self._handle.remove()
        self._saving.remove()

    def _certify(self, models: list[Any], weights: list[Any], output_dir: str) -> None:  # noqa: ARG002
        """Called by `save_state` before it saves: have every optimizer certify what it hands over."""
        if not self._certificate:
            return
        own = self._accelerator
        for each in own._optimizers:
            if id(each.optimizer) not in self._certifying:
                self._certifying.add(id(each.optimizer))
                model = owner_of(each.optimizer, [own.unwrap_model(model) for model in own._models])
                schedulers = [wrapper.scheduler for wrapper in own._schedulers]
                mine = [scheduler for scheduler in schedulers if scheduler.optimizer is each.optimizer]
                each.optimizer.register_state_dict_post_hook(certify(model, scheduler=mine or None))

    def __call__(self, models: list[Any], input_dir: str) -> None:
        """Called by `load_state` before it loads."""
        own = self._accelerator
        optimizers = [each.optimizer for each in own._optimizers]
        schedulers = [each.scheduler for each in own._schedulers]
        self.resumed = resume(
            input_dir,
            model=_one_or_all([own.unwrap_model(model) for model in models]),
            optimizer=_one_or_all(optimizers),
            scheduler=_one_or_all(schedulers),
            plan=self._plan,
            schedule=self._schedule,
            saved=self._saved,
            certificate=self._certificate,
        )
        models.clear()
        for each in (*optimizers, *schedulers):
            ignore_next_load(each)


def _one_or_all(found: Sequence[Any]) -> Any:
    return None if not found else found[0] if len(found) == 1 else list(found)


def ignore_next_load(live: Any) -> None:
    """Let `load_state_dict` do nothing once: what a trainer itself loads next is in there already."""

    def ignore(_: Any) -> None:
        del live.load_state_dict

    ignore_once: Callable[[Any], None] = ignore
    live.load_state_dict = ignore_once
