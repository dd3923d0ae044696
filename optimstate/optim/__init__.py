"""Every optimizer of torch.optim, one definition each, with state that carries names."""

from optimstate.optim.adam import Adam
from optimstate.optim.adamw import AdamW
from optimstate.optim.optimizer import Optimizer
from optimstate.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Optimizer"]
