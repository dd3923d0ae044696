"""What optimizer state means: groups, parameters, slots, and where they are in a checkpoint."""
