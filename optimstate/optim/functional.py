"""Every algorithm as a function of lists; torch has this module since 2.15."""

from optimstate.optim._functional import *  # noqa: F403
from optimstate.optim._functional import __all__ as __all__
