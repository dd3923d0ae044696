"""What becomes of the slots of a parameter that moves."""
