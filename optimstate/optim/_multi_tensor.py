"""The optimizers with ``foreach=True`` by default, as in `torch.optim._multi_tensor`."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import optimstate.optim.adadelta
import optimstate.optim.adagrad
import optimstate.optim.adam
import optimstate.optim.adamax
import optimstate.optim.adamw
import optimstate.optim.asgd
import optimstate.optim.nadam
import optimstate.optim.radam
import optimstate.optim.rmsprop
import optimstate.optim.rprop
import optimstate.optim.sgd

__all__ = ["ASGD", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"]


def _in_lists(cls: Any) -> Any:
    return type(cls.__name__, (cls,), {"__init__": partialmethod(cls.__init__, foreach=True), "__module__": __name__})


_ours = optimstate.optim
ASGD = _in_lists(_ours.asgd.ASGD)
SGD = _in_lists(_ours.sgd.SGD)
Adadelta = _in_lists(_ours.adadelta.Adadelta)
Adagrad = _in_lists(_ours.adagrad.Adagrad)
Adam = _in_lists(_ours.adam.Adam)
AdamW = _in_lists(_ours.adamw.AdamW)
Adamax = _in_lists(_ours.adamax.Adamax)
NAdam = _in_lists(_ours.nadam.NAdam)
RAdam = _in_lists(_ours.radam.RAdam)
RMSprop = _in_lists(_ours.rmsprop.RMSprop)
Rprop = _in_lists(_ours.rprop.Rprop)
