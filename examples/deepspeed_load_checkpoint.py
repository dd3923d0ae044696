"""`engine.load_checkpoint` with ZeRO of a renamed block and a new one before it; the oracle is moved by hand."""

import os
import sys
from collections import OrderedDict
from pathlib import Path

import deepspeed
import torch
from torch import nn

from optimstate import Plan
from optimstate.integrations.deepspeed import Resume

HERE, STAGE = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
PLAN = Plan.from_toml('[[rule]]\nfrom = "old.{p}"\nto = "second.{p}"\n[[rule]]\nfresh = "first.*"\n')
CONFIG = {"train_batch_size": 4, "zero_optimization": {"stage": STAGE}, "gradient_clipping": 0.0}
CONFIG |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29637"}
os.environ.update(ALONE | os.environ)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for several processes


def parts(*blocks: str):
    torch.manual_seed(len(blocks))
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in (*blocks, "head")))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, backward, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append((model(torch.randn(4, 4, generator=torch.Generator().manual_seed(step))) - 1).square().mean())
        backward(losses[-1])
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


def engine(model, optimizer):
    return deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]


old, new = engine(*parts("old")), engine(*parts("first", "second"))
train(old, old.backward, old, range(3))
old.save_checkpoint(str(HERE), client_state={"seen": 12})
Resume(new, PLAN)
_, client_state = new.load_checkpoint(str(HERE))
assert (client_state["seen"], new.global_steps) == (12, 3)

(model, optimizer), (was, adam) = parts("first", "second"), parts("old")
train(was, torch.Tensor.backward, adam, range(3))
for p, q in zip(model.parameters(), [None, None, *was.parameters()], strict=True):
    new_step = torch.tensor(3.0 if STAGE else 0.0)  # ZeRO keeps one step for all parameters of a group
    slots = adam.state[q] if q is not None else {"exp_avg": p * 0, "exp_avg_sq": p * 0, "step": new_step}
    optimizer.state[p] = {key: value.detach().clone() for key, value in slots.items()}
    p.data.copy_(p if q is None else q)
found = train(new, new.backward, new, range(3, 8))
assert found == (by_hand := train(model, torch.Tensor.backward, optimizer, range(3, 8))), (found, by_hand)
print("the same losses:", found)
