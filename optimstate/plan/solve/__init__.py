"""From a plan and a checkpoint to a migration, its inverse, and suggestions."""
