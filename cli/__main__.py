"""Entry point of the `optimstate` command."""
