"""An optimizer of somebody else's: one file, the rule and nothing of the driver's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimstate.optim._step import Rule, RuleOptimizer, Setting, Traits
from tests import oracle

lion_pytorch = pytest.importorskip("lion_pytorch")


class Lion(RuleOptimizer):
    """Steps along the sign of a mean of momentum and gradient (Chen et al., https://arxiv.org/abs/2302.06675)."""

    _columns = ("exp_avg",)
    _traits = Traits(options=(*Traits().options, "decoupled_weight_decay"))

    def __init__(self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0, **common: Any):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, decoupled_weight_decay=True, **common)

    def _rule(self, s: Setting) -> Rule:
        k, lr, (beta1, beta2) = s.k, s.lr, s.group["betas"]

        def update(p: Any, g: Any, exp_avg: Any) -> None:
            direction = k.mul(exp_avg, beta1)
            k.add_(direction, g, alpha=1 - beta1)
            k.add_(p, k.sign(direction), alpha=-lr)
            k.mul_(exp_avg, beta2)
            k.add_(exp_avg, g, alpha=1 - beta2)

        return Rule(update)


class Descent(RuleOptimizer):
    """The least: a learning rate and a line."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def _rule(self, s: Setting) -> Rule:
        return Rule(lambda p, g: s.k.add_(p, g, alpha=-s.lr))


def trained(make: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    parameters = [nn.Parameter(oracle.numbers(shape, dtype, seed=3)) for shape in ((5, 3), (7,), ())]
    optimizer = make(parameters)
    for number in range(5):
        for index, parameter in enumerate(parameters):
            parameter.grad = oracle.numbers(tuple(parameter.shape), dtype, seed=10 * number + index)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_lion_in_a_few_lines_equals_its_authors(foreach: bool | None, maximize: bool) -> None:
    options = {"foreach": foreach, "maximize": maximize}
    ours = trained(lambda parameters: Lion(parameters, lr=0.01, weight_decay=0.1, **options))
    sign = -1.0 if options["maximize"] else 1.0

    def make(parameters: Any) -> Any:
        optimizer = lion_pytorch.Lion(parameters, lr=0.01, weight_decay=0.1)
        optimizer.register_step_pre_hook(lambda *_: [p.grad.mul_(sign) for p in parameters] and None)
        return optimizer

    for one, other in zip(ours, trained(make), strict=True):
        torch.testing.assert_close(one, other)


def test_an_optimizer_that_names_no_common_option_has_them() -> None:
    optimizer = Descent([nn.Parameter(torch.ones(2))], 0.1)
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in ("maximize", "foreach", "capturable", "differentiable")} == {
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
    }
    expected = trained(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert oracle.differences(trained(lambda parameters: Descent(parameters, 0.1)), expected) == []
    # torch's SGD adds complex numbers, which rounds otherwise than adding their parts.
    torch.testing.assert_close(
        trained(lambda parameters: Descent(parameters, 0.1), torch.complex64),
        trained(lambda parameters: torch.optim.SGD(parameters, lr=0.1), torch.complex64),
    )


def test_an_option_that_the_algorithm_has_not_is_refused() -> None:
    with pytest.raises(TypeError, match="Lion has no option fused, momentum"):
        Lion([nn.Parameter(torch.ones(2))], momentum=0.9, fused=True)


def test_a_rule_with_numbers_but_no_step_count_says_what_is_missing() -> None:
    class Counting(Descent):
        def _rule(self, s: Setting) -> Rule:
            return Rule(lambda p, g, t: None, lambda t: (t,))

    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match="needs the slot 'step'"):
        Counting([p], 0.1).step()
