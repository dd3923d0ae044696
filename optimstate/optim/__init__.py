"""Every optimizer of torch.optim, with the same results bit for bit and a state dict that carries names."""

from optimstate.installed_torch import require_named_parameters, swap_in_optimizer_params_and_state  # isort: split

from optimstate.optim import _functional as _functional
from optimstate.optim import _multi_tensor as _multi_tensor
from optimstate.optim import functional as functional
from optimstate.optim import lr_scheduler, swa_utils
from optimstate.optim._adafactor import Adafactor
from optimstate.optim._muon import Muon
from optimstate.optim._surface import complete
from optimstate.optim.adadelta import Adadelta
from optimstate.optim.adagrad import Adagrad
from optimstate.optim.adam import Adam
from optimstate.optim.adamax import Adamax
from optimstate.optim.adamw import AdamW
from optimstate.optim.asgd import ASGD
from optimstate.optim.lbfgs import LBFGS
from optimstate.optim.nadam import NAdam
from optimstate.optim.optimizer import Optimizer
from optimstate.optim.radam import RAdam
from optimstate.optim.rmsprop import RMSprop
from optimstate.optim.rprop import Rprop
from optimstate.optim.sgd import SGD
from optimstate.optim.sparse_adam import SparseAdam

require_named_parameters()
Adafactor.__module__ = Muon.__module__ = __name__  # as in torch: pickles and messages use the public name
complete(__name__)

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
