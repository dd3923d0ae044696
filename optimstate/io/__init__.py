"""Bytes: extents of files, copying them, and outputs that appear whole or not at all."""
