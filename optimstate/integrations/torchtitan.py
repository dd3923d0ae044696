"""Torchtitan: `checkpointer.load()` of a changed model.

```python
Resume(trainer.checkpointer, plan="plan.toml")
trainer.checkpointer.load()
```
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from optimstate.plan.language.plan import Plan
from optimstate.resuming import Resumed, resume
from optimstate.resuming.certified import Given

__all__ = ["Resume"]


class Resume:
    """Loads model and optimizers in place of the checkpoint manager, which goes on with everything else.

    That is the schedule, of which torchtitan keeps the position alone, the data loader and the train state. New
    parameters have no state, where torchtitan itself would begin with moments of zero at step 1.

    Args:
        checkpointer: A `CheckpointManager` (DCP), in every process; checkpoints of Hugging Face it loads by itself.
        plan: What has changed, as a plan or the path of a plan file.
        saved: The names that the checkpoint's optimizer has not got.
        certificate: Demand that what is resumed is what was certified: the path of a certificate.

    Attributes:
        resumed: What the last resumption did; None before.
    """

    resumed: Resumed | None = None

    def __init__(
        self,
        checkpointer: Any,
        plan: Plan | str | PathLike[str] | None = None,
        *,
        saved: Any = None,
        certificate: Given | None = None,
    ) -> None:
        self._checkpointer, self._plan, self._saved, self._certificate = checkpointer, Plan.of(plan), saved, certificate
        self._load = checkpointer.dcp_load
        checkpointer.dcp_load = self

    def remove(self) -> None:
        """Let the checkpoint manager load by itself again."""
        self._checkpointer.dcp_load = self._load

    def __call__(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Called by `load`, of a step or of `initial_load_path`.

        Raises:
            OptimStateError: As `optimstate.resume` raises it; nothing is changed.
        """
        if from_hf:
            self._load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        states = self._checkpointer.states
        models = list(states["model"].model)
        optimizers = list(states["optimizer"]) if "optimizer" in state_dict else None
        self.resumed = resume(
            checkpoint_id,
            model=models[0] if len(models) == 1 else models,
            optimizer=optimizers[0] if optimizers and len(optimizers) == 1 else optimizers,
            plan=self._plan,
            saved=self._saved,
            certificate=self._certificate,
        )
        done = {"optimizer", *states["model"].state_dict()}
        rest = {key: value for key, value in state_dict.items() if key not in done}
        if rest:
            self._checkpointer.states = {key: value for key, value in states.items() if key != "model"}
            try:
                self._load(rest, checkpoint_id, from_hf, from_quantized)
            finally:
                self._checkpointer.states = states
