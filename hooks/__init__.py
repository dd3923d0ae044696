"""Hooks that resume a changed model."""
