"""fastai: a learner with a changed model goes on from what `learn.save` wrote.

```python
learn = Learner(dls, model, ...)
resume_learner(learn, "models/before.pth", plan="plan.toml")
learn.fit(1)
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from typing import Any

from optimstate.formats.registry import open_checkpoint
from optimstate.plan.language.plan import Plan
from optimstate.resuming import Resumed, resume
from optimstate.resuming.records import revived

__all__ = ["resume_learner"]


_optim: Any = import_module("torch.optim")
_FLAGS = ("do_wd", "force_train")
"""What a learner says of parameters (norms and biases) in their state, when it makes the optimizer."""


class _Live(_optim.Optimizer):  # type: ignore[misc]
    """The parameters of fastai's own optimizer, which is none of torch's, with what it keeps of each."""

    def __init__(self, optimizer: Any) -> None:
        groups = zip(optimizer.param_lists, optimizer.hypers, strict=True)
        super().__init__([{**hypers, "params": list(own)} for own, hypers in groups], {})
        for group in self.param_groups:
            for parameter in group["params"]:
                if optimizer.state.get(parameter):
                    self.state[parameter] = dict(optimizer.state[parameter])

    def put_into(self, optimizer: Any) -> None:
        """Give fastai's optimizer what this one has now."""
        for parameter, *_ in optimizer.all_params():
            flags = {key: value for key, value in optimizer.state[parameter].items() if key in _FLAGS}
            optimizer.state[parameter] = {**self.state.get(parameter, {}), **flags}
        for name in optimizer.hypers[0]:
            optimizer.set_hyper(name, [group[name] for group in self.param_groups])


def resume_learner(
    learner: Any,
    file: str | PathLike[str],
    *,
    plan: Plan | str | PathLike[str] | None = None,
    saved: Any = None,
) -> Resumed:
    """Load the model and the optimizer, fastai's own or one of torch's in an `OptimWrapper`.

    Args:
        learner: A new one; its optimizer is made if it has none.
        file: What `learner.save` wrote; nothing in it is executed.
        plan: What has changed, as a plan or the path of a plan file.
        saved: The names that the file's optimizer has not got, in its order, or `live`.

    Raises:
        OptimStateError: As `optimstate.resume` raises it; nothing is changed.
    """
    if learner.opt is None:
        learner.create_opt()
    wrapped = getattr(learner.opt, "opt", None)
    given = Plan.of(plan)
    if isinstance(wrapped, _optim.Optimizer):
        return resume(file, model=learner.model, optimizer=wrapped, plan=given, saved=saved)
    live = _Live(learner.opt)
    # A file does not say which parameter is in which group, so their options are no matter of the plan.
    found = resume(
        file, model=learner.model, optimizer=live, plan=given.with_policy(hyperparameters="live"), saved=saved
    )
    if given.policy.hyperparameters != "live":
        _take(live, _hypers(file))
    live.put_into(learner.opt)
    return found


def _take(live: _Live, hypers: Sequence[Mapping[str, Any]]) -> None:
    """Give the groups a file's options: those of the same group of as many, else those that all have alike."""
    groups = live.param_groups
    if len(hypers) != len(groups):
        alike = {key: value for key, value in hypers[0].items() if all(other.get(key) == value for other in hypers)}
        hypers = [alike] * len(groups)
    for group, own in zip(groups, hypers, strict=True):
        group.update({key: value for key, value in own.items() if key in group})


def _hypers(file: str | PathLike[str]) -> list[Mapping[str, Any]]:
    """The options of each group in a file."""
    listed = open_checkpoint(file).tree["opt"].get("hypers", [])
    held = getattr(listed, "state", None)
    groups = held["items"] if isinstance(held, Mapping) else listed
    return [{key: revived(value) for key, value in own.items()} for own in groups]
