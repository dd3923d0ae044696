"""The schedulers of torch.optim.lr_scheduler: the same floats, with warnings about what a state does not restore."""

from __future__ import annotations

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING as EPOCH_DEPRECATION_WARNING

from optimstate.optim.lr_scheduler.base import LRScheduler
from optimstate.optim.lr_scheduler.compose import ChainedScheduler, SequentialLR
from optimstate.optim.lr_scheduler.cyclic import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR
from optimstate.optim.lr_scheduler.decay import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    StepLR,
)
from optimstate.optim.lr_scheduler.plateau import ReduceLROnPlateau

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]


class _LRScheduler(LRScheduler, lr_scheduler._LRScheduler):
    """The base class under the name that it had before torch 2.0."""


for _name in __all__:
    globals()[_name].__module__ = __name__  # as in torch: pickles and messages use the public name
