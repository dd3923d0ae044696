"""Pickles read and written as inert data: nothing in them is called."""
