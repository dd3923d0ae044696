"""The training run behind `optimstate demo`: nothing else imports it."""
