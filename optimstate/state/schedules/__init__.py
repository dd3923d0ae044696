"""Torch's schedulers, as their states show them: the current learning rate, and the values that the next depends on.

Most schedulers of torch multiply the learning rate in the param group. Others compute it from the initial rate
(`base_lrs`, which is `initial_lr` in the groups), or from bounds of their own. At a given position every rate is a
linear function of the initial one, `a + b * initial`. By this function a changed rate, a changed length or a param
group that joins late is handled. Nothing here imports torch; the formulas are those of torch's documentation.

| scheduler | the next step computes from |
|---|---|
| StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR, ReduceLROnPlateau | `lr` |
| MultiplicativeLR | `lr` (its state looks like LambdaLR's, so the values for both are kept up to date) |
| LambdaLR, CosineAnnealingWarmRestarts | `base_lrs` |
| CosineAnnealingLR | `lr`, and `base_lrs` at its lowest point |
| CyclicLR | `base_lrs` and `max_lrs` |
| OneCycleLR | `initial_lr`, `max_lr` and `min_lr` of the group |
| SWALR | `lr` and `swa_lr` of the group |
| SequentialLR | the values of its current part; `base_lrs` at its milestones |
| ChainedScheduler | the values of all its parts |
"""

from optimstate.state.schedules import cycles, decays  # noqa: F401  (importing them registers their classes)
from optimstate.state.schedules.composed import Chained, acting, parts
from optimstate.state.schedules.schedule import Line, Schedule, schedule_of

__all__ = ["Chained", "Line", "Schedule", "acting", "parts", "schedule_of"]
