"""Checkpoints written anew: renamed, converted, cast, named, with parts left out or options set."""
