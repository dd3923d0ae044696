"""The training run behind `optimstate demo`: nothing else imports it."""

from optimstate.installed_torch import require_named_parameters

require_named_parameters()
