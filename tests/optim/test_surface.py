"""Module for module, ours have the names of torch.optim, and the functions among them compute the same."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import optimstate.optim as optim
from tests import cases, oracle

MODULES = [info.name for info in pkgutil.walk_packages(torch.optim.__path__, "")]
# torch's functions, by module; the classes without one are LBFGS and, beside its class, SparseAdam.
FUNCTIONS = {
    name: vars(getattr(optim, name))["__init__"].__module__.rpartition(".")[2]
    for name in cases.OPTIMIZERS
    if name not in {"LBFGS", "SparseAdam"}
}
# Of torch's public modules, these names are torch's own in ours: they are no algorithms.
BORROWED = {"partialclass", "swap_in_optimizer_params_and_state"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_every_name_of_torchs(name: str) -> None:
    torchs, ours = (importlib.import_module(f"{base}.{name}") for base in ("torch.optim", "optimstate.optim"))
    public = set(getattr(torchs, "__all__", ())) or {n for n in vars(torchs) if not n.startswith("_")}
    missing = [n for n in {*vars(torchs), *public} if not n.startswith("__") and not hasattr(ours, n)]
    assert sorted(missing) == []
    # A name of the public surface, and any class, is ours.
    for found in public - BORROWED:
        value, mine = getattr(torchs, found), getattr(ours, found)
        if getattr(value, "__module__", "").startswith("torch.optim") and name != "optimizer" and callable(value):
            assert mine.__module__.startswith("optimstate.optim"), f"{name}.{found}"


def test_the_public_names_are_torchs() -> None:
    assert [name for name in torch.optim.__all__ if not hasattr(optim, name)] == []
    assert {*cases.OPTIMIZERS, "Optimizer"} <= set(optim.__all__)
    assert len(optim.__all__) == len(set(optim.__all__))
    for ours, torchs in ((optim.lr_scheduler, torch.optim.lr_scheduler), (optim.swa_utils, torch.optim.swa_utils)):
        assert set(ours.__all__) == set(torchs.__all__)
        assert {getattr(ours, name).__module__ for name in ours.__all__} == {ours.__name__}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lr_scheduler", "_LRScheduler"),
        ("lr_scheduler", "EPOCH_DEPRECATION_WARNING"),
        ("optimizer", "required"),
        ("optimizer", "_use_grad_for_differentiable"),
        ("optimizer", "_get_scalar_dtype"),
        ("adam", "_multi_tensor_adam"),
        ("_multi_tensor", "Adam"),
        ("_functional", "sparse_adam"),
        ("functional", "adamw"),
        ("_muon", "muon"),
    ],
)
def test_what_frameworks_and_torchs_own_tests_import(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(f"optimstate.optim.{module}"), name)


def test_a_name_that_torch_lacks_is_missing_here() -> None:
    with pytest.raises(ImportError, match="no_such_name"):
        from optimstate.optim.adam import no_such_name  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(AttributeError, match=r"optimstate\.optim\.adam"):
        _ = optim.adam.no_such_name


def test_a_scheduler_of_the_old_base_is_a_scheduler() -> None:
    class Mine(optim.lr_scheduler._LRScheduler):
        def get_lr(self) -> Any:
            return [0.5 for _ in self.base_lrs]

    optimizer = optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert Mine(optimizer).get_last_lr() == [0.5]


# --- functions --------------------------------------------------------------------------------------------------------


def calls_of(
    monkeypatch: pytest.MonkeyPatch, name: str, case: cases.Case
) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Arguments of torch's function as its class gives them, step after step, and what it leaves in the lists."""
    module = importlib.import_module(f"torch.optim.{FUNCTIONS[name]}")
    function, found = getattr(module, name.lower()), []

    def recording(*args: Any, **kwargs: Any) -> None:
        before = copy.deepcopy((args, kwargs))
        function(*args, **kwargs)
        found.append((*before, copy.deepcopy(args)))

    with monkeypatch.context() as patched:
        patched.setattr(module, name.lower(), recording)
        oracle.Run(getattr(torch.optim, name), case).steps(0, 3)
    yield from found


def torchs_case(name: str, case: cases.Case) -> bool:
    return not (name == "SGD" and case.implementation == "fused" and case.dtype != "float32")


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"AdamW"}))
def test_functions_give_torchs_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = getattr(importlib.import_module(f"optimstate.optim.{FUNCTIONS[name]}"), name.lower())
    compared = 0
    for implementation in set(cases.TABLE[name].implementations) - {"differentiable"}:
        for dtype in cases.dtypes_of(cases.TABLE[name], implementation):
            for case in cases.telling(name, implementation, dtype):
                if not torchs_case(name, case) or case.capturable:
                    continue
                for args, kwargs, expected in calls_of(monkeypatch, name, case):
                    with torch.no_grad():
                        ours(*args, **kwargs)
                    assert oracle.differences(list(expected), list(args)) == [], case
                    compared += 1
    assert compared >= 20


def test_adamw_as_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's class calls the function of Adam, so its arguments serve for AdamW's."""
    torchs = importlib.import_module("torch.optim.adamw").adamw
    for implementation in ("forloop", "foreach", "fused"):
        for case in cases.telling("Adam", implementation, "float32"):
            for args, kwargs, _ in [] if case.capturable else calls_of(monkeypatch, "Adam", case):
                del kwargs["decoupled_weight_decay"]
                theirs = copy.deepcopy(args)
                with torch.no_grad():
                    torchs(*theirs, **kwargs)
                    optim.adamw.adamw(*args, **kwargs)
                assert oracle.differences(list(theirs), list(args)) == [], case


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_torchs_signature_and_refuse_what_is_missing(name: str) -> None:
    ours, torchs = (
        getattr(importlib.import_module(f"{base}.{FUNCTIONS[name]}"), name.lower())
        for base in ("optimstate.optim", "torch.optim")
    )
    assert inspect.signature(ours) == inspect.signature(torchs)
    with pytest.raises(TypeError, match=name.lower()):
        ours([], [])


def test_sparse_adam_as_a_function() -> None:
    def act(function: Any) -> Any:
        p, m, v = torch.ones(4, 2), torch.zeros(4, 2), torch.zeros(4, 2)
        for step in (1, 2):
            g = torch.sparse_coo_tensor(
                torch.tensor([[0, 2, 2]]), torch.ones(3, 2) * step, (4, 2), check_invariants=True
            )
            options = {"eps": 1e-8, "beta1": 0.9, "beta2": 0.99, "lr": 0.1, "maximize": step == 2}
            function([p], [g], [m], [v], [step], **options)
        return p, m, v

    assert oracle.differences(act(torch.optim._functional.sparse_adam), act(optim._functional.sparse_adam)) == []


@pytest.mark.parametrize("name", optim._multi_tensor.__all__)
def test_the_multi_tensor_classes_work_on_lists(name: str) -> None:
    made = getattr(optim._multi_tensor, name)([torch.nn.Parameter(torch.ones(2))])
    assert made.defaults["foreach"] is True
    assert isinstance(made, getattr(torch.optim, name))
