"""Pairs of models: the same function before and after a change of architecture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 8


class Twins(nn.Module):
    """Two equal layers whose names can swap meaning."""

    def __init__(self, first: str = "a", second: str = "b", order: tuple[str, ...] = ()) -> None:
        super().__init__()
        made = {first: nn.Linear(WIDTH, WIDTH), second: nn.Linear(WIDTH, WIDTH), "out": nn.Linear(WIDTH, 1)}
        for name in order or made:
            self.add_module(name, made[name])
        self.names = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(getattr(self, self.names[0])(x))
        return self.out(torch.tanh(getattr(self, self.names[1])(x)))


class Attention(nn.Module):
    """One block of attention; `form` says how queries, keys and values are kept."""

    def __init__(self, form: str, heads: int = 2) -> None:
        super().__init__()
        self.form, self.heads = form, heads
        if form == "separate":
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        else:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def _qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.form == "separate":
            return self.q(x), self.k(x), self.v(x)
        whole = self.qkv(x)
        if self.form == "fused":
            return whole.chunk(3, -1)
        per_head = whole.unflatten(-1, (self.heads, 3, WIDTH // self.heads))  # interleaved: head, then q, k, v
        return tuple(per_head[:, :, i].flatten(-2) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in self._qkv(x))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(-2)
        return self.out(self.norm(mixed + x))


class Feed(nn.Module):
    """A dense layer, or several of them averaged, as separate modules or stacked in one parameter."""

    def __init__(self, experts: int = 0, stacked: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        if stacked:
            self.experts = nn.ParameterDict(
                {"weight": torch.randn(experts, WIDTH, WIDTH), "bias": torch.randn(experts, WIDTH)}
            )
        elif experts:
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))
        else:
            self.mlp = nn.Linear(WIDTH, WIDTH)
        self.count, self.stacked = experts, stacked
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inner(x))
        if not self.count:
            x = self.mlp(x)
        elif self.stacked:
            x = sum(F.linear(x, self.experts["weight"][e], self.experts["bias"][e]) for e in range(self.count))
        else:
            x = sum(expert(x) for expert in self.experts)
        return self.out(torch.tanh(x))


class Deeper(nn.Module):
    """A stack of layers, optionally with a new one in front that starts as nothing."""

    def __init__(self, depth: int, front: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth + front))
        if front:
            nn.init.zeros_(self.layers[0].weight)
            nn.init.zeros_(self.layers[0].bias)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)


class Tied(nn.Module):
    """A vocabulary whose embedding is also its head."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x.abs() * 3).long() % 11
        return self.head(torch.tanh(self.body(self.embed(words)))).mean((-1, -2), keepdim=False).unsqueeze(-1)
