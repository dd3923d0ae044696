"""Optimizers of torch, of this package and of other libraries, as the tests of hooks make them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import lion_pytorch
import schedulefree
import torch

import optimstate.optim

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing them says of other libraries
    import bitsandbytes
    import pytorch_optimizer

Make = Callable[..., torch.optim.Optimizer]

BUILT_IN: dict[str, Make] = {
    "torch.AdamW": torch.optim.AdamW,
    "optimstate.AdamW": optimstate.optim.AdamW,
}
OTHERS: dict[str, Make] = {
    "Lion": lion_pytorch.Lion,
    "AdamWScheduleFree": schedulefree.AdamWScheduleFree,
    "SGDScheduleFree": schedulefree.SGDScheduleFree,
    "bnb.AdamW": bitsandbytes.optim.AdamW,
    "bnb.AdamW8bit": lambda params, **options: bitsandbytes.optim.AdamW8bit(params, min_8bit_size=1, **options),
    **{
        name: getattr(pytorch_optimizer, name)
        for name in ("AdaBelief", "AdEMAMix", "Adan", "CAME", "Lamb", "Prodigy", "SOAP", "Shampoo", "StableAdamW")
    },
}
# Those that treat every element alike, so that fused, split and grown tensors train as before.
ELEMENTWISE = BUILT_IN | {name: OTHERS[name] for name in ("Lion", "bnb.AdamW", "AdaBelief")}
OTHERS_WARN = ("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def runs_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it loads as torch does: bitsandbytes runs no hooks, pytorch_optimizer returns to the unadapted dict."""
    return not type(optimizer).__module__.startswith(("bitsandbytes", "pytorch_optimizer"))
