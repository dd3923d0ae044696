"""Every optimizer of torch.optim, one definition each, with state that carries names."""

from optimstate.optim.adadelta import Adadelta
from optimstate.optim.adagrad import Adagrad
from optimstate.optim.adam import Adam
from optimstate.optim.adamax import Adamax
from optimstate.optim.adamw import AdamW
from optimstate.optim.asgd import ASGD
from optimstate.optim.nadam import NAdam
from optimstate.optim.optimizer import Optimizer
from optimstate.optim.radam import RAdam
from optimstate.optim.rmsprop import RMSprop
from optimstate.optim.rprop import Rprop
from optimstate.optim.sgd import SGD

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
]
