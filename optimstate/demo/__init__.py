"""The training runs of `optimstate demo`; nothing else imports this package."""

from optimstate.installed_torch import require_named_parameters

require_named_parameters()
