"""The optimizers with ``foreach=True`` by default, as in `torch.optim._multi_tensor`."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

from optimstate.optim import adadelta, adagrad, adam, adamax, adamw, asgd, nadam, radam, rmsprop, rprop, sgd

__all__ = ["ASGD", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"]


def _in_lists(cls: Any) -> Any:
    return type(cls.__name__, (cls,), {"__init__": partialmethod(cls.__init__, foreach=True), "__module__": __name__})


ASGD = _in_lists(asgd.ASGD)
SGD = _in_lists(sgd.SGD)
Adadelta = _in_lists(adadelta.Adadelta)
Adagrad = _in_lists(adagrad.Adagrad)
Adam = _in_lists(adam.Adam)
AdamW = _in_lists(adamw.AdamW)
Adamax = _in_lists(adamax.Adamax)
NAdam = _in_lists(nadam.NAdam)
RAdam = _in_lists(radam.RAdam)
RMSprop = _in_lists(rmsprop.RMSprop)
Rprop = _in_lists(rprop.Rprop)
