"""Training the demo's models, and measuring their loss on held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from optimstate import optim
from optimstate.demo.model import CONTEXT, Reordered, Text, Transformer

__all__ = ["TOKENS", "Curve", "Run"]

BATCH = 8
TOKENS = BATCH * CONTEXT  # characters in one step
WARM_UP = 50  # steps
LR, BETAS, WEIGHT_DECAY = 6e-3, (0.9, 0.99), 0.1
HELD_OUT = 32  # windows

Curve = list[tuple[int, float]]
"""(steps made, loss on held-out text in nats a character)."""


@dataclass
class Run:
    """A model in training, with its optimizer and scheduler.

    Attributes:
        text: The training text.
        seed: The seed of the initial weights and of the batches.
    """

    text: Text
    seed: int
    model: Transformer
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    @classmethod
    def start(
        cls,
        text: Text,
        seed: int,
        *,
        experts: bool = False,
        reordered: bool = False,
        optimizer: type[torch.optim.Optimizer] = optim.AdamW,
    ) -> Run:
        """A run before its first step."""
        torch.manual_seed(seed)
        letters = len(text.alphabet)
        model = Reordered(letters) if reordered else Transformer(letters, experts=experts)
        options: dict[str, Any] = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY, "fused": True}
        made = optimizer(model.named_parameters(), **options)
        scheduler = optim.lr_scheduler.LinearLR(made, start_factor=1 / WARM_UP, total_iters=WARM_UP)
        return cls(text, seed, model, made, scheduler)

    def state_dict(self) -> dict[str, Any]:
        """A checkpoint as training scripts write it."""
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {key: part.state_dict() for key, part in parts.items()}

    def train(
        self, first: int, steps: int, *, every: int, warm_up: int = 0, advance: Callable[[int], None] = lambda _: None
    ) -> Curve:
        """Make steps with the batches after step `first`, and measure the held-out loss in between.

        Args:
            first: The number of steps made before.
            steps: The number of steps to make.
            every: Steps between two measurements of the held-out loss.
            warm_up: Steps in which the learning rate rises from zero to the scheduler's.
            advance: Called after every step.
        """
        curve = [(0, self.held_out_loss())]
        for done in range(1, steps + 1):
            loss = self._loss(self.text.batch(first + done, seed=self.seed, size=BATCH))
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._step(min(done / warm_up, 1.0) if warm_up else 1.0)
            if done % every == 0 or done == steps:
                curve.append((done, self.held_out_loss()))
            advance(1)
        return curve

    def held_out_loss(self) -> float:
        """Mean cross-entropy on held-out text, in nats a character."""
        with torch.no_grad():
            return self._loss(self.text.held_out(HELD_OUT)).item()

    def _loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        codes, following = batch
        return F.cross_entropy(self.model(codes).flatten(0, 1), following.flatten())

    def _step(self, factor: float) -> None:
        groups = self.optimizer.param_groups
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= factor
        self.optimizer.step()
        # LinearLR multiplies the group's learning rate, so it must not include the factor.
        for group, lr in zip(groups, scheduled, strict=True):
            group["lr"] = lr
        self.scheduler.step()
