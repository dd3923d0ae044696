"""Every algorithm as a function of lists, as in `torch.optim._functional`."""

from __future__ import annotations

import torch.optim._functional

from optimstate.optim._adafactor import adafactor
from optimstate.optim._muon import muon
from optimstate.optim._surface import function_of
from optimstate.optim.adadelta import adadelta
from optimstate.optim.adagrad import adagrad
from optimstate.optim.adam import adam
from optimstate.optim.adamax import adamax
from optimstate.optim.adamw import adamw
from optimstate.optim.asgd import asgd
from optimstate.optim.nadam import nadam
from optimstate.optim.radam import radam
from optimstate.optim.rmsprop import rmsprop
from optimstate.optim.rprop import rprop
from optimstate.optim.sgd import sgd
from optimstate.optim.sparse_adam import SparseAdam, lists_step

__all__ = [
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "asgd",
    "muon",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sparse_adam",
]

sparse_adam = function_of(SparseAdam, lists_step, signature_of=torch.optim._functional.sparse_adam)
sparse_adam.__module__ = __name__
