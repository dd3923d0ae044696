"""Plans found, checked against checkpoints, shown and inverted."""
