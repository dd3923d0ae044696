"""How many threads small tensors are worked on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod

from optimstate.derivation.origins import Source

__all__ = ["few_threads"]

_WORTH_THREADS = 1 << 24  # elements


@contextmanager
def few_threads(sources: Mapping[str, Source]) -> Iterator[None]:
    """One thread as long as it lasts where the sources are small: several, waiting for each other, take twice the time.

    Args:
        sources: What a function is given.
    """
    from optimstate.installed_torch import torch

    before = torch.get_num_threads()
    if sum(prod(source.shape) for source in sources.values()) < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
