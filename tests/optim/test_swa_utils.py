"""Averaged models, SWA learning rates and batch-norm statistics are torch's, bit for bit."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimstate.errors import StateMismatchError
from optimstate.optim import swa_utils as ours
from optimstate.optim.lr_scheduler import CosineAnnealingLR
from tests import support
from tests.optim.lr_scheduler.cases import OPTIMIZERS

theirs = torch.optim.swa_utils
LIBRARIES: list[Any] = [ours, theirs]


class Net(nn.Module):
    """Batch norms of two kinds, a dropout, an integer parameter's worth of buffers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Sequential(nn.Unflatten(1, (2, 3, 1)), nn.BatchNorm2d(2, momentum=None), nn.Flatten())
        self.register_buffer("mask", torch.tensor([True, False]))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


seeded = partial(support.seeded, seed=3)


def batches(count: int = 6, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(11)
    return [(torch.randn(5, 4, dtype=dtype), torch.randn(5, 6, dtype=dtype)) for _ in range(count)]


def train(model: nn.Module, data: list[Any], optimizer: torch.optim.Optimizer, after: Callable[[], None]) -> None:
    """One epoch; `after` runs after each optimizer step."""
    for inputs, target in data:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), target).backward()
        optimizer.step()
        after()


def same(one: nn.Module, other: nn.Module) -> None:
    mine, yours = one.state_dict(), other.state_dict()
    assert list(mine) == list(yours)
    for name in mine:
        assert mine[name].dtype == yours[name].dtype
        assert torch.equal(mine[name], yours[name]), name


def own_average(mean: Tensor, value: Tensor, count: Any) -> Tensor:
    return mean * 0.75 + value.to(mean.dtype) * 0.25 / (1 + count)


def own_averages(means: Any, values: Any, count: Any) -> None:
    for mean, value in zip(means, values, strict=True):
        mean.copy_(mean + (value - mean) / (count + 2))


def their_multi_average(means: Any, values: Any, count: Any) -> None:
    """torch's, whose branch for integers raises: those are averaged as by its function for one tensor."""
    if means[0].is_floating_point() or means[0].is_complex():
        theirs.get_swa_multi_avg_fn()(means, values, count)
    else:
        for mean, value in zip(means, values, strict=True):
            mean.copy_(theirs.get_swa_avg_fn()(mean, value, count))


AVERAGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "equal": lambda lib: {},
    "swa_avg_fn": lambda lib: {"avg_fn": lib.get_swa_avg_fn()},
    "swa_multi_avg_fn": lambda lib: {
        "multi_avg_fn": lib.get_swa_multi_avg_fn() if lib is ours else their_multi_average
    },
    "ema_avg_fn": lambda lib: {"avg_fn": lib.get_ema_avg_fn(0.9)},
    "ema_multi_avg_fn": lambda lib: {"multi_avg_fn": lib.get_ema_multi_avg_fn(0.95)},
    "ema default": lambda lib: {"multi_avg_fn": lib.get_ema_multi_avg_fn()},
    "own avg_fn": lambda lib: {"avg_fn": own_average},
    "own multi_avg_fn": lambda lib: {"multi_avg_fn": own_averages},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averages_are_the_same_bits(average: Any, use_buffers: bool, dtype: torch.dtype) -> None:
    results = []
    for library in LIBRARIES:
        model = seeded(lambda: Net(dtype))
        averaged = library.AveragedModel(model, use_buffers=use_buffers, **average(library))
        torch.manual_seed(5)
        if use_buffers:
            del averaged.module.mask, model.mask  # booleans have no average in either library
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            train(model, batches(dtype=dtype), optimizer, lambda a=averaged, m=model: a.update_parameters(m))
        results.append(averaged)
    assert int(results[0].n_averaged) == 12
    same(*results)
    inputs = batches()[0][0].to(dtype)
    assert torch.equal(*(averaged.eval()(inputs) for averaged in results))


def test_tensors_of_several_dtypes_are_averaged_apart() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
            self.narrow = nn.Parameter(torch.randn(3))
            self.complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
            self.count = nn.Parameter(torch.tensor([7, 8]), requires_grad=False)

    for average in AVERAGES.values():
        results = []
        for library in LIBRARIES:
            model = seeded(Mixed)
            averaged = library.AveragedModel(model, **average(library))
            for _ in range(4):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.arange(1, 1 + parameter.numel()).to(parameter.dtype))
                averaged.update_parameters(model)
            results.append(averaged)
        same(*results)


@pytest.mark.parametrize("count", [3, torch.tensor(3)], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex64], ids=str)
def test_averaging_functions_agree_alone(dtype: torch.dtype, count: Any) -> None:
    outcomes = []
    for library in LIBRARIES:
        torch.manual_seed(0)
        means, values = ([(torch.randn(4) * 9).to(dtype) for _ in range(3)] for _ in range(2))
        outcome: list[Any] = []
        for name in ("get_swa_avg_fn", "get_ema_avg_fn"):
            outcome += [getattr(library, name)()(means[0], values[0], count)]
        swa_multi = ours.get_swa_multi_avg_fn() if library is ours else their_multi_average
        for multi in (swa_multi, library.get_ema_multi_avg_fn()):
            multi(means, values, count)
            outcome += [mean.clone() for mean in means]
        outcomes.append(outcome)
    for mine, yours in zip(*outcomes, strict=True):
        assert mine.dtype == yours.dtype
        assert torch.equal(mine, yours)


def test_torch_still_has_no_equal_average_of_integers() -> None:
    for count in (3, torch.tensor(3)):
        with pytest.raises(RuntimeError):
            theirs.get_swa_multi_avg_fn()([torch.tensor([1, 2])], [torch.tensor([4, 5])], count)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
@pytest.mark.parametrize("name", ["get_ema_avg_fn", "get_ema_multi_avg_fn"])
def test_a_decay_out_of_range_is_refused(name: str, decay: float) -> None:
    messages = []
    for library in LIBRARIES:
        with pytest.raises(ValueError, match="Invalid decay value") as error:
            getattr(library, name)(decay)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_only_one_averaging_function() -> None:
    for library in LIBRARIES:
        with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn should be provided"):
            library.AveragedModel(Net(), avg_fn=own_average, multi_avg_fn=own_averages)


def test_the_average_has_its_own_device() -> None:
    averaged = ours.AveragedModel(nn.Linear(2, 2), device="meta")
    assert {tensor.device.type for tensor in averaged.state_dict().values()} == {"meta"}


def test_averaged_models_exchange_their_states() -> None:
    model = Net()
    saved, other = ours.AveragedModel(model), theirs.AveragedModel(seeded(Net))
    saved.update_parameters(model)
    other.load_state_dict(saved.state_dict())
    with torch.no_grad():
        model.body[0].weight.mul_(3)
    for averaged in (saved, other):
        averaged.update_parameters(model)
    same(saved, other)


def test_a_model_of_another_structure_is_refused_before_anything_changes() -> None:
    averaged = ours.AveragedModel(nn.Linear(3, 3))
    before = averaged.module.weight.clone()
    with pytest.raises(StateMismatchError, match=r"averages 2 parameters, the model has 1 \(only in one of them: bias"):
        averaged.update_parameters(nn.Linear(3, 3, bias=False))
    with pytest.raises(StateMismatchError, match="averages 0 buffers, the model has 3"):
        averaged.update_parameters(nn.BatchNorm1d(3))
    assert torch.equal(averaged.module.weight, before)
    assert averaged.n_averaged == 0


# Batch norms.


def feeds() -> dict[str, Callable[[], Any]]:
    data = [inputs for inputs, _ in batches()]
    return {
        "tensors": lambda: data,
        "lists": lambda: [[inputs, None] for inputs in data],
        "tuples": lambda: [(inputs, None) for inputs in data],
        "generator": lambda: iter(data),
        "dataloader": lambda: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(data)), 7),
        "one": lambda: data[:1],
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("feed", feeds().values(), ids=feeds())
def test_statistics_are_the_same_bits(feed: Any, device: Any, training: bool) -> None:
    models = []
    for library in LIBRARIES:
        model = seeded(Net).train(training)
        torch.manual_seed(1)
        library.update_bn(feed(), model, device)
        models.append(model)
        assert model.training == training
        assert [m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [0.3, None]
    assert not torch.equal(models[0].body[1].running_mean, torch.zeros(6))
    same(*models)


def test_a_model_without_batch_norms_is_not_run() -> None:
    ours.update_bn(iter(lambda: pytest.fail("a batch was taken"), None), nn.Linear(2, 2))


def test_an_error_in_the_data_leaves_momenta_and_mode_as_they_were() -> None:
    def broken() -> Iterator[Tensor]:
        yield batches()[0][0]
        raise OSError("disk")

    model = Net().eval()
    with pytest.raises(OSError, match="disk"):
        ours.update_bn(broken(), model)
    assert model.body[1].momentum == 0.3
    assert not model.training
    assert not model.body[1].training


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("make", "shown"), [(lambda d: d, "\rupdate_bn: 6/6 batches\n"), (iter, "\rupdate_bn: 6 batches\n")]
)
def test_progress_is_shown_on_a_terminal_when_asked(make: Any, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [inputs for inputs, _ in batches()]
    for stream, progress, expected in (
        (Terminal(), True, shown),
        (Terminal(), False, ""),
        (io.StringIO(), True, ""),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        model, reference = seeded(Net), seeded(Net)
        torch.manual_seed(1)
        ours.update_bn(make(data), model, progress=progress)
        torch.manual_seed(1)
        theirs.update_bn(make(data), reference)
        same(model, reference)
        assert stream.getvalue().endswith(expected)
        assert bool(stream.getvalue()) == bool(expected)


# The two complete recipes of the reference, shortened to fewer epochs.


def swa_recipe(library: Any, optimizers: ModuleType, cosine: Any) -> tuple[Any, Tensor, list[Any]]:
    model, loader = seeded(Net), batches()
    optimizer = optimizers.SGD(model.parameters(), lr=0.1, momentum=0.9)
    swa_model = library.AveragedModel(model)
    scheduler = cosine(optimizer, T_max=30)
    swa_start = 16
    swa_scheduler = library.SWALR(optimizer, swa_lr=0.05)
    lrs = []
    for epoch in range(30):
        train(model, loader, optimizer, lambda: None)
        if epoch > swa_start:
            swa_model.update_parameters(model)
            swa_scheduler.step()
        else:
            scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    library.update_bn(loader, swa_model)
    return swa_model, swa_model(loader[0][0]), lrs


def ema_recipe(library: Any, optimizers: ModuleType, cosine: Any) -> tuple[Any, Tensor, list[Any]]:
    model, loader = seeded(Net), batches()
    optimizer = optimizers.Adam(model.parameters(), lr=0.01)
    ema_model = library.AveragedModel(model, multi_avg_fn=library.get_ema_multi_avg_fn(0.999))
    for _ in range(30):
        train(model, loader, optimizer, lambda: ema_model.update_parameters(model))
    library.update_bn(loader, ema_model)
    return ema_model, ema_model(loader[0][0]), []


@pytest.mark.parametrize("optimizers", OPTIMIZERS, ids=lambda library: library.__name__)
@pytest.mark.parametrize("recipe", [swa_recipe, ema_recipe])
def test_the_documented_recipes_give_the_same_model(recipe: Any, optimizers: ModuleType) -> None:
    mine, my_predictions, my_lrs = recipe(ours, optimizers, CosineAnnealingLR)
    yours, your_predictions, your_lrs = recipe(theirs, torch.optim, torch.optim.lr_scheduler.CosineAnnealingLR)
    same(mine, yours)
    assert torch.equal(my_predictions, your_predictions)
    assert my_lrs == your_lrs
    assert int(mine.n_averaged) == {"swa_recipe": 13, "ema_recipe": 180}[recipe.__name__]


@pytest.mark.parametrize("strategy", ["linear", "cos"])
def test_a_swalr_state_that_holds_its_function_loads(strategy: str) -> None:
    """As torch wrote it until 2.9; no warning comes, which would be an error here."""

    def _linear_anneal(t: float) -> float:
        return t

    def _cosine_anneal(t: float) -> float:
        return (1 - math.cos(math.pi * t)) / 2

    function = {"linear": _linear_anneal, "cos": _cosine_anneal}[strategy]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    old = ours.SWALR(optimizer, 0.05, anneal_strategy=strategy).state_dict()
    del old["_anneal_strategy"]
    new = ours.SWALR(optimizer, 0.05, anneal_strategy="linear" if strategy == "cos" else "cos")
    new.load_state_dict({**old, "anneal_func": function})
    assert new.anneal_func(0.25) == function(0.25)
    assert "anneal_func" not in vars(new)
