"""Whether a run can resume from a checkpoint, and whether it is the one that was certified."""
