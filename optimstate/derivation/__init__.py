"""Deriving plans from functions from state dict to state dict, so that nobody has to write them."""
