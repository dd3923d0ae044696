"""Every optimizer of torch.optim, one definition each, with state that carries names."""

from optimstate.installed_torch import require_named_parameters, swap_in_optimizer_params_and_state  # isort: split

from optimstate.optim import lr_scheduler, swa_utils
from optimstate.optim.adadelta import Adadelta
from optimstate.optim.adafactor import Adafactor
from optimstate.optim.adagrad import Adagrad
from optimstate.optim.adam import Adam
from optimstate.optim.adamax import Adamax
from optimstate.optim.adamw import AdamW
from optimstate.optim.asgd import ASGD
from optimstate.optim.lbfgs import LBFGS
from optimstate.optim.muon import Muon
from optimstate.optim.nadam import NAdam
from optimstate.optim.optimizer import Optimizer
from optimstate.optim.radam import RAdam
from optimstate.optim.rmsprop import RMSprop
from optimstate.optim.rprop import Rprop
from optimstate.optim.sgd import SGD
from optimstate.optim.sparse_adam import SparseAdam

require_named_parameters()

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "lr_scheduler",
    "swa_utils",
    "swap_in_optimizer_params_and_state",
]
