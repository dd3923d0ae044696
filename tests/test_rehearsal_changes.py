"""Every kind of change of the cookbook: the right plan raises no alarm, and each loss of state is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate import Plan
from optimstate.rehearsal import rehearse
from tests.test_rehearsal import FUSE, INTERLEAVE, Attention

WORDS = torch.arange(8).reshape(2, 4)
ADAM = partial(torch.optim.AdamW, lr=1e-2)


class Layer(nn.Module):
    def __init__(self, fused: str, turned: bool, experts: int, scaled: float) -> None:
        super().__init__()
        self.attn = Attention(fused)
        self.mlp = nn.Linear(8, 6)
        self.turned, self.scaled = turned, scaled
        self.down: nn.Module = nn.Linear(6, 8)
        if experts:
            self.down = nn.ModuleList(nn.Linear(6, 8) for _ in range(experts))
        if turned:
            self.mlp.weight = nn.Parameter(self.mlp.weight.T.contiguous())
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        weight = self.mlp.weight.T if self.turned else self.mlp.weight / self.scaled
        y = nn.functional.linear(x, weight, self.mlp.bias).tanh()
        several = isinstance(self.down, nn.ModuleList)
        y = torch.stack([expert(y) for expert in self.down]).mean(0) if several else self.down(y)
        made: torch.Tensor = self.norm((x + y).transpose(1, 2))
        return made.transpose(1, 2)


class Net(nn.Module):
    def __init__(
        self, layers: int = 2, words: int = 8, home: str = "layers", fused: str = "", turned: bool = False,
        experts: int = 0, scaled: float = 1.0, tied: bool = False, early_head: bool = False, extra: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if early_head:
            self.head = nn.Linear(8, words, bias=False)
        self.embed = nn.Embedding(words, 8)
        self.home = home
        self.add_module(home, nn.ModuleList(Layer(fused, turned, experts, scaled) for _ in range(layers)))
        if not early_head:
            self.head = nn.Linear(8, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if extra:
            self.side = nn.Linear(8, 3)

    def forward(self, words: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(words)
        for layer in getattr(self, self.home):
            x = layer(x)
        made = {"logits": self.head(x)}
        return {**made, "side": self.side(x)} if hasattr(self, "side") else made


class Wrapped(nn.Module):
    def __init__(self, **kind: Any) -> None:
        super().__init__()
        self.module = Net(**kind)

    def forward(self, words: torch.Tensor) -> Any:
        return self.module(words)


def loss(model: nn.Module, words: torch.Tensor) -> Any:
    made = model(words)
    return nn.functional.cross_entropy(made["logits"].flatten(0, 1), words.roll(1).flatten()), made


Build = Callable[[], Any]


def run(kind: type[nn.Module] = Net, optimizer: Any = ADAM, scheduled: bool = False, **options: Any) -> Build:
    def build() -> Any:
        torch.manual_seed(0)
        model = kind(**options)
        made = optimizer(model.named_parameters())
        if scheduled:
            return model, made, torch.optim.lr_scheduler.CosineAnnealingLR(made, 9)
        return model, made

    return build


def by_decay(named: Any) -> Any:
    named = list(named)
    matrices, rest = ([(n, p) for n, p in named if (p.dim() > 1) is many] for many in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


def two(named: Any) -> list[torch.optim.Optimizer]:
    named = list(named)
    one, rest = ([(n, p) for n, p in named if n.startswith("layers") is many] for many in (True, False))
    return [torch.optim.SGD(one, lr=1e-2, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)]


def with_muon(named: Any) -> list[torch.optim.Optimizer]:
    named = list(named)
    matrices, rest = (
        [(n, p) for n, p in named if (n.startswith("layers") and p.dim() == 2) is m] for m in (True, False)
    )
    return [torch.optim.Muon(matrices, lr=1e-2, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)]


BY_DECAY = (
    '[[group]]\nmatch = ["embed.weight", "head.weight", "layers.*.attn.*.weight", "layers.*.mlp.weight", '
    '"layers.*.down.weight"]\n[[group]]\nmatch = "**"\nset = { weight_decay = 0.0 }\n'
)
MUON = (
    '[[optimizer]]\npath = "muon"\nmatch = ["layers.*.attn.*.weight", "layers.*.mlp.weight", "layers.*.down.weight"]\n'
    'algorithm = "Muon"\nset = { momentum = 0.9, lr = 0.01 }\n[[optimizer]]\npath = "adamw"\nmatch = "**"\n'
)
CUT = '[[rule]]\nfrom = "attn.qkv.{p}"\nto = "attn.{x=q|k|v}.{p}"\nsplit = 0\n'
BLOCKS = '[[rule]]\nfrom = "layers.{p**}"\nto = "blocks.{p}"\n'
EXACT, NEAR = "exact", "approximate"

# name: old run, new run, plan, verdict
CHANGES: dict[str, tuple[Build, Build, str, str]] = {
    "nothing": (run(), run(), "", EXACT),
    "renamed": (run(), run(home="blocks"), BLOCKS, EXACT),
    "reordered": (run(), run(early_head=True), "", EXACT),
    "wrapped": (run(), run(Wrapped), "", EXACT),
    "unwrapped": (run(Wrapped), run(), "", EXACT),
    "fused": (run(), run(fused="plain"), FUSE, EXACT),
    "interleaved": (run(), run(fused="interleaved"), INTERLEAVE, EXACT),
    "cut": (run(fused="plain"), run(), CUT, EXACT),
    "transposed": (run(), run(turned=True), '[[rule]]\nfrom = "layers.{i}.mlp.weight"\nto = "layers.{i}.mlp.weight"\n'
                   "transpose = true\n", EXACT),
    "scaled": (run(), run(scaled=4.0), '[[rule]]\nfrom = "layers.{i}.mlp.weight"\nto = "layers.{i}.mlp.weight"\n'
               "scale = 4.0\n", NEAR),
    "tied": (run(tied=True), run(tied=True, home="blocks"), BLOCKS, EXACT),
    "a schedule": (run(scheduled=True), run(scheduled=True), "", EXACT),
    "groups named": (run(optimizer=by_decay), run(optimizer=by_decay, home="blocks"),
                     '[[rule]]\nfrom = "layers.{p**}"\nto = "blocks.{p}"\n', EXACT),
    "two optimizers": (run(optimizer=two), run(optimizer=two, fused="plain"), FUSE, EXACT),
    "another head": (run(), run(extra=True), '[[rule]]\nfresh = "side.**"\n', EXACT),
    "regrouped": (run(), run(optimizer=by_decay), BY_DECAY, NEAR),
    "regrouped with a schedule": (run(scheduled=True), run(optimizer=by_decay, scheduled=True), BY_DECAY, NEAR),
    "a layer in front": (run(), run(layers=3), '[[rule]]\nfrom = "layers.{i:int}.{p**}"\nto = "layers.{i+1}.{p}"\n'
                         '[[rule]]\nfresh = "layers.0.**"\n', NEAR),
    "grown": (run(), run(words=11), '[[rule]]\nfrom = "{x=embed|head}.weight"\nto = "{x}.weight"\n'
              "resize = { dim = 0, size = 11 }\n", NEAR),
    "experts": (run(), run(experts=2), '[[rule]]\nfrom = "layers.{i}.down.{p}"\n'
                'to = "layers.{i}.down.{e=0..1}.{p}"\n', NEAR),
    "Muon": (run(), run(optimizer=with_muon), MUON, NEAR),
    "another optimizer": (run(optimizer=partial(torch.optim.Adam, lr=1e-2)), run(optimizer=partial(
        torch.optim.Adamax, lr=1e-2)), 'optimizer = "Adamax"\n', NEAR),
}  # fmt: skip


def plan_of(name: str) -> Plan:
    text = CHANGES[name][2]
    return Plan.from_toml(
        text.replace('"attn.', '"layers.{i}.attn.') if "attn.{x" in text or "attn.qkv" in text else text
    )


@pytest.fixture(scope="module")
def trained() -> Callable[[str], Any]:
    known: dict[Build, Any] = {}

    def make(name: str) -> Any:
        build = CHANGES[name][0]
        if build not in known:
            model, optimizer, *schedule = build()
            every = optimizer if isinstance(optimizer, list) else [optimizer]
            for _ in range(2):
                model.zero_grad()
                loss(model, WORDS)[0].backward()
                for each in (*every, *schedule):
                    each.step()
            known[build] = (model, optimizer, *schedule)
        return known[build]

    return make


@pytest.mark.parametrize("name", CHANGES)
def test_a_right_plan_raises_no_alarm(name: str, trained: Callable[[str], Any]) -> None:
    found = rehearse(trained(name), CHANGES[name][1], plan_of(name), WORDS, loss)
    assert found.verdict == CHANGES[name][3], str(found)


def damaged(plan: Plan, names: list[str], state: Mapping[str, Any], model: nn.Module, optimizer: Any) -> None:
    """A right resume, after which moments of equal shape are exchanged, and the state of another parameter is lost."""
    optimstate.resume(state, model=model, optimizer=optimizer, plan=plan)
    every = optimizer if isinstance(optimizer, list) else [optimizer]
    slots = {name: each.state[p] for each in every for name, p in model.named_parameters() if each.state.get(p)}
    tensors = {name: {s: v for s, v in own.items() if getattr(v, "dim", int)() > 0} for name, own in slots.items()}
    pairs = [
        (one, other, slot)
        for one in tensors for other in tensors if one < other
        for slot in sorted(tensors[one].keys() & tensors[other].keys())
        if tensors[one][slot].shape == tensors[other][slot].shape and not tensors[one][slot].equal(tensors[other][slot])
    ]  # fmt: skip
    one, other, slot = pairs[0]
    slots[one][slot], slots[other][slot] = slots[other][slot], slots[one][slot]
    lost, zeroed = [name for name in reversed(slots) if name not in (one, other) and tensors[name]][:2]
    slots[lost].clear()
    next(iter(tensors[zeroed].values())).zero_()
    names += [name.removeprefix("module.") for name in (one, other, lost, zeroed)]


@pytest.mark.parametrize("name", CHANGES)
def test_exchanged_lost_and_emptied_state_is_named(name: str, trained: Callable[[str], Any]) -> None:
    names: list[str] = []
    plan = plan_of(name)
    found = rehearse(trained(name), CHANGES[name][1], plan, WORDS, loss, steps=0, load=partial(damaged, plan, names))
    assert not found.holds
    assert {d.name for d in found.decisive if d.what == "slot"} == set(names), str(found)
