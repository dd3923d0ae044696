"""A migration carried out on a checkpoint."""
