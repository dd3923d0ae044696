"""The optimizers of bitsandbytes, whose 8-bit blocks are recognised by their dtype."""

from __future__ import annotations

from optimstate.state.algorithms.slots import (
    GRADIENT,
    OPAQUE,
    SCALAR,
    SQUARE,
    Algorithm,
    algorithm,
)

__all__ = ["ALGORITHMS", "TABLES"]

TABLES = frozenset({"qmap1", "qmap2"})
"""Tables with the values of codes. No step changes them, so the library lets parameters share them."""

_QUANTIZED = {"state1": GRADIENT, "state2": SQUARE, "step": SCALAR} | dict.fromkeys(
    ("qmap1", "qmap2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2", "gnorm_vec", "unorm_vec"), OPAQUE
)

ALGORITHMS: tuple[Algorithm, ...] = (
    # 32-bit states have the parameter's shape; 8-bit blocks are recognised by their dtype.
    algorithm("bitsandbytes", {**_QUANTIZED, "__bnb_optimizer_quant_state__": OPAQUE}, "betas eps lr", lacks="foreach"),
)
