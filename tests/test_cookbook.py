"""Every task of docs/cookbook.md runs as it is written there, and torch finds in the result what the text promises.

The opening `python` block runs first, as a reader pastes it. In each section, and in a folder of its own, `toml` blocks
become files, `console` lines run through the command line and `python` blocks in one scope. A shown line must be in the
output, in order.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests import corpus, documents
from tests.cli.running import run
from tests.support import unlike

TEXT = (corpus.FIXTURES.parent / "docs" / "cookbook.md").read_text(encoding="utf-8")
PREAMBLE, *SECTIONS = re.split(r"^## (?=\d+\. )", TEXT, flags=re.MULTILINE)


def provide(folder: Path) -> None:
    """The checkpoints of frameworks that readers bring."""
    gpt2 = corpus.case("transformers/gpt2_adamw")
    shutil.copytree(corpus.FILES / "transformers/gpt2_adamw/checkpoint-4", folder / "checkpoint-4")
    names = [name for name in gpt2.truth()["model"] if name != "lm_head.weight"]
    (folder / "names.txt").write_text("\n".join(names), encoding="utf-8")
    shutil.copytree(corpus.FILES / "deepspeed/z3_ws2_bf16_adamw", folder / "zero")
    shutil.copy(corpus.case("torch/ddp_mixed_prefix_adamw").entry, folder / "ddp.pt")


class Ran(NamedTuple):
    """What a section has left."""

    folder: Path
    scope: dict[str, Any]

    def load(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(self.folder / name, weights_only=True)
        return loaded


def follow(section: str, folder: Path) -> Ran:
    """Run a section as a reader would, after the page's opening."""
    scope: dict[str, Any] = {"__name__": "cookbook"}
    exec(next(documents.blocks(PREAMBLE)).text, scope)
    return Ran(folder, documents.follow(section, folder, scope))


Named = dict[str, Any]


def by_name(checkpoint: dict[str, Any]) -> Named:
    """Optimizer state by parameter name."""
    optimizer = checkpoint["optimizer"]
    return {
        name: optimizer["state"].get(key, {})
        for group in optimizer["param_groups"]
        for key, name in zip(group["params"], group.get("param_names", group["params"]), strict=True)
    }


def same(made: Named, wanted: Named) -> None:
    assert made.keys() == wanted.keys()
    assert [name for name in wanted if unlike(ordered(made[name]), ordered(wanted[name]))] == []


def ordered(value: Any) -> Any:
    return dict(sorted(value.items())) if isinstance(value, dict) else value


def moved(ran: Ran, made: dict[str, Any], rename: Callable[[str], str]) -> None:
    """Weights and state are those of `train.pt` under other names, and all else is as it was."""
    old = ran.load("train.pt")
    same(dict(made["model"]), {rename(name): value for name, value in old["model"].items()})
    same(by_name(made), {rename(name): slots for name, slots in by_name(old).items()})
    assert made["scheduler"] == old["scheduler"]


def seen(ran: Ran) -> None:
    assert sorted(path.name for path in ran.folder.iterdir() if path.suffix == ".pt") == ["ddp.pt", "train.pt"]


def renamed(ran: Ran) -> None:
    moved(ran, ran.load("renamed.pt"), lambda name: name.replace("layers.", "blocks."))


def in_front(ran: Ran) -> None:
    old, model, optimizer = ran.load("train.pt"), ran.scope["deeper"], ran.scope["its_optimizer"]
    assert len(model.layers) == 3
    slots, weights = by_name(old), dict(model.named_parameters())
    above = {re.sub(r"(?<=layers\.)\d", lambda i: str(int(i[0]) + 1), name): name for name in slots}
    for name, parameter in weights.items():
        if name.startswith("layers.0."):
            assert not optimizer.state.get(parameter)
        else:
            assert torch.equal(parameter, old["model"][above[name]])
            assert unlike(dict(optimizer.state[parameter]), slots[above[name]]) is None
    assert ran.scope["its_scheduler"].last_epoch == 20
    ran.scope["train"](model, optimizer, ran.scope["its_scheduler"], 2)


def experts(ran: Ran) -> None:
    old, new = ran.load("train.pt"), ran.load("experts.pt")

    def targets(name: str) -> list[str]:
        return [name.replace(".mlp.", f".mlp.experts.{e}.") for e in range(4)] if ".mlp." in name else [name]

    routers = {f"layers.{i}.mlp.router.weight": {} for i in range(2)}
    same(dict(new["model"]), {t: value for name, value in old["model"].items() for t in targets(name)})
    same(by_name(new), routers | {t: slots for name, slots in by_name(old).items() for t in targets(name)})
    pointers = [slots["exp_avg"].data_ptr() for slots in by_name(new).values() if slots]
    assert len(set(pointers)) == len(pointers)
    # The two other choices that the text names.
    text = (ran.folder / "experts.toml").read_text(encoding="utf-8")
    for line, factor in (("scale = { param = 1.0, grad = 0.25 }", 0.25), ("fresh = true", None)):
        other = text.replace('.{p}"\n', f'.{{p}}"\n{line}\n', 1)
        (ran.folder / "other.toml").write_text(other, encoding="utf-8")
        assert run("remap", "train.pt", "other.pt", "--plan", "other.toml", "--force").code == 0
        made, was = (by_name(ran.load(name)) for name in ("other.pt", "train.pt"))
        state, before = made["layers.1.mlp.experts.3.fc1.weight"], was["layers.1.mlp.fc1.weight"]
        if factor is None:
            assert state == {}
        else:
            assert torch.equal(state["exp_avg"], before["exp_avg"] * factor)
            assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"] * factor**2)


def fused(ran: Ran) -> None:
    old, new = ran.load("train.pt"), ran.load("fused.pt")
    for layer in range(2):
        for leaf in ("weight", "bias"):
            parts = [f"layers.{layer}.attn.{x}_proj.{leaf}" for x in "qkv"]
            whole = f"layers.{layer}.attn.qkv.{leaf}"
            assert torch.equal(new["model"][whole], torch.cat([old["model"][part] for part in parts]))
            for slot in ("exp_avg", "exp_avg_sq"):
                joined = torch.cat([by_name(old)[part][slot] for part in parts])
                assert torch.equal(by_name(new)[whole][slot], joined)
    assert run("remap", "fused.pt", "back.pt", "--plan", "split.toml").code == 0
    moved(ran, ran.load("back.pt"), lambda name: name)


def grown(ran: Ran) -> None:
    old, new = ran.load("train.pt"), ran.load("grown.pt")
    weight, before = new["model"]["embed.weight"], old["model"]["embed.weight"]
    assert weight.shape == (64, 16)
    assert torch.equal(weight[:50], before)
    torch.testing.assert_close(weight[50:], before.mean(0).expand(14, 16))
    assert torch.equal(new["model"]["head.weight"], weight)
    state, was = by_name(new)["embed.weight"], by_name(old)["embed.weight"]
    assert torch.equal(state["exp_avg"][:50], was["exp_avg"])
    assert not state["exp_avg"][50:].any()
    torch.testing.assert_close(state["exp_avg_sq"][50:], was["exp_avg_sq"].mean(0).expand(14, 16))
    model = ran.scope["Model"](words=64)
    model.load_state_dict(new["model"])
    optimizer = torch.optim.AdamW(model.named_parameters())
    optimizer.load_state_dict(new["optimizer"])
    assert model.head.weight is model.embed.weight


def regrouped(ran: Ran) -> None:
    old, new = ran.load("train.pt"), ran.load("groups.pt")
    same(by_name(new), {name: by_name(old)[name] for name in by_name(new)})
    model = ran.scope["Model"]()
    parameters = dict(model.named_parameters())
    plain = {name: p for name, p in parameters.items() if name.endswith(".bias") or ".norm." in name or "embed" in name}
    groups = [plain, {name: p for name, p in parameters.items() if name not in plain}]
    optimizer = torch.optim.AdamW([{"params": list(group.items())} for group in groups])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    optimizer.load_state_dict(new["optimizer"])
    scheduler.load_state_dict(new["scheduler"])
    assert [set(group["param_names"]) for group in optimizer.param_groups] == [set(group) for group in groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01]
    assert scheduler.get_last_lr() == old["scheduler"]["_last_lr"] * 2
    ran.scope["train"](model, optimizer, scheduler, 1)


def shortened(ran: Ran) -> None:
    truth = corpus.case("transformers/gpt2_adamw").truth()
    assert run("name", "checkpoint-4", "unnamed").code == 4, "shapes alone settle it"
    optimizer = torch.load(ran.folder / "shorter" / "optimizer.pt", weights_only=True)
    state = by_name({"optimizer": optimizer})
    kept = {name for name in truth["state"] if not name.startswith("transformer.h.1.")}
    assert set(state) == kept
    assert len(kept) < len(truth["state"])
    for name in kept:
        for slot, told in truth["state"][name].items():
            if slot in ("exp_avg", "exp_avg_sq"):
                assert list(state[name][slot].shape) == told["shape"]
                assert state[name][slot].double().sum().item() == pytest.approx(told["sum"], rel=1e-6, abs=1e-12)
    from safetensors.torch import load_file

    weights = load_file(ran.folder / "shorter" / "model.safetensors")
    assert set(weights) == kept
    assert (ran.folder / "shorter" / "config.json").read_bytes() == (
        ran.folder / "checkpoint-4/config.json"
    ).read_bytes()


def converted(ran: Ran) -> None:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    old = ran.load("train.pt")
    flat = load_file(ran.folder / "train.safetensors")
    assert torch.equal(flat["optimizer.state.embed.weight.exp_avg"], by_name(old)["embed.weight"]["exp_avg"])
    dcp_to_torch_save(ran.folder / "train-dcp", ran.folder / "back.pt")
    back = ran.load("back.pt")
    # In folders of torch.distributed.checkpoint, torch's own too, keys are strings.
    back["optimizer"]["state"] = {int(key): slots for key, slots in back["optimizer"]["state"].items()}
    moved(ran, back, lambda name: name)


def gathered(ran: Ran) -> None:
    truth = corpus.case("deepspeed/z3_ws2_bf16_adamw").truth()
    loaded = ran.load("zero.pt")["global_step4"]
    state = by_name(loaded)
    assert set(state) == set(truth["state"])
    for name, slots in truth["state"].items():
        for slot in ("exp_avg", "exp_avg_sq"):
            assert state[name][slot].double().sum().item() == pytest.approx(slots[slot]["sum"], rel=1e-6, abs=1e-12)


def unwrapped(ran: Ran) -> None:
    old, new = ran.load("ddp.pt"), ran.load("plain.pt")
    same(dict(new["model"]), {name.removeprefix("module."): value for name, value in old["model"].items()})
    same(by_name(new), by_name(old))
    assert set(by_name(new)) == set(new["model"])


def compared(ran: Ran) -> None:
    assert unlike(ran.load("train.pt"), ran.load("later.pt")) is not None
    assert run("diff", "train.pt", "train.pt").code == 0


def checked(ran: Ran) -> None:
    moved(ran, ran.load("new.pt"), lambda name: name.replace("layers.", "blocks."))
    damaged = ran.load("new.pt")
    state = damaged["optimizer"]["state"]
    state[1], state[3] = state[3], state[1]
    torch.save(damaged, ran.folder / "new.pt")
    assert run("verify", "new.pt").code == 0
    assert run("verify", "new.pt", "--against", "train.pt", "--plan", "plan.toml").code == 1


def hooked(ran: Ran) -> None:
    old, optimizer = by_name(ran.load("train.pt")), ran.scope["its_optimizer"]
    for name, parameter in ran.scope["changed"].named_parameters():
        assert unlike(dict(optimizer.state[parameter]), old[name.replace("words", "embed")]) is None
    plain = torch.optim.AdamW(ran.scope["changed"].named_parameters())
    plain.load_state_dict(ran.load("train.pt")["optimizer"])
    first = next(ran.scope["changed"].parameters())
    assert torch.equal(plain.state[first]["exp_avg"], old["embed.weight"]["exp_avg"]), "torch goes by position"


def to_lion(ran: Ran) -> None:
    from lion_pytorch import Lion

    old, new = ran.load("train.pt"), ran.load("lion.pt")
    same(by_name(new), {name: {"exp_avg": slots["exp_avg"]} for name, slots in by_name(old).items()})
    model = ran.scope["Model"]()
    optimizer = Lion(model.named_parameters(), lr=1.0)
    optimizer.load_state_dict(new["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 1e-4
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    ran.scope["train"](model, optimizer, scheduler, 1)


def suggested(ran: Ran) -> None:
    moved(ran, ran.load("suggested.pt"), lambda name: name.replace("layers.", "decoder.blocks."))


def to_muon(ran: Ran) -> None:
    old, new = ran.load("counting.pt"), ran.load("muon.pt")
    slots = by_name(old)
    muon, adamw = (by_name({"optimizer": new[key]}) for key in ("muon", "adamw"))
    assert len(muon) == 12
    same(muon, {name: {"momentum_buffer": slots[name]["exp_avg"]} for name in muon})
    same(adamw, {name: found for name, found in slots.items() if name not in muon})
    section = SECTIONS[16]
    for name, losses in ran.scope["after"].items():
        row = re.search(rf"^\| {re.escape(name)} \| ([\d.]+) \| ([\d.]+) \|", section, re.MULTILINE)
        assert row, name
        assert losses[0] == pytest.approx(float(row[1]), rel=0.1)
        assert losses[-1] == pytest.approx(float(row[2]), rel=0.3)


CHECKS: dict[int, Callable[[Ran], None]] = dict(
    enumerate(
        (
            *(seen, renamed, in_front, experts, fused, grown, regrouped, shortened),
            *(converted, gathered, unwrapped, compared, checked, hooked, to_lion, suggested, to_muon),
        ),
        1,
    )
)


@pytest.mark.parametrize(
    ("number", "section"), list(enumerate(SECTIONS, 1)), ids=lambda value: str(value).split("\n")[0]
)
def test_a_task(number: int, section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert section.startswith(f"{number}. ")
    provide(tmp_path)
    monkeypatch.chdir(tmp_path)
    CHECKS[number](follow(section, tmp_path))


def test_the_page_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(tmp_path)
    monkeypatch.chdir(tmp_path)
    documents.follow(TEXT, tmp_path)


def test_every_task_is_checked_and_takes_at_most_two_commands() -> None:
    assert len(SECTIONS) == len(CHECKS) >= 12
    for section in SECTIONS:
        commands = re.findall(r"^\$ ", section, re.MULTILINE)
        assert 0 < len(commands) + section.count("```python") <= 3
        assert len(commands) <= 2


def test_shown_output_that_is_not_printed_is_noticed() -> None:
    printed = ["a", "b: 12 kB", "c"]
    documents.compare(["...", "c"], printed, "here")
    for wrong in (["a", "b: 99.5 kB", "c"], ["a", "c"], ["a", "...", "d"], ["a"], ["...", "b: 12 kB"]):
        with pytest.raises(AssertionError):
            documents.compare(wrong, printed, "here")
