"""Time per optimizer step, ours against torch's same implementation in the same run.

    python -m tests.bench --only optim [--quick]

One thread. Ours and torch's take turns on the same parameters and gradients, and the median of the pairwise ratios
counts: it is what stays put on a busy machine. Two tables: each implementation against its like (a ratio; less is
better), and our default and our fused steps on large tensors against torch's default (a speed-up; more is better).
Misses are marked; nothing is asserted, because a clock is no test.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import optimstate.optim as optim

Shape = tuple[int, ...]
Step = Callable[[], Any]


class Size(NamedTuple):
    """A set of parameters.

    Args:
        name: What it is called in the table.
        shapes: Of the parameters.
        repeats: Pairs of measurements.
        steps: Steps in one measurement.
    """

    name: str
    shapes: Sequence[Shape]
    repeats: int
    steps: int


class Contender(NamedTuple):
    """An algorithm with options, and the implementations torch has of it."""

    name: str
    optimizer: str
    options: dict[str, Any]
    implementations: Sequence[str]


def gpt2(width: int, layers: int, vocabulary: int, context: int) -> list[Shape]:
    """The shapes of GPT-2's parameters; small is 768 wide with 12 layers, and has 148 tensors."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *([*norm, *attention, *norm, *mlp] * layers), *norm]


TINY = Size("500 x 1k", [(10, 100)] * 500, repeats=15, steps=3)
# A smaller vocabulary than GPT-2's 50257 only makes one of the 148 tensors smaller, and the run shorter.
GPT2 = Size("GPT-2 small", gpt2(768, 12, 8192, 1024), repeats=3, steps=1)
LARGE = Size("8 x 4M", [(2048, 2048)] * 8, repeats=5, steps=1)

FLAGS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
LOOPS = ("for-loop", "foreach")
WITH_FUSED = (*LOOPS, "fused")

CONTENDERS = (
    Contender("ASGD", "ASGD", {}, LOOPS),
    Contender("Adadelta", "Adadelta", {}, LOOPS),
    Contender("Adafactor", "Adafactor", {}, LOOPS),
    Contender("Adagrad", "Adagrad", {}, WITH_FUSED),
    Contender("Adam", "Adam", {}, WITH_FUSED),
    Contender("AdamW", "AdamW", {}, WITH_FUSED),
    Contender("Adamax", "Adamax", {}, LOOPS),
    Contender("NAdam", "NAdam", {}, LOOPS),
    Contender("RAdam", "RAdam", {}, LOOPS),
    Contender("RMSprop", "RMSprop", {}, LOOPS),
    Contender("Rprop", "Rprop", {}, LOOPS),
    Contender("SGD", "SGD", {}, WITH_FUSED),
    Contender("SGD momentum", "SGD", {"momentum": 0.9}, WITH_FUSED),
)

MOST = 1.05  # ours / torch's
MOST_PLAIN_SGD = 1.15  # where a step is one kernel call a tensor, and the rest is bookkeeping
LEAST_DEFAULT = {
    "RMSprop": 1.3,
    "NAdam": 1.3,
    "Adadelta": 1.3,
    "Rprop": 1.3,
    "RAdam": 1.3,
    "Adamax": 1.2,
    "ASGD": 1.0,
}
LEAST_FUSED = {"RMSprop": 3.0, "RAdam": 3.0, "NAdam": 2.5}
FUSED_ERROR = 1e-6  # relative to a parameter's largest value


def parameters(shapes: Sequence[Shape], seed: int = 0) -> list[Tensor]:
    """Parameters with gradients, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def warm(optimizer: torch.optim.Optimizer) -> Step:
    """The step of an optimizer that has state and is past the early steps that some algorithms treat apart."""
    optimizer.step()
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(100)
    return optimizer.step


def seconds(step: Step, steps: int) -> float:
    """Processor seconds of a step: with one thread that is the time it takes, whatever else the machine does."""
    start = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - start) / steps


def duel(torchs: Step, ours: Step, size: Size) -> tuple[float, float, float]:
    """Median seconds of torch's step and of ours, and the median of ours / torch's over pairs that take turns."""
    pairs = []
    gc.collect()
    gc.disable()
    try:
        for number in range(size.repeats):
            if number % 2:
                our_time = seconds(ours, size.steps)
                their_time = seconds(torchs, size.steps)
            else:
                their_time = seconds(torchs, size.steps)
                our_time = seconds(ours, size.steps)
            pairs.append((their_time, our_time))
    finally:
        gc.enable()
    median = statistics.median
    return median(t for t, _ in pairs), median(o for _, o in pairs), median(o / t for t, o in pairs)


class Result(NamedTuple):
    """One line of a table."""

    what: str
    size: str
    torchs: float
    ours: float
    value: float
    target: float
    met: bool
    note: str = ""

    def __str__(self) -> str:
        sign = "" if self.met else "  MISS"
        times = f"{1e3 * self.torchs:9.2f} {1e3 * self.ours:9.2f}"
        return (
            f"{self.what:26} {self.size:12} {times}   {self.value:5.2f}  {self.target:5.2f}{sign}  {self.note}".rstrip()
        )


def against_its_like(sizes: Sequence[Size]) -> Iterator[Result]:
    """Every implementation against torch's same one, on the same parameters."""
    for size in sizes:
        params = parameters(size.shapes)
        for contender in CONTENDERS:
            for implementation in contender.implementations:
                options = {**contender.options, **FLAGS[implementation]}
                torchs = warm(getattr(torch.optim, contender.optimizer)(params, **options))
                ours = warm(getattr(optim, contender.optimizer)(params, **options))
                their_time, our_time, ratio = duel(torchs, ours, size)
                lenient = (contender.name, implementation, size.name) == ("SGD", "for-loop", TINY.name)
                target = MOST_PLAIN_SGD if lenient else MOST
                name = f"{contender.name} {implementation}"
                yield Result(name, size.name, their_time, our_time, ratio, target, ratio <= target)


def the_special_ones(quick: bool) -> Iterator[Result]:
    """Those with one implementation and problems of their own; sizes are cut where the arithmetic is all in kernels."""
    rows = 25 if quick else 250
    square = 128 if quick else 256
    tiny = Size("500 x 1k", [(10, 100)] * (50 if quick else 500), repeats=5, steps=1)
    cases: list[tuple[str, dict[str, Any], Size]] = [
        ("Muon", {}, tiny),
        ("Muon", {}, Size(f"8 x {square}^2", [(square, square)] * 8, repeats=5, steps=1)),
        ("SparseAdam", {}, tiny),
        ("SparseAdam", {}, Size("8 x 4M", [(40 * rows, 400)] * 8, repeats=5, steps=1)),
        ("LBFGS", {"max_iter": 4, "history_size": 5}, tiny),
        ("LBFGS", {"max_iter": 4, "history_size": 5}, Size("8 x 1M", [(1024, 64 if quick else 1024)] * 8, 3, 1)),
    ]
    for name, options, size in cases:
        steps = []
        for module in (torch.optim, optim):
            params = parameters(size.shapes)
            optimizer = getattr(module, name)(params, **options)
            if name == "SparseAdam":
                for parameter in params:
                    picked = torch.arange(0, parameter.shape[0], 10)
                    values = parameter.detach()[picked].clone()
                    indices = picked.unsqueeze(0)
                    gradient = torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)
                    parameter.grad = gradient.coalesce()
            steps.append(with_closure(optimizer, params) if name == "LBFGS" else warm(optimizer))
        with torch.sparse.check_sparse_tensor_invariants(False):  # type: ignore[no-untyped-call]
            their_time, our_time, ratio = duel(steps[0], steps[1], size)
        yield Result(name, size.name, their_time, our_time, ratio, MOST, ratio <= MOST)


def with_closure(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Step:
    """A step on a bowl, from the same start every time, so that every step does the same work."""
    starts = [parameter.detach().clone() for parameter in params]

    @torch.no_grad()
    def closure() -> Any:
        for parameter in params:
            parameter.grad = parameter.detach() * 0.1
        return sum(float(parameter.square().sum()) for parameter in params)

    def step() -> None:
        for parameter, start in zip(params, starts, strict=True):
            parameter.data.copy_(start)
        optimizer.state.clear()
        optimizer.step(closure)

    step()
    return step


def against_torchs_default(size: Size) -> Iterator[Result]:
    """Our default, which must have the same bits, and our fused steps where torch has none."""
    for targets, options, what in ((LEAST_DEFAULT, {}, "default"), (LEAST_FUSED, {"fused": True}, "fused")):
        for name, target in targets.items():
            theirs, own = parameters(size.shapes), parameters(size.shapes)
            torchs = warm(getattr(torch.optim, name)(theirs))
            try:
                ours = warm(getattr(optim, name)(own, **options))
            except TypeError as error:
                yield Result(f"{name} {what}", size.name, 0, 0, 0, target, met=False, note=str(error))
                continue
            error = max(relative_error(a, b) for a, b in zip(theirs, own, strict=True))
            their_time, our_time, ratio = duel(torchs, ours, size)
            limit = 0.0 if what == "default" else FUSED_ERROR
            note = "same bits" if error == 0 else f"off by {error:.1e}"
            met = 1 / ratio >= target and error <= limit
            yield Result(f"{name} {what}", size.name, their_time, our_time, 1 / ratio, target, met, note)


def relative_error(expected: Tensor, found: Tensor) -> float:
    """The largest difference relative to the tensor's largest value."""
    return float((found.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def main(quick: bool, *, only: Sequence[str] = ()) -> None:
    """Print both tables; `only` may name `same` (against the same implementation) or `default`."""
    unknown = set(only) - {"same", "default"}
    if unknown:
        raise SystemExit(f"no such part of optim: {', '.join(sorted(unknown))} (there are same, default)")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    sizes = [TINY, LARGE, GPT2]
    if quick:
        sizes = [TINY._replace(repeats=5), LARGE._replace(shapes=[(1024, 1024)] * 8, name="8 x 1M", repeats=3)]
        sizes.append(GPT2._replace(shapes=gpt2(192, 12, 5000, 1024), name="GPT-2 / 16"))
    header = f"{'':26} {'parameters':12} {'torch ms':>9} {'ours ms':>9}"
    missed = 0
    tables: list[tuple[str, Iterator[Result]]] = []
    if not only or "same" in only:
        same = itertools.chain(against_its_like(sizes[:1]), the_special_ones(quick), against_its_like(sizes[1:]))
        tables.append(("ours / torch, at most", same))
    if not only or "default" in only:
        tables.append(("torch's default / ours, at least", against_torchs_default(sizes[1])))
    try:
        for title, results in tables:
            print(f"\n{header}   {title}")
            for result in results:
                missed += not result.met
                print(result, flush=True)
    finally:
        torch.set_num_threads(threads)
    print(f"\n{missed} missed; {time.perf_counter() - started:.0f} s")
