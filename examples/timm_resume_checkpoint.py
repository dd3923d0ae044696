"""A vision transformer of timm goes on with another block and more classes; the oracle is state moved by hand."""

import sys
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

from optimstate import Plan
from optimstate.integrations.timm import resume_checkpoint

HERE = Path(sys.argv[1])
PLAN = Plan.from_toml(
    '[[rule]]\nfrom = "blocks.1.{p**}"\nto = "blocks.2.{p}"\n[[rule]]\nfresh = "blocks.1.**"\n'
    '[[rule]]\nfrom = "head.{p}"\nto = "head.{p}"\nresize = { dim = 0, size = 7, fill = 0.0 }\n'
)


def parts(depth: int, classes: int):
    torch.manual_seed(depth)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0}
    model = timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=classes, **sizes)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    return model, optimizer, ModelEmaV3(model, decay=0.5)


def train(model, optimizer, average, steps: range) -> list[float]:
    losses = []
    for step in steps:
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        losses.append(torch.nn.functional.cross_entropy(model(images), torch.arange(4)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        average.update(model)
    return [loss.item() for loss in losses]


old, new, hand = parts(2, 4), parts(3, 7), parts(3, 7)
train(*old, range(4))
saver = CheckpointSaver(old[0], old[1], model_ema=old[2], checkpoint_dir=str(HERE), recovery_dir=str(HERE))
saver.save_checkpoint(epoch=3)
start = resume_checkpoint(new[0], HERE / "last.pth.tar", new[1], model_ema=new[2], plan=PLAN)
assert start == 4

grown = lambda t, like: torch.cat([t, t.new_zeros(3, *t.shape[1:])]) if t.shape != like.shape and t.dim() else t  # noqa: E731
was = dict(old[0].named_parameters())
averages = old[2].module.state_dict()
for (name, p), average in zip(hand[0].named_parameters(), hand[2].module.parameters(), strict=True):
    if ".1." not in name:
        source = name.replace("blocks.2", "blocks.1")
        p.data.copy_(grown(was[source].data, p))
        average.data.copy_(grown(averages[source], p))
        hand[1].state[p] = {key: grown(value, p) for key, value in old[1].state[was[source]].items()}
found, expected = train(*new, range(4, 8)), train(*hand, range(4, 8))
assert found == expected, (found, expected)
assert all(torch.equal(a, b) for a, b in zip(new[2].module.parameters(), hand[2].module.parameters(), strict=True))
print("the same losses:", found)
