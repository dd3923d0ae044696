"""Which algorithm a state belongs to, and what its slots mean."""
