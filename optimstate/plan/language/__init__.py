"""Templates, rules, operations and plan files."""
