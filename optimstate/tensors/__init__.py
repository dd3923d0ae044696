"""Lazy tensors: a dtype, a shape, strides and byte extents in files."""
