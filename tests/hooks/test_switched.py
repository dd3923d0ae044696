"""Slots that an option turns on are there for the next step, and what a conversion loses is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import optimstate
from optimstate.plan.language.plan import Plan

LIVE = '[policy]\nhyperparameters = "live"\n'
Make = Callable[[Any], torch.optim.Optimizer]


def factored(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    optimization = pytest.importorskip("transformers.optimization")
    made: torch.optim.Optimizer = optimization.Adafactor(
        parameters, lr=1e-3, relative_step=False, scale_parameter=False, **options
    )
    return made


@pytest.mark.parametrize(
    ("saved", "live", "plan", "started"),
    [
        (torch.optim.AdamW, lambda p: torch.optim.AdamW(p, amsgrad=True), LIVE, {"max_exp_avg_sq"}),
        (torch.optim.AdamW, lambda p: torch.optim.AdamW(p, amsgrad=True), "", set()),  # the checkpoint's options hold
        (torch.optim.Adamax, lambda p: torch.optim.Adam(p, amsgrad=True), 'optimizer = "Adam"', {"max_exp_avg_sq"}),
        (
            torch.optim.RMSprop,
            lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
            LIVE,
            {"grad_avg", "momentum_buffer"},
        ),
        (
            torch.optim.AdamW,
            lambda p: factored(p, beta1=0.9),
            'optimizer = "Adafactor (transformers)"',
            {"exp_avg"},
        ),
        (factored, lambda p: factored(p, beta1=0.9), LIVE, {"exp_avg"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*beta1.*")
def test_what_an_option_turns_on_starts_and_is_noted(saved: Make, live: Make, plan: str, started: set[str]) -> None:
    old, new = nn.Linear(4, 3), nn.Linear(4, 3)
    first, second = saved(old.named_parameters()), live(new.named_parameters())
    for _ in range(3):
        old(torch.randn(5, 4)).square().mean().backward()
        first.step()
    parts = {"model": old.state_dict(), "optimizer": first.state_dict()}
    made = optimstate.resume(parts, model=new, optimizer=second, plan=Plan.from_toml(plan))
    noted = {note.partition(" of ")[0] for note in made.notes if " starts " in note}
    assert noted == started
    assert started <= second.state[new.weight].keys()
    if "max_exp_avg_sq" in started:
        assert torch.equal(second.state[new.weight]["max_exp_avg_sq"], second.state[new.weight]["exp_avg_sq"])
    new(torch.randn(5, 4)).square().mean().backward()
    second.step()


def test_a_conversion_names_what_it_loses_and_what_it_guesses() -> None:
    model = nn.Linear(4, 3)
    first = torch.optim.AdamW(model.named_parameters())
    model(torch.randn(5, 4)).square().mean().backward()
    first.step()
    parts = {"model": model.state_dict(), "optimizer": first.state_dict()}
    adamax = torch.optim.Adamax(model.named_parameters())
    report = optimstate.resume(parts, model=model, optimizer=adamax, plan=Plan.from_toml('optimizer = "Adamax"'))
    assert report.reports["optimizer"].exact == ()
    assert "exp_inf: the root" in report.reports["optimizer"].approximate["weight"]
    factors = torch.optim.Adafactor(model.named_parameters())
    report = optimstate.resume(parts, model=model, optimizer=factors, plan=Plan.from_toml('optimizer = "Adafactor"'))
    assert "exp_avg is dropped: Adafactor has no first moment" in report.reports["optimizer"].approximate["weight"]
