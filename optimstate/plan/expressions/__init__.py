"""How one tensor is made from others, as data, and its evaluation."""
