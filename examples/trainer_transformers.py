"""A Trainer run goes on after a block was put in front of the others; the oracle is a checkpoint changed by hand."""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from optimstate.integrations.transformers import ResumeMixin

HERE = Path(sys.argv[1])
(HERE / "plan.toml").write_text(
    '[[rule]]\nfrom = "blocks.{i:int}.{p}"\nto = "blocks.{i+1}.{p}"\n[[rule]]\nfresh = "blocks.0.*"\n'
)


class Net(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(blocks)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))
        self.head, self.losses = nn.Linear(4, 1), []

    def forward(self, x, y):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        self.losses.append((self.head(x) - y).square().mean())
        return {"loss": self.losses[-1]}


class Resumable(ResumeMixin, Trainer): ...


def run(kind: type[Trainer], model: Net, steps: int, checkpoint: Path | None) -> list[float]:
    rows = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i)), "y": torch.ones(1)} for i in range(8)]
    options = {"weight_decay": 0.1, "learning_rate": 1e-2, "max_grad_norm": 0, "per_device_train_batch_size": 2}
    options |= {"save_steps": 4, "lr_scheduler_type": "constant", "use_cpu": True, "report_to": []}
    arguments = TrainingArguments(str(HERE / "out"), max_steps=steps, **options)
    kind(model=model, args=arguments, train_dataset=rows).train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return [loss.item() for loss in model.losses]


run(Resumable, Net(2), 4, None)
old, new = HERE / "out" / "checkpoint-4", HERE / "by-hand"
shutil.copytree(old, new)
weights = {k.replace("s.1", "s.2").replace("s.0", "s.1"): v for k, v in load_file(old / "model.safetensors").items()}
save_file({k: weights.get(k, v) for k, v in Net(3).state_dict().items()}, new / "model.safetensors")
saved = torch.load(old / "optimizer.pt")
places = {0: 1, 1: 2, 2: 3, 3: 5, 4: 6, 5: 7}  # three weights, then three biases, each after that of the new block
state = {places[key]: slots for key, slots in saved["state"].items()}
groups = [{k: v for k, v in g.items() if k != "param_names"} for g in saved["param_groups"]]
groups = [{**g, "params": p} for g, p in zip(groups, ([0, 1, 2, 3], [4, 5, 6, 7]), strict=True)]
torch.save({"state": state, "param_groups": groups}, new / "optimizer.pt")
Resumable.resume_plan = HERE / "plan.toml"
by_hand, resumed = run(Trainer, Net(3), 8, new), run(Resumable, Net(3), 8, old)
assert resumed == by_hand, (resumed, by_hand)
print("the same losses:", resumed)
