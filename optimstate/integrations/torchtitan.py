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
    """Loads model and optimizers in place of the checkpoint manager, which loads everything else.

    The manager loads the scheduler, whose state in torchtitan is only its position, the data loader and the train
    state. New parameters start without state; torchtitan itself would start them with zero moments at step 1.

    Args:
        checkpointer: A `CheckpointManager` (DCP), in every process. It loads Hugging Face checkpoints itself.
        plan: What has changed, as a plan or the path of a plan file.
        saved: Names for the checkpoint's optimizer, if it has none.
        certificate: The path of a certificate, to check that the resumed run is the certified one.

    Attributes:
        resumed: The outcome of the last resumption; None before the first.
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
        """Let the checkpoint manager load everything again."""
        self._checkpointer.dcp_load = self._load

    def __call__(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Called by `load`, for a step or for `initial_load_path`.

        Raises:
            OptimStateError: Any error of `optimstate.resume`; nothing is changed.
        """
        if from_hf:
            self._load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        states = self._checkpointer.states
        self.resumed = resume(
            checkpoint_id,
            model=list(states["model"].model),
            optimizer=list(states["optimizer"]) if "optimizer" in state_dict else None,
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
