"""A small character-level transformer, dense or with experts, and its training text."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["CONTEXT", "EXPERTS", "Reordered", "Text", "Transformer", "read_text"]

CONTEXT = 64  # characters that the model sees
WIDTH = 64
LAYERS = 2
HEADS = 4
EXPERTS = 4
ACTIVE = 2  # experts for each character


class Text:
    """Text as character codes, cut into windows.

    Args:
        text: At least some thousands of characters; the last tenth is held out.
    """

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        index = {letter: code for code, letter in enumerate(self.alphabet)}
        codes = torch.tensor([index[letter] for letter in text])  # int64[characters]
        self.size = len(codes)
        self._train, self._held_out = codes[: self.size * 9 // 10], codes[self.size * 9 // 10 :]

    def batch(self, step: int, *, seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, both int64[size, CONTEXT], which depend only on seed and step."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)
        return self._windows(self._train, torch.randint(len(self._train) - CONTEXT, (size,), generator=generator))

    def held_out(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Evenly spaced windows of the held-out part."""
        return self._windows(self._held_out, torch.linspace(0, len(self._held_out) - CONTEXT - 1, size).long())

    @staticmethod
    def _windows(codes: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        windows = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
        return windows[:, :-1], windows[:, 1:]


def read_text() -> Text:
    """The help topics of Python's `pydoc`: some 450,000 characters, which are part of every CPython."""
    from pydoc_data.topics import topics

    joined = "\n".join(topics[name] for name in sorted(topics))
    return Text(joined.encode("ascii", "replace").decode("ascii"))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[batch, CONTEXT, WIDTH] to the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Dense(nn.Module):
    """The usual two linear layers after attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[..., WIDTH] to the same."""
        out: torch.Tensor = self.fc2(F.relu(self.fc1(x)))
        return out


class Experts(nn.Module):
    """Several dense layers. For each character, a router mixes the outputs of `ACTIVE` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Dense() for _ in range(EXPERTS))
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[batch, CONTEXT, WIDTH] to the same."""
        flat = x.flatten(0, 1)
        scores, chosen = self.router(flat).topk(ACTIVE)
        weights = scores.softmax(-1)
        mixed = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            mixed = mixed.index_add(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return mixed.view_as(x)


class Layer(nn.Module):
    """Attention, then a dense layer or experts, each with a residual path around it."""

    def __init__(self, mlp: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32[batch, CONTEXT, WIDTH] to the same."""
        x = x + self.attention(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """A transformer that predicts the next character.

    Args:
        letters: The size of the alphabet.
        experts: Whether the layers have experts.
    """

    def __init__(self, letters: int, *, experts: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.declare_layers(Experts if experts else Dense)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, letters)

    def declare_layers(self, mlp: type[nn.Module]) -> None:
        """Create the layers between the embeddings and the head."""
        self.layers = nn.ModuleList(Layer(mlp) for _ in range(LAYERS))

    def in_order(self) -> list[nn.Module]:
        """The layers in the order in which they are applied."""
        return list(self.layers)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """int64[batch, CONTEXT] to scores of the next character, float32[batch, CONTEXT, letters]."""
        x = self.embed(codes) + self.position.weight
        for layer in self.in_order():
            x = layer(x)
        scores: torch.Tensor = self.head(self.norm(x))
        return scores


class Reordered(Transformer):
    """The same function with another name for its layers, which are declared in reverse order."""

    def declare_layers(self, mlp: type[nn.Module]) -> None:
        """Create the layers in reverse order."""
        self.blocks = nn.ModuleDict({str(number): Layer(mlp) for number in reversed(range(LAYERS))})

    def in_order(self) -> list[nn.Module]:
        """The layers in the order in which they are applied."""
        return [self.blocks[str(number)] for number in range(LAYERS)]
