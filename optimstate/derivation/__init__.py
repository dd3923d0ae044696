"""Plans that nobody has to write: what a function from state dict to state dict does, said in the plan language."""
