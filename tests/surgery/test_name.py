"""`name` gives right names or refuses, judged by the truth of every fixture and by what torch loads."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimstate.errors import CheckpointError, MigrationError
from optimstate.state.names import wrapper_prefix
from optimstate.surgery.writing.naming import name
from tests.corpus import FILES, Case, case, cases
from tests.naming import judged, without_names


def unwrapped(names: list[str]) -> list[str]:
    prefix = wrapper_prefix(names)
    return [found.removeprefix(prefix) for found in names]


@pytest.mark.parametrize("found", [case for case in cases(truth="groups") if not case.is_hostile], ids=str)
def test_names_are_right_or_refused(found: Case) -> None:
    expected = [param for group in found.truth()["groups"] for param in group["params"]]
    try:
        report = name(found.entry, None, dry_run=True)
    except (MigrationError, CheckpointError):
        return
    for given in report.optimizers.values():
        assert unwrapped([parameter for parameter, _ in given]) == unwrapped(expected)


def test_most_plain_torch_checkpoints_can_be_named() -> None:
    unnamed = [case for case in cases("torch/") if "unnamed" in case.name]
    named = 0
    for found in unnamed:
        try:
            name(found.entry, None, dry_run=True)
            named += 1
        except MigrationError:
            pass
    assert named >= len(unnamed) // 2 > 0


class Net(nn.Module):
    """Two layers of one shape, so that shapes alone decide nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)


def anonymous(folder: Path, model: nn.Module) -> Path:
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    path = folder / "optimizer.pt"
    torch.save({"optimizer": optimizer.state_dict()}, path)
    return path


def test_names_from_a_list_are_matched_by_shape_and_order(tmp_path: Path) -> None:
    model = Net()
    source, target = anonymous(tmp_path, model), tmp_path / "named.pt"
    with pytest.raises(MigrationError, match="the checkpoint has no model"):
        name(source, target)
    assert not target.exists()


def test_the_model_itself_settles_what_shapes_leave_open(tmp_path: Path) -> None:
    source, target = anonymous(tmp_path, Net()), tmp_path / "named.pt"
    name(source, target, model="tests.surgery.test_name:Net")
    groups = torch.load(target, weights_only=True)["optimizer"]["param_groups"]
    assert [group["param_names"] for group in groups] == [
        ["first.weight", "second.weight"],
        ["first.bias", "second.bias"],
    ]
    before = torch.load(source, weights_only=True)["optimizer"]["state"]
    after = torch.load(target, weights_only=True)["optimizer"]["state"]
    assert all(torch.equal(before[key][slot], after[key][slot]) for key in before for slot in before[key])


def leaving() -> None:
    raise SystemExit(0)


def test_a_model_whose_code_leaves_is_refused(tmp_path: Path) -> None:
    source, target = anonymous(tmp_path, Net()), tmp_path / "named.pt"
    with pytest.raises(MigrationError, match="SystemExit: 0"):
        name(source, target, model="tests.surgery.test_name:leaving")
    assert not target.exists()


def test_frozen_parameters_of_repeated_shapes_are_refused(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD([model.second.weight], lr=0.1, momentum=0.9)
    model.second.weight.grad = torch.ones(4, 4)
    optimizer.step()
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    with pytest.raises(MigrationError, match=r"first\.weight, second\.weight.*not all are in the optimizer"):
        name(path, None, dry_run=True)


def test_every_optimizer_is_named_from_its_own_model(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    for key, layers in (("gen", 2), ("dis", 3)):
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        tree |= {key: model.state_dict(), f"{key}_optimizer": optimizer.state_dict()}
    torch.save(tree, tmp_path / "gan.pt")
    report = name(tmp_path / "gan.pt", None, dry_run=True)
    for key in ("gen", "dis"):
        assert [given for given, _ in report.optimizers[f"{key}_optimizer"]] == list(tree[key])
    one = {"gen_optimizer": list(tree["gen"])[::-1]}
    with pytest.raises(MigrationError, match=r"gen_optimizer: parameter 0 has shape \[4, 4\], but '1.bias' has \[4\]"):
        name(tmp_path / "gan.pt", None, names=one, order="optimizer", dry_run=True)
    with pytest.raises(MigrationError, match="where there is no optimizer"):
        name(tmp_path / "gan.pt", None, names={"opt": []}, dry_run=True)


def test_a_config_of_transformers_gives_the_order(tmp_path: Path) -> None:
    """Where the weights are in safetensors, which sorts them, the config builds the model in its own order."""
    pytest.importorskip("transformers")
    found = case("transformers/gpt2_adamw")
    checkpoint = next((FILES / found.name).glob("checkpoint-*"))
    with pytest.raises(MigrationError, match="does not keep the model's order"):
        name(checkpoint, None, dry_run=True)
    report = name(checkpoint, None, hf=checkpoint, dry_run=True)
    expected = [param for group in found.truth()["groups"] for param in group["params"]]
    assert [given for given, _ in report.optimizers["optimizer.pt"]] == expected
    with pytest.raises(MigrationError, match="--hf"):
        name(checkpoint, None, hf=tmp_path, dry_run=True)


def test_the_base_models_config_gives_the_order_of_an_adapter(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    found = case("transformers/peft_lora_llama")
    checkpoint = next((FILES / found.name).glob("checkpoint-*"))
    report = name(checkpoint, None, hf=tmp_path, dry_run=True)
    expected = [param.replace(".default.", ".") for group in found.truth()["groups"] for param in group["params"]]
    assert [given for given, _ in report.optimizers["optimizer.pt"]] == expected


@pytest.mark.parametrize("known", ["timm/checkpoint_saver_ema_layerdecay", "mmengine/sgd_paramwise"])
def test_the_grouping_of_a_known_trainer_decides(known: str) -> None:
    found = case(known)
    (given,) = name(found.entry, None, dry_run=True).optimizers.values()
    assert [n for n, _ in given] == [param for group in found.truth()["groups"] for param in group["params"]]


def test_the_measure_takes_names_out_and_compares(tmp_path: Path) -> None:
    """The command that docs/command-line.md names, on a folder without truths."""
    model = Net()
    path = anonymous(tmp_path, model)
    saved = {"model": model.state_dict(), **torch.load(path, weights_only=True)}
    names = [["first.weight", "second.weight"], ["first.bias", "second.bias"]]
    for group, own in zip(saved["optimizer"]["param_groups"], names, strict=True):
        group["param_names"] = own
    torch.save(saved, path)
    assert [each.outcome for each in without_names(path)] == ["right"]
    for group in saved["optimizer"]["param_groups"]:
        group["param_names"] = group["param_names"][::-1]  # a lie: what the file shows says otherwise
    torch.save(saved, path)
    assert [each.outcome for each in without_names(path)] == ["wrong"]
    assert judged(path, ["a"]).outcome == "wrong"


def sequential(**parts: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(parts))


def right() -> nn.Module:
    return sequential(a=nn.Linear(4, 4), b=nn.Linear(4, 4))


def other_names() -> nn.Module:
    return sequential(x=nn.Linear(4, 4), y=nn.Linear(4, 4))


def other_order() -> nn.Module:
    return sequential(b=nn.Linear(4, 4), a=nn.Linear(4, 4))


def other_shapes() -> nn.Module:
    return sequential(a=nn.Linear(4, 4), b=nn.Linear(4, 9))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (right, None),
        (other_names, "the weights at model have none of the names"),
        (other_order, "comes before 'a.weight' here, and after it at model"),
        (other_shapes, r"'b.weight' has the shape \[4, 4\] at model, and \[9, 4\] here"),
    ],
)
def test_a_model_or_names_that_the_weights_contradict_are_refused(
    model: Any, message: str | None, tmp_path: Path
) -> None:
    """All parts are of one shape, so that the state itself fits each of them."""
    net = right()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    names = [name for name, _ in model().named_parameters()]
    ways: list[dict[str, Any]] = [{"model": f"{__name__}:{model.__name__}"}]
    ways += [{"names": names}] if model is not other_shapes else []
    for way in ways:
        if message is None:
            (found,) = name(tmp_path / "a.pt", None, dry_run=True, **way).optimizers.values()
            assert [given for given, _ in found] == names
            continue
        with pytest.raises(MigrationError, match=message):
            name(tmp_path / "a.pt", None, dry_run=True, **way)


def test_names_given_for_an_optimizer_that_has_others_are_refused(tmp_path: Path) -> None:
    net = right()
    optimizer = torch.optim.AdamW(net.named_parameters())
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    own = [name for name, _ in net.named_parameters()]
    assert name(tmp_path / "a.pt", None, names=own, dry_run=True).optimizers["optimizer"][0] == (own[0], "confirmed")
    with pytest.raises(MigrationError, match="already has other names"):
        name(tmp_path / "a.pt", None, names=["x", *own[1:]], dry_run=True)
