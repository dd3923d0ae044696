"""Compare trees read from files with the objects torch loads from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from optimstate.tensors.lazy import LazyTensor


def raw(tensor: torch.Tensor) -> bytes:
    """The elements' bytes in row-major order."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return (
        bytes(plain.view(torch.uint8).reshape(-1).tolist())
        if plain.ndim
        else bytes(plain.reshape(1).view(torch.uint8).tolist())
    )


def differs(lazy: Any, live: Any, where: str = "") -> str | None:
    """The first place where a tree of lazy tensors is not what torch loaded, bit for bit."""
    if isinstance(live, torch.Tensor):
        if not isinstance(lazy, LazyTensor):
            return f"{where}: {lazy!r} is not a tensor"
        about = (lazy.dtype, lazy.shape, lazy.requires_grad)
        expected = (str(live.dtype).removeprefix("torch."), tuple(live.shape), live.requires_grad)
        if about != expected:
            return f"{where}: {about} != {expected}"
        return None if lazy.tobytes() == raw(live) else f"{where}: contents differ"
    if isinstance(live, Mapping):
        if not isinstance(lazy, Mapping) or isinstance(lazy, OrderedDict) != isinstance(live, OrderedDict):
            return f"{where}: {type(lazy)} != {type(live)}"
        if list(lazy) != list(live):
            return f"{where}: {list(lazy)} != {list(live)}"
        return next((d for key in live if (d := differs(lazy[key], live[key], f"{where}[{key!r}]"))), None)
    if isinstance(live, list | tuple):
        if type(lazy) is not type(live) or len(lazy) != len(live):
            return f"{where}: {lazy!r} != {live!r}"
        pairs = enumerate(zip(lazy, live, strict=True))
        return next((d for index, (a, b) in pairs if (d := differs(a, b, f"{where}[{index}]"))), None)
    same = type(lazy) is type(live) and (lazy == live or (lazy != lazy and live != live))
    return None if same else f"{where}: {lazy!r} != {live!r}"
