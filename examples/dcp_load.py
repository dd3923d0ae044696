"""A checkpoint in torchtitan's layout goes on with a renamed block and a new one; the oracle is state moved by hand."""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

import optimstate

HERE = Path(sys.argv[1])
PLAN = optimstate.Plan.from_toml('[[rule]]\nfrom = "old.{p}"\nto = "second.{p}"\n[[rule]]\nfresh = "first.*"\n')


def parts(*blocks: str):
    torch.manual_seed(len(blocks))
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in (*blocks, "head")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def train(model, optimizer, scheduler, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append((model(torch.randn(4, 4, generator=torch.Generator().manual_seed(step))) - 1).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        scheduler.step()
    return [loss.item() for loss in losses]


(model, optimizer, scheduler), hand = parts("old"), parts("first", "second")
train(model, optimizer, scheduler, range(3))
flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
state = {
    **get_model_state_dict(model),
    "optimizer": flat,
    "lr_scheduler": scheduler.state_dict(),
    "train_state": {"step": 3},
}
dcp.save(state, checkpoint_id=HERE / "step-3")
old_model, old_optimizer, old_scheduler = model, optimizer, scheduler

checkpoint_id = HERE / "step-3"
model, optimizer, scheduler = parts("first", "second")
optimstate.resume(checkpoint_id, model=model, optimizer=optimizer, scheduler=scheduler, plan=PLAN)

for p, q in zip(hand[0].parameters(), [None, None, *old_model.parameters()], strict=True):
    if q is not None:
        p.data.copy_(q)
        hand[1].state[p] = {slot: value.clone() for slot, value in old_optimizer.state[q].items()}
hand[1].param_groups[0]["lr"] = old_optimizer.param_groups[0]["lr"]
hand[2].load_state_dict(old_scheduler.state_dict())
found, expected = train(model, optimizer, scheduler, range(3, 8)), train(*hand, range(3, 8))
assert found == expected, (found, expected)
print("the same losses:", found)
