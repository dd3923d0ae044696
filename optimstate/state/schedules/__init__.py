"""Torch's schedulers as their states show them: the present learning rate, and what the next is computed from.

Most schedulers of torch multiply the learning rate that they find in the param group; others compute it from the rate
that the run began with (`base_lrs`, which the groups call `initial_lr`), or from bounds of their own. Every rate is a
line over the initial one, `a + b * initial`, as long as the position stays: that is what a changed rate, a changed
length or a param group that joins late is computed by. Nothing here imports torch; the formulas are those of torch's
documentation, for the position that the state has.

| scheduler | the next step computes from |
|---|---|
| StepLR, MultiStepLR, ConstantLR, LinearLR, ExponentialLR, PolynomialLR, ReduceLROnPlateau | `lr` |
| MultiplicativeLR | `lr` (its state cannot be told from LambdaLR's, so both are kept right) |
| LambdaLR, CosineAnnealingWarmRestarts | `base_lrs` |
| CosineAnnealingLR | `lr`, and `base_lrs` where it turns |
| CyclicLR | `base_lrs` and `max_lrs` |
| OneCycleLR | `initial_lr`, `max_lr` and `min_lr` of the group |
| SWALR | `lr` and `swa_lr` of the group |
| SequentialLR | what its present part does; `base_lrs` at its milestones |
| ChainedScheduler | what its parts do, one after the other |
"""

from optimstate.state.schedules import cycles, decays  # noqa: F401  (they register what they hold)
from optimstate.state.schedules.composed import Chained, acting, parts
from optimstate.state.schedules.schedule import Line, Schedule, schedule_of

__all__ = ["Chained", "Line", "Schedule", "acting", "parts", "schedule_of"]
