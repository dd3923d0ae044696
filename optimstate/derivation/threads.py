"""Limiting the number of torch's threads for small tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod

from optimstate.derivation.origins import Source

__all__ = ["few_threads"]

_WORTH_THREADS = 1 << 24  # elements


@contextmanager
def few_threads(sources: Mapping[str, Source]) -> Iterator[None]:
    """Use one thread during the block if the sources are small, because several would take twice the time.

    Args:
        sources: The sources of a function.
    """
    from optimstate.installed_torch import torch

    before = torch.get_num_threads()
    if sum(prod(source.shape) for source in sources.values()) < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
