"""Writing checkpoints: renamed, converted, cast, named, with parts left out or options set."""
