"""`CheckpointManager.load` of torchtitan with a renamed block and a new one; the oracle is state moved by hand."""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from optimstate import Plan
from optimstate.integrations.torchtitan import Resume

HERE = Path(sys.argv[1])
PLAN = Plan.from_toml('[[rule]]\nfrom = "old.{p}"\nto = "second.{p}"\n[[rule]]\nfresh = "first.*"\n')
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def parts(*blocks: str):
    torch.manual_seed(len(blocks))
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in (*blocks, "head")))
    kinds = [("bias$", "Adam"), (".*", "AdamW")]
    groups = [ParamGroupConfig(pattern=p, optimizer_name=kind, optimizer_kwargs={"lr": 1e-2}) for p, kind in kinds]
    config = OptimizersContainer.Config(param_groups=groups, implementation="for-loop")
    optimizers = OptimizersContainer(config, model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=10)
    config = CheckpointManager.Config(enable=True, interval=3)
    rest = {"dataloader": None, "states": {}, "sd_adapter": None, "base_folder": str(HERE)}
    manager = CheckpointManager(config, model_parts=[model], optimizers=optimizers, lr_schedulers=schedulers, **rest)
    return model, optimizers, schedulers, manager


def train(model, optimizers, schedulers, _, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append((model(torch.randn(4, 4, generator=torch.Generator().manual_seed(step))) - 1).square().mean())
        optimizers.zero_grad()
        losses[-1].backward()
        optimizers.step()
        schedulers.step()
    return [loss.item() for loss in losses]


old, new, hand = parts("old"), parts("first", "second"), parts("first", "second")
train(*old, range(3))
old[3].save(3)
Resume(new[3], PLAN)
new[3].load()

for mine, its in zip(hand[1], old[1], strict=True):  # the optimizers: of the biases, and of the weights
    for p, q in zip(mine.param_groups[0]["params"], [None, *its.param_groups[0]["params"]], strict=True):
        if q is not None:
            p.data.copy_(q)
            mine.state[p] = {slot: value.clone() for slot, value in its.state[q].items()}
    mine.param_groups[0]["lr"] = its.param_groups[0]["lr"]
hand[2].load_state_dict(old[2].state_dict())
found, expected = train(*new, range(3, 8)), train(*hand, range(3, 8))
assert found == expected, (found, expected)
print("the same losses:", found)
