"""Lightning: `trainer.fit(..., ckpt_path=...)` of a changed model.

```python
trainer = Trainer(callbacks=[ResumeCallback("plan.toml")])
```
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from typing import Any, Literal

from optimstate.hooks.modules import ModelLoad
from optimstate.integrations import certify_once
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.planner import plan_migration
from optimstate.resuming import Resumed, resume
from optimstate.resuming.certified import Given

__all__ = ["ResumeCallback"]


_lightning: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning")


class ResumeCallback(_lightning.Callback):  # type: ignore[misc]
    """Loads weights, optimizers and schedulers by one plan, before the first step.

    State that other callbacks keep by the model's names (an average) gets the new names too, if these callbacks come
    after this one. Lightning's own `WeightAveraging` may come before or after it.

    Args:
        plan: What has changed, as a plan or the path of a plan file.
        schedule: `live` if schedulers keep their arguments and take only the position.
        saved: Names for the checkpoint's optimizers, if they have none.
        certificate: Certify the run in checkpoints, and check that the resumed run is the certified one: `True` for the
            certificate in the checkpoint, or the path of one.

    Attributes:
        resumed: The outcome of the last resumption; None before the first.
    """

    resumed: Resumed | None = None

    def __init__(
        self,
        plan: Plan | str | PathLike[str] | None = None,
        *,
        schedule: Literal["checkpoint", "live"] | None = None,
        saved: Any = None,
        certificate: Given = False,
    ) -> None:
        self._plan, self._schedule, self._saved, self._certificate = Plan.of(plan), schedule, saved, certificate
        self._certified: list[Any] = []
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Intercept the checkpoint that the module is about to load."""
        if stage != "fit":
            return
        inherited = type(pl_module).on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            inherited(pl_module, checkpoint)
            self._take(pl_module, checkpoint)

        pl_module.on_load_checkpoint = on_load_checkpoint

    def _take(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the parts to which the plan applies, and replace them by values that change nothing in Lightning."""
        self._loaded = {key: checkpoint.get(key) for key in ("state_dict", "optimizer_states", "lr_schedulers")}
        current = checkpoint.get("current_model_state")
        if current is None:
            checkpoint["state_dict"] = module.state_dict()
        else:  # Lightning's WeightAveraging saves the average as the model, and the model separately
            checkpoint["state_dict"] = self._renamed(module, checkpoint["state_dict"], current)
            checkpoint["current_model_state"] = module.state_dict()
            self._loaded["state_dict"] = current
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
        for key, state in checkpoint.get("callbacks", {}).items():
            checkpoint["callbacks"][key] = self._renamed(module, state, self._loaded["state_dict"])

    def _renamed(self, module: Any, node: Any, weights: Mapping[str, Any]) -> Any:
        """A callback's state, in which dicts with all the model's weights get the new names."""
        if not isinstance(node, dict):
            return node
        if node and weights.keys() <= node.keys():
            load = ModelLoad(module, node)
            plan = self._plan.with_policy(unused="ignore")
            return load.made(plan_migration(plan, {"model": load.inventory(plan)}).sections["model"])
        return {key: self._renamed(module, value, weights) for key, value in node.items()}

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Load as soon as there are optimizers."""
        self._load(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Load, if there was no sanity check before."""
        self._load(trainer, pl_module)

    def _load(self, trainer: Any, module: Any) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in trainer.optimizers if self._certificate else ():
            certify_once(self._certified, optimizer, module, schedulers)
        if self._loaded is None:
            return
        checkpoint, self._loaded = self._loaded, None
        self.resumed = resume(
            {key: value for key, value in checkpoint.items() if value},
            model=module,
            optimizer=list(trainer.optimizers),
            scheduler=schedulers,
            plan=self._plan,
            schedule=self._schedule,
            saved=self._saved,
            certificate=self._certificate,
        )
