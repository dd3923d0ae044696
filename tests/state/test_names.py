"""Names without what wrappers put into them: the names that torch itself gives to wrapped modules, and all nestings."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import optimstate.optim as optim
from optimstate import hooks
from optimstate.errors import ParameterNameWarning
from optimstate.state.names import WRAPPERS, mentions_wrapper, unwrapped

Wrap = Callable[[nn.Module], nn.Module]


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def checkpointed(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(module)


WRAPS: dict[str, Wrap] = {"DataParallel": nn.DataParallel, "compile": compiled, "checkpoint": checkpointed}


def stack(*inner: Wrap) -> nn.Module:
    """Three layers, the second of them wrapped."""
    torch.manual_seed(0)
    wrapped: nn.Module = nn.Linear(2, 2)
    for wrap in inner:
        wrapped = wrap(wrapped)
    return nn.Sequential(nn.Linear(2, 2), wrapped, nn.Linear(2, 2))


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


PLAIN = names(stack())


@pytest.mark.parametrize("outer", [(), *itertools.permutations(["DataParallel", "compile"], 2), ("compile",)])
@pytest.mark.parametrize("inner", [(), ("checkpoint",), ("compile",), ("checkpoint", "compile")])
def test_wrapped_modules_have_the_names_of_plain_ones(outer: tuple[str, ...], inner: tuple[str, ...]) -> None:
    module = stack(*(WRAPS[name] for name in inner))
    for name in outer:
        module = WRAPS[name](module)
    found = names(module)
    assert (found != PLAIN) == bool(outer or inner)
    assert [*map(unwrapped(found), found)] == PLAIN


@pytest.mark.parametrize("count", [1, 2, 3])
def test_in_any_nesting_in_front_and_inside(count: int) -> None:
    inside = [wrapper for wrapper in WRAPPERS if wrapper != "module."]
    for front in itertools.product(WRAPPERS, repeat=count):
        found = ["".join(front) + name for name in PLAIN]
        assert [*map(unwrapped(found), found)] == PLAIN
    for within in itertools.product(inside, repeat=count):
        found = [f"layers.{n}.{''.join(within)}attn.{''.join(within)}weight" for n in range(2)]
        assert [*map(unwrapped(found), found)] == ["layers.0.attn.weight", "layers.1.attn.weight"]


def test_what_only_looks_like_a_wrapper_stays() -> None:
    for honest in (
        ["module.weight", "other.weight"],  # one submodule of several
        ["encoder.module.weight", "encoder.module.bias"],  # not in front
        ["my_orig_mod.weight", "_orig_module.weight", "_fsdp_wrapped_modules.0.weight"],
        ["submodule.weight"],
    ):
        assert [*map(unwrapped(honest), honest)] == honest
    mixed = ["module.encoder.module.weight", "module.head.weight"]
    assert [*map(unwrapped(mixed), mixed)] == ["encoder.module.weight", "head.weight"]
    assert unwrapped([])("module.a") == "module.a"


def test_rules_that_spell_a_wrapper_are_told_from_others() -> None:
    for text in ("module.fc.{p}", "_orig_mod.**", "layers.{i}._checkpoint_wrapped_module.{p}"):
        assert mentions_wrapper(text)
    for text in ("layers.{i}.module.{p}", "submodule.{p}", "**", "re:module"):
        assert not mentions_wrapper(text)


@pytest.mark.parametrize("inner", [(), ("checkpoint",), ("compile", "checkpoint")])
def test_loading_by_position_and_by_name_follow_the_same_rule(inner: tuple[str, ...]) -> None:
    """The warning of `optim` at positional loading, and the hook `strip_prefix`, agree on which names are one."""

    def made(module: nn.Module) -> optim.SGD:
        return optim.SGD(module.named_parameters(), lr=0.1, momentum=0.9)

    plain = stack()
    saved = made(plain)
    plain(torch.ones(1, 2)).sum().backward()
    saved.step()
    wrapped = nn.DataParallel(stack(*(WRAPS[name] for name in inner)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParameterNameWarning)
        made(wrapped).load_state_dict(saved.state_dict())
    resumed = made(wrapped)
    resumed.register_load_state_dict_pre_hook(hooks.strip_prefix())
    resumed.load_state_dict(saved.state_dict())
    for p, other in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(saved.state[p]["momentum_buffer"], resumed.state[other]["momentum_buffer"])
    # A module called `module` inside a model is no wrapper: that is another parameter.
    honest = optim.SGD([("a.module.w", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(2)))], momentum=0.9)
    other = optim.SGD([("a.w", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(2)))], momentum=0.9)
    for group in honest.param_groups:
        for p in group["params"]:
            p.grad = torch.ones(2)
    honest.step()
    with pytest.warns(ParameterNameWarning, match=r"'a\.module\.w' to 'a\.w'"):
        other.load_state_dict(honest.state_dict())
