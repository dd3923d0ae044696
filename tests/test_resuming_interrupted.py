"""`optimstate.resume` interrupted at any call: everything live is as it was, or all of it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, ExponentialLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel

import optimstate
from optimstate.errors import OptimStateError

POINTS = 60
# Not all of torch: a mode of torch that is interrupted while it is left stays as it is.
PLACES = ("/optimstate/", "/hooks/", "/torch/optim/", "/torch/nn/modules/", "/torch/amp/")


class Training:
    """A model with every part that a resumption loads, schedulers within schedulers among them."""

    def __init__(self, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=0.1)
        warmup, decay = LinearLR(self.optimizer, total_iters=3), CosineAnnealingLR(self.optimizer, 9)
        outer = SequentialLR(self.optimizer, [warmup, decay], milestones=[2])
        self.scheduler = ChainedScheduler([outer, ExponentialLR(self.optimizer, 0.9)], optimizer=self.optimizer)
        self.ema = AveragedModel(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (seed + 3), growth_interval=2)
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.scaler.scale(self.model(torch.randn(3, 4)).square().mean()).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.ema.update_parameters(self.model)

    def saved(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def live(self) -> Any:
        """What a program can see: states, options, attributes of schedulers."""
        schedulers = [self.scheduler, *self.scheduler._schedulers, *self.scheduler._schedulers[0]._schedulers]
        return frozen(
            [
                self.saved(),
                [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in self.optimizer.param_groups
                ],
                [
                    {key: value for key, value in vars(each).items() if key not in ("optimizer", "_schedulers")}
                    for each in schedulers
                ],
                sorted(vars(self.optimizer)),
                self.model.training,
            ]
        )

    def resume(self, checkpoint: Any) -> None:
        optimstate.resume(
            checkpoint,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            ema=self.ema,
            scaler=self.scaler,
        )


def frozen(value: Any) -> Any:
    """A value that does not follow its object."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return value if isinstance(value, int | float | str | bool | None) else type(value).__name__


class Interrupting:
    """Raises at one of the calls that are made."""

    def __init__(self, at: int, kind: type[BaseException]) -> None:
        self.at, self.kind, self.calls = at, kind, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not any(part in code.co_filename for part in PLACES):
            return
        if code.co_flags & CO_GENERATOR or code.co_name == "__del__":
            return  # closing a generator is a call too; Python only prints what is raised in it and in finalizers
        self.calls += 1
        if self.calls == self.at:
            raise self.kind

    def run(self, training: Training, checkpoint: Any) -> bool:
        """Whether it came to its end."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            training.resume(checkpoint)
        except (self.kind, OptimStateError):  # a lack of memory while a pickle is read is told as what it is read from
            return False
        finally:
            sys.settrace(before)
        return True


@pytest.mark.parametrize("stored", ["file", "memory"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_resumption_changes_nothing(stored: str, kind: type[BaseException], tmp_path: Path) -> None:
    source = Training(1, 5)
    torch.save(source.saved(), tmp_path / "state.pt")
    checkpoint = tmp_path / "state.pt" if stored == "file" else torch.load(tmp_path / "state.pt", weights_only=True)
    Training(2, 3).resume(checkpoint)  # what is imported late is imported now
    live = Training(2, 3)
    counting = Interrupting(0, kind)
    assert counting.run(live, checkpoint)
    loaded = live.live()
    total = counting.calls
    points = [*range(1, total, max(total // POINTS, 1)), *range(max(total - 60, 1), total, 2)]
    live = Training(2, 3)
    before = live.live()
    assert before != loaded
    interrupted = 0
    for at in points:
        whole = Interrupting(at, kind).run(live, checkpoint)
        after = live.live()
        interrupted += not whole
        if whole or after == loaded:  # it was over but for its report
            live = Training(2, 3)
        else:
            assert after == before, at
    assert interrupted > POINTS // 2
