"""The algorithm that a state belongs to, and the meaning of its slots."""
