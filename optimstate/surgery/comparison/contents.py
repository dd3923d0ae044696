"""Comparing and recognising tensors by their contents."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from optimstate.io.extents import Progress
from optimstate.surgery.comparison.views import Key
from optimstate.tensors.lazy import LazyTensor, consecutive

__all__ = ["by_content", "relative_difference", "renames"]

K = TypeVar("K")


def renames(removed: dict[Key, Any], added: dict[Key, Any], progress: Progress) -> dict[Key, Key]:
    """Pairs of equal type, shape and content; content that several tensors have (zeros, ones) decides nothing."""
    kinds = {(t.dtype, t.shape) for t in added.values() if isinstance(t, LazyTensor)}
    mine = by_content(_of_kinds(removed, kinds), progress)
    if not mine:
        return {}
    kinds = {(removed[name].dtype, removed[name].shape) for names in mine.values() for name in names}
    theirs = by_content(_of_kinds(added, kinds), progress)
    return {
        names[0]: theirs[key][0] for key, names in mine.items() if len(names) == 1 and len(theirs.get(key, ())) == 1
    }


def _of_kinds(tensors: dict[Key, Any], kinds: Collection[tuple[str, tuple[int, ...]]]) -> dict[Key, LazyTensor]:
    return {n: t for n, t in tensors.items() if isinstance(t, LazyTensor) and (t.dtype, t.shape) in kinds}


def by_content(
    tensors: Mapping[K, LazyTensor], progress: Progress | None = None
) -> dict[tuple[str, tuple[int, ...], bytes], list[K]]:
    """The names of each content: a dtype, a shape and a digest of the elements.

    Args:
        tensors: By name; all are read.
        progress: Called with the bytes read since the last call.
    """
    from hashlib import blake2b  # takes milliseconds, and most files have nothing to find by content

    found: dict[tuple[str, tuple[int, ...], bytes], list[K]] = {}
    for (name, tensor), blocks in zip(tensors.items(), consecutive(tensors.values()), strict=True):
        digest = blake2b(digest_size=16)
        for block in blocks:
            digest.update(block)
            if progress is not None:
                progress(len(block))
        found.setdefault((tensor.dtype, tensor.shape, digest.digest()), []).append(name)
    return found


def relative_difference(a: LazyTensor, b: LazyTensor) -> float | None:
    """|a - b| / |a| in double precision, block by block; None where elements are not numbers torch can subtract."""
    from optimstate.surgery.statistics import blocks, can_be_read

    if not a.numel or not can_be_read(a) or not can_be_read(b):
        return None

    difference = norm = 0.0
    pairs = zip(blocks(a), blocks(b), strict=True)
    for x, y in pairs:
        difference += float(((x - y).abs() ** 2).sum())
        norm += float((x.abs() ** 2).sum())
    return float((difference / norm) ** 0.5) if norm else float("inf")
