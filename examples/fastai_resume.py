"""A learner of fastai, with its own Adam, after a rename and with another block; the oracle is moved by hand."""

import sys
from collections import OrderedDict
from pathlib import Path

import fastai.callback.progress  # noqa: F401
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn

from optimstate import Plan
from optimstate.integrations.fastai import resume_learner

HERE = Path(sys.argv[1])
PLAN = Plan.from_toml('[[rule]]\nfrom = "old.{p}"\nto = "second.{p}"\n[[rule]]\nfresh = "first.*"\n')
losses = []


def loss(found, _):
    losses.append((found - 1).square().mean())
    return losses[-1]


def parts(model: nn.Module):  # with another rate for the head
    return [[p for name, p in model.named_parameters() if not name.startswith("head")], list(model.head.parameters())]


def learner(*blocks: str) -> Learner:
    torch.manual_seed(len(blocks))
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in (*blocks, "head")))
    rows = [(torch.arange(16.0).reshape(4, 4) / 16, torch.zeros(4))]
    data = DataLoaders(DataLoader(rows, bs=None), DataLoader(rows, bs=None))
    return Learner(data, model, loss_func=loss, splitter=parts, lr=slice(1e-3, 1e-2), path=HERE, model_dir=".")


def fit(learn: Learner) -> list[float]:
    losses.clear()
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, lr=slice(1e-3, 1e-2))
    return [found.item() for found in losses]


old, learn, hand = learner("old"), learner("first", "second"), learner("first", "second")
fit(old)
old.save("before")
resume_learner(learn, HERE / "before.pth", plan=PLAN)

hand.create_opt()
for p, q in zip(hand.model.parameters(), [None, None, *old.model.parameters()], strict=True):
    if q is not None:
        p.data.copy_(q)
        kept = old.opt.state[q].items()
        hand.opt.state[p] = {slot: value.clone() if hasattr(value, "clone") else value for slot, value in kept}
found, expected = fit(learn), fit(hand)
assert found == expected, (found, expected)
print("the same losses:", found)
