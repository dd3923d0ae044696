"""The Trainer of transformers: `resume_from_checkpoint` of a changed model, weights, optimizer and schedule together.

```python
class MyTrainer(ResumeMixin, Trainer):
    resume_plan = "plan.toml"
```
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from optimstate.hooks import certify
from optimstate.plan.language.plan import Plan
from optimstate.resuming import Resumed, resume
from optimstate.resuming.certified import Given
from optimstate.resuming.shards import innermost
from optimstate.state.names import names_in

if TYPE_CHECKING:
    import torch

__all__ = ["ResumeMixin"]


class ResumeMixin:
    """A base class to list before `Trainer`. Its checkpoints have parameter names.

    In a PEFT model, the Trainer loads the adapter's weights as before; its optimizer is loaded by name. DeepSpeed,
    FSDP1 and XLA load checkpoints themselves, and are refused if there is a plan.

    Attributes:
        resume_plan: What has changed, as a plan or the path of a plan file.
        resume_schedule: `live` if this run's scheduler keeps its arguments (such as a longer `max_steps`) and takes
            only the position.
        resume_certificate: Certify the run in checkpoints, and check that the resumed run is the certified one: `True`
            for the certificate in the checkpoint, or the path of one.
        resume_saved: Names for an older checkpoint's optimizer that has none, in the order of its groups.
        resumed: The outcome of the last resumption; None before the first.
    """

    resume_plan: Plan | str | PathLike[str] | None = None
    resume_schedule: Literal["checkpoint", "live"] | None = None
    resume_certificate: Given = False
    resume_saved: Any = None
    resumed: Resumed | None = None
    _certified: Any = None

    if TYPE_CHECKING:
        model: Any
        optimizer: Any
        lr_scheduler: Any
        is_deepspeed_enabled: bool
        is_fsdp_enabled: bool

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        """The Trainer's own optimizer, with parameter names in its groups."""
        made: torch.optim.Optimizer = super().create_optimizer(*args, **options)  # type: ignore[misc]
        if not all("param_names" in group for group in made.param_groups):
            for group, names in zip(made.param_groups, names_in(made, self.model), strict=True):
                group["param_names"] = names
        return made

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = innermost(self.optimizer)
        if self.resume_certificate and not self._loads_itself() and optimizer is not self._certified:
            self._certified = optimizer
            model = None if _is_adapted(self.model) else self.model
            optimizer.register_state_dict_post_hook(certify(model, scheduler=self.lr_scheduler))
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._loads_itself() or _is_adapted(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self._loads_itself():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        self.resumed = resume(
            checkpoint,
            model=None if _is_adapted(self.model) else self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            plan=self.resume_plan,
            schedule=self.resume_schedule,
            saved=self.resume_saved,
            certificate=self.resume_certificate,
        )

    def _loads_itself(self) -> bool:
        itself = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if itself and self.resume_plan is not None:
            from optimstate.errors import StateMismatchError

            raise StateMismatchError(
                "DeepSpeed and FSDP load checkpoints by themselves, and would not follow the plan",
                hint="Migrate the checkpoint first: optimstate remap CHECKPOINT NEW --plan PLAN.",
            )
        return itself


def _is_adapted(model: Any) -> bool:
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(model).__mro__)
