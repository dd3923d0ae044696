"""A certificate: an untouched resume passes, and each way to lose or change state fails and is named."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate import Certificate, Plan, hooks, resume, surgery
from optimstate.certificates.digests import digest
from optimstate.certificates.live import certificate_of, next_update
from optimstate.errors import CheckpointError, OptimStateError, StateMismatchError
from tests import certified_worker
from tests.losses import WAYS


def built(seed: int, kind: Any = torch.optim.AdamW, **options: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    decayed = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    optimizer = kind([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, **options)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def train(model: nn.Module, optimizer: Any, scheduler: Any, steps: range = range(3)) -> list[float]:
    losses = []
    for step in steps:
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        losses.append(model(batch).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        scheduler.step()
    return [loss.item() for loss in losses]


def saved(folder: Path, *parts: Any) -> dict[str, Any]:
    model, optimizer, scheduler = parts or built(1)
    train(model, optimizer, scheduler)
    hook = optimizer.register_state_dict_post_hook(
        hooks.certify(model, scheduler=scheduler, path=folder / "certificate.json")
    )
    made = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    hook.remove()
    torch.save(made, folder / "run.pt")
    return copy.deepcopy(made)


def resumed(checkpoint: Any, certificate: Any, *parts: Any, **options: Any) -> optimstate.Resumed:
    model, optimizer, scheduler = parts or built(2)
    return resume(checkpoint, model=model, optimizer=optimizer, scheduler=scheduler, certificate=certificate, **options)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop", "Adafactor", "NAdam", "Adagrad"])
def test_an_untouched_resume_is_the_run_that_stopped(kind: str, tmp_path: Path) -> None:
    for module in (torch.optim, optimstate.optim):
        first = built(1, getattr(module, kind))
        saved(tmp_path, *first)
        for certificate in (True, tmp_path / "certificate.json", Certificate.read(tmp_path / "certificate.json")):
            second = built(2, getattr(module, kind))
            resumed(tmp_path / "run.pt", certificate, *second)
        assert train(*first, range(3, 6)) == train(*second, range(3, 6))
    report = optimstate.verify(tmp_path / "run.pt", certificate=tmp_path / "certificate.json")
    assert report.healthy, str(report)
    assert "1 certificate" in report.checked


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_lose_state_fails(way: str, tmp_path: Path) -> None:
    found = saved(tmp_path)
    WAYS[way]({"weights": found["model"], "optimizer": found["optimizer"], "scheduler": found["scheduler"]})
    parts = built(2)
    before = copy.deepcopy([part.state_dict() for part in parts])
    with pytest.raises(OptimStateError, match=r"certified|checkpoint"):
        resumed(found, True, *parts)
    for part, old in zip(parts, before, strict=True):  # all or nothing
        new = part.state_dict()
        assert str(new) == str(old)
    torch.save(found, tmp_path / "changed.pt")
    report = optimstate.verify(tmp_path / "changed.pt", certificate=tmp_path / "certificate.json")
    assert "certificate" in {finding.kind for finding in report.findings if finding.level == "fault"}


def problems(checkpoint: Any, *parts: Any) -> str:
    with pytest.raises(StateMismatchError) as caught:
        resumed(checkpoint, True, *parts)
    assert {problem.kind for problem in caught.value.problems} == {"certificate"}
    return str(caught.value)


def test_messages_name_the_parameter_and_both_sides(tmp_path: Path) -> None:
    found = saved(tmp_path)
    state = found["optimizer"]["state"]
    state[0]["exp_avg"], state[1]["exp_avg"] = state[1]["exp_avg"], state[0]["exp_avg"]
    assert "exp_avg: state: 0.weight is what 2.weight was" in problems(found)
    found = saved(tmp_path)
    found["optimizer"]["param_groups"][1]["lr"] = 0.5
    assert "group 1: lr was 0.009" in (told := problems(found))
    assert "is 0.5" in told
    found = saved(tmp_path)
    found["model"]["1.running_mean"] += 1
    assert "weights: 1.running_mean has other values" in problems(found)
    found = saved(tmp_path)
    found["optimizer"]["state"][0]["step"] = torch.tensor(9.0)
    assert "step: state: 0.weight was 3.0 and is 9.0" in problems(found)
    found = saved(tmp_path)
    parts = built(2)
    with pytest.raises(StateMismatchError, match="schedule: was certified and is missing"):
        resume(found, model=parts[0], optimizer=parts[1], certificate=True)
    with pytest.raises(StateMismatchError, match="was AdamW and is Adam"):
        resumed(found, True, *built(2, torch.optim.Adam, decoupled_weight_decay=True))


def test_the_next_update_tells_what_state_alone_does_not(tmp_path: Path) -> None:
    class Slower(torch.optim.AdamW):
        """Equal in all that is saved, with another rule."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] /= 2
            found = super().step(closure)
            for group in self.param_groups:
                group["lr"] *= 2
            return found

    Slower.__name__ = "AdamW"
    found = saved(tmp_path)
    assert "update: the next update of" in problems(found, *built(2, Slower))
    model, optimizer, scheduler = built(1)
    before = copy.deepcopy(optimizer.state_dict())
    generator = torch.get_rng_state()
    names = [group["param_names"] for group in optimizer.param_groups]
    assert next_update(optimizer, names).keys() == dict(model.named_parameters()).keys()
    assert str(optimizer.state_dict()) == str(before)
    assert torch.equal(generator, torch.get_rng_state())
    closures = torch.optim.LBFGS(model.named_parameters())
    assert next_update(closures, [closures.param_groups[0]["param_names"]]) == {}
    assert scheduler.last_epoch == 0


def test_with_a_plan_the_checkpoint_and_what_is_only_moved(tmp_path: Path) -> None:
    found = saved(tmp_path)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 2))
    decayed = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}])
    parts = model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    plan = Plan.from_options(rename=["2.{p}=3.{p}", "3.{p}=4.{p}"])
    done = resumed(found, True, *parts, plan=plan)
    assert any("0 weights, the state of 0 parameters" in note for note in done.notes)
    again = certificate_of(optimizer, model)
    assert [entry.plan for entry in again.history] == [plan.digest]
    assert again.history[0].certificate == Certificate.read(tmp_path / "certificate.json").digest
    for way in ("moments_zeroed", "weights_of_another_step", "no_state", "another_rate"):
        found = saved(tmp_path)
        WAYS[way]({"weights": found["model"], "optimizer": found["optimizer"], "scheduler": found["scheduler"]})
        with pytest.raises(StateMismatchError, match="the checkpoint: "):
            resumed(found, True, *parts, plan=plan)


def test_a_lineage_is_a_chain(tmp_path: Path) -> None:
    saved(tmp_path)
    parts = built(2)
    resumed(tmp_path / "run.pt", True, *parts)
    saved(tmp_path, *parts)
    plan = Plan.from_options(rename=["3.{p}=head.{p}"])
    optimstate.remap(tmp_path / "run.pt", tmp_path / "renamed.pt", plan)
    found = surgery.log(tmp_path / "renamed.pt").entries
    assert [(entry.what, entry.step) for entry in found] == [("certified", 3), ("certified", 6), ("plan", None)]
    assert found[2].digest == plan.digest
    assert found[1].digest == Certificate.read(tmp_path / "certificate.json").digest
    assert surgery.log(tmp_path / "certificate.json").entries == found[:2]
    with pytest.raises(StateMismatchError, match=f"changed by the plan {plan.digest[:12]}"):
        resumed(tmp_path / "renamed.pt", True, plan=Plan.from_options(rename=["head.{p}=3.{p}"]))
    optimstate.remap(tmp_path / "renamed.pt", tmp_path / "back.pt", Plan.from_options(rename=["head.{p}=3.{p}"]))
    assert optimstate.verify(tmp_path / "back.pt", certificate=tmp_path / "run.pt").healthy


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    found = saved(tmp_path)
    del found["optimizer"]["optimstate"]
    with pytest.raises(StateMismatchError, match="has no certificate"):
        resumed(found, True)
    for text in ("", "{}", '{"form": 99}', "[1]", '{"form": 1, "groups": [3], "history": []}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"wrong\.json"):
            resumed(found, tmp_path / "wrong.json")
    fields = json.loads((tmp_path / "certificate.json").read_text())
    group = {**fields["groups"][0], "more": 1}
    for change in (
        {"history": "x"}, {"history": {"a": 1}}, {"weights": "x"}, {"update": [3]}, {"more": 1}, {"groups": [group]},
        {"versions": {}}, {"algorithm": "SGD"},
    ):  # fmt: skip
        (tmp_path / "wrong.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(CheckpointError, match=r"wrong\.json (is not a|has 'more'|was changed after)"):
            resumed(found, tmp_path / "wrong.json")
    torch.save(found, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="no certificate in it"):
        optimstate.verify(tmp_path / "plain.pt", certificate=tmp_path / "plain.pt")
    assert surgery.log(tmp_path / "plain.pt").entries == ()
    json.loads((tmp_path / "certificate.json").read_text())


def test_names_of_wrappers_and_tied_weights_do_not_matter(tmp_path: Path) -> None:
    model, optimizer, scheduler = built(1)
    model[0].add_module("tied", model[2])
    found = saved(tmp_path, model, optimizer, scheduler)
    found["model"] = {f"module.{name}": v for name, v in found["model"].items() if "tied" not in name}
    torch.save(found, tmp_path / "wrapped.pt")
    report = optimstate.verify(tmp_path / "wrapped.pt", certificate=tmp_path / "certificate.json")
    assert report.healthy, str(report)


def test_a_sharded_run_is_certified_as_a_whole(tmp_path: Path) -> None:
    """Two processes with FSDP2 and distributed checkpoints; then one process with the same certificate."""
    command = [sys.executable, "-m", "tests.certified_worker", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        said = json.loads((tmp_path / f"said-{rank}.json").read_text())
        assert [way for way, error in said.items() if not error] == ["untouched", "untouched, its own"], said
        assert all("not the one that was certified" in said[way] for way in certified_worker.WAYS)
    for certificate in (tmp_path / "untouched.json", True):
        assert not certified_worker.resumed(
            tmp_path / "untouched", certificate, *certified_worker.built(3, sharded=False)
        )
    assert optimstate.verify(tmp_path / "untouched", certificate=tmp_path / "untouched.json").healthy
    for way in certified_worker.WAYS:
        assert not optimstate.verify(tmp_path / way, certificate=tmp_path / f"{way}.json").healthy, way


def test_several_optimizers_that_are_divided_anew_have_to_come_from_what_was_certified(tmp_path: Path) -> None:
    def parts(seed: int) -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        named = list(model.named_parameters())
        return model, {"one": torch.optim.AdamW(named[:2]), "two": torch.optim.AdamW(named[2:])}

    model, optimizers = parts(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.register_state_dict_post_hook(hooks.certify(model))
    saved = {"model": model.state_dict(), **{key: each.state_dict() for key, each in optimizers.items()}}
    plan = Plan.from_toml('[[optimizer]]\npath = "all"\nmatch = "**"\n')
    for change in (False, True):
        found = copy.deepcopy(saved)
        if change:
            found["two"]["state"][0]["exp_avg"].zero_()
        torch.save(found, tmp_path / "run.pt")
        model, _ = parts(2)
        optimizer = torch.optim.AdamW(model.named_parameters())
        if change:
            with pytest.raises(StateMismatchError, match=r"the checkpoint.*1.weight has other values"):
                resume(tmp_path / "run.pt", model=model, optimizer=optimizer, plan=plan, certificate=True)
        else:
            done = resume(tmp_path / "run.pt", model=model, optimizer=optimizer, plan=plan, certificate=True)
            assert any("checkpoint is as certified" in note for note in done.notes)


def test_the_log_of_several_generations(tmp_path: Path) -> None:
    """Certified, resumed, changed twice, resumed by a plan, certified again: everything is in the chain, in order."""
    saved(tmp_path)
    there = Plan.from_options(rename=["3.{p}=head.{p}"])
    again = Plan.from_options(rename=["head.{p}=out.{p}"])
    back = Plan.from_options(rename=["out.{p}=3.{p}"])
    optimstate.remap(tmp_path / "run.pt", tmp_path / "one.pt", there)
    optimstate.remap(tmp_path / "one.pt", tmp_path / "two.pt", again)
    entries = surgery.log(tmp_path / "two.pt").entries
    assert [(e.what, e.digest) for e in entries[1:]] == [("plan", there.digest), ("plan", again.digest)]
    parts = built(5)
    resumed(tmp_path / "two.pt", False, *parts, plan=back)
    saved(tmp_path, *parts)
    optimstate.remap(tmp_path / "run.pt", tmp_path / "three.pt", there)
    found = surgery.log(tmp_path / "three.pt").entries
    assert [e.what for e in found] == ["certified", "plan", "plan", "plan", "certified", "plan"]
    assert [e.digest for e in found[1:4]] == [there.digest, again.digest, back.digest]
    assert (found[0], found[4].step) == (entries[0], 6)


def changed_dtype(found: Any) -> None:
    slots = found["optimizer"]["state"][0]
    slots["exp_avg"] = slots["exp_avg"].double()


def changed_weight_dtype(found: Any) -> None:
    found["model"]["0.weight"] = found["model"]["0.weight"].double()


def a_flipped_bit(found: Any) -> None:
    found["optimizer"]["state"][0]["exp_avg"].view(torch.int32)[0, 0] ^= 1


def a_lost_step(found: Any) -> None:
    del found["optimizer"]["state"][0]["step"]


def a_lost_slot(found: Any) -> None:
    del found["optimizer"]["state"][0]["exp_avg_sq"]


def another_length(found: Any) -> None:
    found["scheduler"]["T_max"] = 7


def a_buffer(found: Any) -> None:
    found["model"]["1.num_batches_tracked"] += 1


def an_edited_certificate(found: Any) -> None:
    found["optimizer"]["state"][0]["exp_avg"].zero_()
    found["optimizer"]["optimstate"]["certificate"]["state"]["0.weight"]["exp_avg"] = digest(
        found["optimizer"]["state"][0]["exp_avg"]
    )


def a_certificate_that_says_less(found: Any) -> None:
    found["optimizer"]["optimstate"]["certificate"]["update"] = {}


def the_certificate_of_another_step(found: Any) -> None:
    model, optimizer, scheduler = built(1)
    train(model, optimizer, scheduler, range(4))
    optimizer.register_state_dict_post_hook(hooks.certify(model, scheduler=scheduler))
    found["optimizer"]["optimstate"] = optimizer.state_dict()["optimstate"]


MORE = [
    changed_dtype,
    changed_weight_dtype,
    a_flipped_bit,
    a_lost_step,
    a_lost_slot,
    another_length,
    a_buffer,
    an_edited_certificate,
    a_certificate_that_says_less,
    the_certificate_of_another_step,
]


@pytest.mark.parametrize("way", MORE, ids=lambda way: way.__name__)
def test_more_ways_to_change_a_checkpoint_or_its_certificate_fail(way: Any, tmp_path: Path) -> None:
    found = saved(tmp_path)
    way(found)
    parts = built(2)
    before = str(copy.deepcopy([part.state_dict() for part in parts]))
    with pytest.raises(OptimStateError):
        resumed(found, True, *parts)
    assert str([part.state_dict() for part in parts]) == before
