"""fastai: a learner with a changed model continues from a file that `learn.save` wrote.

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
"""Flags that a learner sets in the state of some parameters (norms and biases) when it creates the optimizer."""


class _Live(_optim.Optimizer):  # type: ignore[misc]
    """A torch optimizer with the parameters, options and state of fastai's own optimizer, which is not torch's."""

    def __init__(self, optimizer: Any) -> None:
        groups = zip(optimizer.param_lists, optimizer.hypers, strict=True)
        super().__init__([{**hypers, "params": list(own)} for own, hypers in groups], {})
        for group in self.param_groups:
            for parameter in group["params"]:
                if optimizer.state.get(parameter):
                    self.state[parameter] = dict(optimizer.state[parameter])

    def put_into(self, optimizer: Any) -> None:
        """Copy state and options to fastai's optimizer."""
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
        learner: A new learner; its optimizer is created if it has none.
        file: A file that `learner.save` wrote; nothing in it is executed.
        plan: What has changed, as a plan or the path of a plan file.
        saved: Names for the file's optimizer, in its order, if it has none; or `live`.

    Raises:
        OptimStateError: Any error of `optimstate.resume`; nothing is changed.
    """
    if learner.opt is None:
        learner.create_opt()
    wrapped = getattr(learner.opt, "opt", None)
    given = Plan.of(plan)
    if isinstance(wrapped, _optim.Optimizer):
        return resume(file, model=learner.model, optimizer=wrapped, plan=given, saved=saved)
    live = _Live(learner.opt)
    # A file does not say which parameter is in which group, so the plan does not handle options.
    found = resume(
        file, model=learner.model, optimizer=live, plan=given.with_policy(hyperparameters="live"), saved=saved
    )
    if given.policy.hyperparameters != "live":
        _take(live, _hypers(file))
    live.put_into(learner.opt)
    return found


def _take(live: _Live, hypers: Sequence[Mapping[str, Any]]) -> None:
    """Set the groups' options from a file: group by group, or the common ones if the numbers of groups differ."""
    groups = live.param_groups
    if len(hypers) != len(groups):
        common = {key: value for key, value in hypers[0].items() if all(other.get(key) == value for other in hypers)}
        hypers = [common] * len(groups)
    for group, own in zip(groups, hypers, strict=True):
        group.update({key: value for key, value in own.items() if key in group})


def _hypers(file: str | PathLike[str]) -> list[Mapping[str, Any]]:
    """The options of each group in a file."""
    listed = open_checkpoint(file).tree["opt"].get("hypers", [])
    held = getattr(listed, "state", None)
    groups = held["items"] if isinstance(held, Mapping) else listed
    return [{key: revived(value) for key, value in own.items()} for own in groups]
