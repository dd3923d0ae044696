"""Composer's `load_path` with a model that has a renamed part and another block; the oracle is moved by hand."""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from composer import Trainer
from composer.models import ComposerModel
from torch import nn

import optimstate

HERE = Path(sys.argv[1])
PLAN = optimstate.Plan.from_options(rename=["net.old=net.second"], fresh=["net.first"])


class Task(ComposerModel):
    def __init__(self, *blocks: str) -> None:
        super().__init__()
        torch.manual_seed(len(blocks))
        self.net = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in (*blocks, "head")))
        self.losses = []

    def forward(self, batch):
        return self.net(batch)

    def loss(self, outputs, _):
        self.losses.append((outputs - 1).square().mean())
        return self.losses[-1]


def trainer(model: Task, batches: int, **options) -> Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.utils.data.DataLoader(torch.arange(32.0).reshape(8, 4) / 32, batch_size=4)
    options |= {"save_interval": "1ep", "progress_bar": False, "device": "cpu", "save_overwrite": True}
    return Trainer(model=model, optimizers=optimizer, train_dataloader=data, max_duration=f"{batches}ba", **options)


old, new, hand = Task("old"), Task("first", "second"), Task("first", "second")
first = trainer(old, 4, save_folder=str(HERE), save_filename="last.pt")
first.fit()

ignored = ["state/model", "state/optimizers", "state/schedulers"]
second = trainer(new, 8, load_path=str(HERE / "last.pt"), load_ignore_keys=ignored)
state = second.state
optimstate.resume(HERE / "last.pt", model=state.model, optimizer=state.optimizers[0], plan=PLAN)
assert state.timestamp.batch == 4
second.fit()

third = trainer(hand, 4)
for p, q in zip(hand.parameters(), [None, None, *old.parameters()], strict=True):
    if q is not None:
        p.data.copy_(q)
        state = first.state.optimizers[0].state[q]
        third.state.optimizers[0].state[p] = {slot: value.clone() for slot, value in state.items()}
third.fit()
found, expected = ([loss.item() for loss in task.losses] for task in (new, hand))
assert found == expected, (found, expected)
print("the same losses:", found)
