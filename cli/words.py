"""Options that take one of some words: what a shell completes them to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

__all__ = ["Sort", "dtypes", "formats", "optimizers", "sections"]

Sort = Literal["name", "size", "norm"]  # as `View.sort`, whose module takes longer to import than to print help
WRITABLE = ("torch", "safetensors", "dcp", "deepspeed-universal", "torch-checkpointing")


def _starting(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def formats(incomplete: str) -> list[str]:
    """Containers that can be written."""
    return _starting(WRITABLE, incomplete)


def sections(incomplete: str) -> list[str]:
    """Kinds of sections; a path in the file is taken too."""
    from optimstate.state.sections import KINDS

    return _starting(KINDS, incomplete)


def dtypes(incomplete: str) -> list[str]:
    """`model=bfloat16`: a section or slot, then a dtype."""
    from optimstate.state.sections import KINDS
    from optimstate.surgery.writing.casting import DTYPES

    what, separator, name = incomplete.partition("=")
    if not separator:
        return _starting((f"{kind}=" for kind in (*KINDS, "exp_avg", "exp_avg_sq")), incomplete)
    return [f"{what}={dtype}" for dtype in _starting(DTYPES, name)]


def optimizers(incomplete: str) -> list[str]:
    """Optimizers that state can be converted to."""
    from optimstate.plan.slots.converted_options import TARGETS

    return _starting(TARGETS, incomplete)
