"""Testing whether plans keep the function, to find the right one of many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from optimstate.errors import OptimStateError, UserCodeError
from optimstate.plan.language.plan import Plan
from optimstate.rehearsal.comparing import Comparison
from optimstate.rehearsal.runs import Run
from optimstate.rehearsal.tensors import converted

__all__ = ["trial"]


def trial(given: Mapping[str, Any]) -> Callable[[Plan], bool]:
    """A function that tests whether the new model computes the same as the old one under a plan.

    The old weights are changed at random, so that weights that are equal in a fresh model (norms of ones, zero biases)
    can be distinguished.

    Args:
        given: The arguments `old`, `new`, `batch` and `loss` of `rehearse`.
    """
    before = _disturbed(Run.of(given["old"], double=True))

    def keeps(plan: Plan) -> bool:
        lenient = plan.with_policy(unused="ignore", missing="fresh", unexpected="drop")
        runs = copy.deepcopy(before), Run.of(given["new"], double=True)
        try:
            found = Comparison(*runs, lenient, converted(given["batch"]), given["loss"], 1e-8).run(0, None)
        except UserCodeError:
            raise  # it would fail under every plan
        except OptimStateError:
            return False
        return not any(deviation.what == "output" for deviation in found.deviations)

    return keeps


def _disturbed(run: Run) -> Run:
    from optimstate.installed_torch import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            parameter.mul_(1 + 0.2 * noise).add_(0.05 * noise.roll(1))
    return run
