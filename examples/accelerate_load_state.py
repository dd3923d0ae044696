"""`accelerator.load_state` of a model with a renamed block and a new one; the oracle is state moved by hand."""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from optimstate import Plan
from optimstate.integrations.accelerate import Resume

HERE = Path(sys.argv[1])
PLAN = Plan.from_toml('[[rule]]\nfrom = "old.{p}"\nto = "second.{p}"\n[[rule]]\nfresh = "first.*"\n')


def parts(*blocks: str):
    torch.manual_seed(len(blocks))
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in (*blocks, "head")))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


def train(model, optimizer, scheduler, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        scheduler.step()
    return [loss.item() for loss in losses]


old, new, by_hand = parts("old"), parts("first", "second"), parts("first", "second")
accelerator = Accelerator(cpu=True)
train(*accelerator.prepare(*old), range(3))
accelerator.save_state(str(HERE / "checkpoint"))

accelerator = Accelerator(cpu=True)
resume = Resume(accelerator, PLAN)
prepared = accelerator.prepare(*new)
accelerator.load_state(str(HERE / "checkpoint"))

model, optimizer, scheduler = by_hand
for mine, its in ((model.second, old[0].old), (model.head, old[0].head)):
    mine.load_state_dict(its.state_dict())
    for p, q in zip(mine.parameters(), its.parameters(), strict=True):
        optimizer.state[p] = {slot: value.clone() for slot, value in old[1].state[q].items()}
scheduler.load_state_dict(old[2].state_dict())
optimizer.param_groups[0]["lr"] = old[1].param_groups[0]["lr"]

expected, found = train(*by_hand, range(3, 8)), train(*prepared, range(3, 8))
assert found == expected, (found, expected)
print("the same losses:", found)
