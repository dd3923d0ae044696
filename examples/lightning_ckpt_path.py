"""`trainer.fit(ckpt_path=...)` after the vocabulary grew and a part was renamed; the oracle is state moved by hand."""

import sys
from pathlib import Path

import pytorch_lightning as lightning
import torch
from torch import nn

from optimstate import Plan
from optimstate.integrations.lightning import ResumeCallback

HERE = Path(sys.argv[1])
PLAN = Plan.from_toml(
    '[[rule]]\nfrom = "emb.weight"\nto = "embed.weight"\nresize = { dim = 0, size = 9, fill = 0.0 }\n'
)


class Net(lightning.LightningModule):
    def __init__(self, name: str, words: int) -> None:
        super().__init__()
        torch.manual_seed(words)
        self.add_module(name, nn.Embedding(words, 4))
        self.head, self.losses, self.name = nn.Linear(4, 1), [], name

    def training_step(self, batch, _):
        self.losses.append(self.head(getattr(self, self.name)(batch[0])).square().mean())
        return self.losses[-1]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(net: Net, epochs: int, *callbacks, path: str | None = None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=HERE,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.arange(12) % 6)
    trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=path)
    return trainer


old = Net("emb", 6)
fit(old, 2).save_checkpoint(HERE / "last.ckpt")
new = Net("embed", 9)
fit(new, 4, ResumeCallback(PLAN), path=str(HERE / "last.ckpt"))

saved, hand = torch.load(HERE / "last.ckpt", weights_only=False), Net("embed", 9)
grow = lambda t: torch.cat([t, torch.zeros(3, 4)]) if t.shape == (6, 4) else t  # noqa: E731
weights = {k.replace("emb.", "embed."): grow(v) for k, v in saved["state_dict"].items()}
state = saved["optimizer_states"][0]["state"]
saved["optimizer_states"][0]["state"] = {k: {n: grow(v) for n, v in s.items()} for k, s in state.items()}
torch.save({**saved, "state_dict": weights}, HERE / "by-hand.ckpt")
fit(hand, 4, path=str(HERE / "by-hand.ckpt"))

found, expected = ([loss.item() for loss in net.losses] for net in (new, hand))
assert found == expected, (found, expected)
print("the same losses:", found)
