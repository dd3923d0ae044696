"""Two optimizers on the same problem, compared bit for bit.

torch is the oracle: `compare(torch.optim.Adam, optimstate.optim.Adam, case)` gives both the same parameters and
gradients, steps both, and lists every difference in parameters, state, groups, `state_dict()`, results and `repr`.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer_module

from tests.cases import Case

STEPS = 15
MIXED_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*MIXED_REAL, torch.complex64)}
MIXED_DTYPES = {"mixed": (*MIXED_REAL, torch.complex64), "mixed_real": MIXED_REAL, "mixed_wide": MIXED_REAL[:2]}
LEAST_FINITE = 0.9  # of all elements, or a comparison of NaN with NaN would prove nothing

Shape = tuple[int, ...]


# --- parameters and gradients -----------------------------------------------------------------------------------------


def numbers(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal numbers, the same ones (rounded) for every real dtype."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=source).to(dtype)


def transposed(tensor: Tensor) -> Tensor:
    """The same values, laid out so that the first two dimensions are swapped in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def strided(tensor: Tensor) -> Tensor:
    """The same values in every second place of a larger storage."""
    return torch.stack((tensor, tensor), dim=-1)[..., 0]


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def as_is(tensor: Tensor) -> Tensor:
    return tensor


# Shape, layout of the parameter and layout of its gradient. The last one never gets a gradient.
DENSE: Sequence[tuple[Shape, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = (
    ((33, 17), as_is, transposed),
    ((), as_is, as_is),
    ((1,), as_is, as_is),
    ((7,), strided, as_is),
    ((2, 3, 4, 5), channels_last, channels_last),
    ((0, 3), as_is, as_is),
    ((3,), as_is, as_is),
)
# Fused kernels walk raw memory, in torch too: their parameters are dense and gradients are laid out alike.
DENSE_ALIKE = tuple(
    (shape, layout, layout) for shape, layout in ((s, as_is if m is strided else m) for s, m, _ in DENSE)
)
# Large enough for the kernel that fused RMSprop, NAdam and RAdam borrow, with and without full vectors; the first two
# are taken by it, the others (a gradient laid out otherwise, a small tensor, one with gaps) must not be.
BULKY: Sequence[tuple[Shape, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = (
    ((130, 131), as_is, as_is),
    ((2, 8, 33, 33), channels_last, channels_last),
    ((128, 128), as_is, transposed),
    ((7,), as_is, as_is),
    ((128, 129), strided, as_is),
)
MATRICES: Sequence[tuple[Shape, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = (
    ((9, 4), as_is, as_is),
    ((4, 9), transposed, as_is),
    ((1, 6), as_is, as_is),
    ((5, 5), as_is, transposed),
    ((2, 2), as_is, as_is),
)
# LBFGS flattens with `view`.
VIEWABLE = tuple((shape, as_is, as_is) for shape, _, _ in DENSE)
SPARSE_SHAPES: Sequence[Shape] = ((10, 4), (6,), (5, 2, 3))


class Problem:
    """Parameters and a stream of gradients, the same for whoever asks.

    Args:
        name: "dense"; "nonempty", dense without the empty parameter; "alike", dense with gradients laid out as their
            parameters; "steady", alike with the same parameters having gradients in every step; "matrices"; "sparse";
            "closure"; "bulky"; or "large", one tensor of a million elements beside a small one.
        dtype: A dtype's name, or a key of `MIXED_DTYPES`.
        implementation: A key of `tests.cases.FLAGS`; differentiable steps need parameters that require no gradient.
    """

    def __init__(self, name: str, dtype: str, implementation: str) -> None:
        self.name = name
        self.dtype = dtype
        self.implementation = implementation
        self.layouts = self._layouts()
        self.dtypes = [self._dtype(index) for index in range(len(self.layouts))]

    def _layouts(self) -> Sequence[tuple[Shape, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
        if self.name == "matrices":
            return MATRICES
        if self.name == "sparse":
            return [(shape, as_is, as_is) for shape in SPARSE_SHAPES]
        if self.name == "closure":
            return VIEWABLE
        if self.name == "bulky":
            return BULKY
        if self.name == "large":
            return [((1031, 1009), as_is, as_is), ((5,), as_is, as_is)]
        if self.name == "nonempty":
            return [layout for layout in DENSE if 0 not in layout[0]]
        if self.name in {"alike", "steady"} or self.implementation == "fused":
            return DENSE_ALIKE
        return DENSE

    def _dtype(self, index: int) -> torch.dtype:
        if self.dtype in MIXED_DTYPES:
            palette = MIXED_DTYPES[self.dtype]
            return palette[index % len(palette)]
        return DTYPES[self.dtype]

    def parameters(self) -> list[Tensor]:
        """Fresh leaf parameters."""
        requires_grad = self.implementation != "differentiable"
        return [
            layout(numbers(shape, dtype, seed=index)).requires_grad_(requires_grad)
            for index, ((shape, layout, _), dtype) in enumerate(zip(self.layouts, self.dtypes, strict=True))
        ]

    def gradients(self, step: int) -> list[Tensor | None]:
        """Gradients for a step; some are None, one always, and some elements are exactly zero."""
        return [None if g is None else g.clone() for g in _stream(self.name, self.dtype, self.implementation, step)]

    def absent(self, index: int, step: int) -> bool:
        """Whether a parameter has no gradient: the last dense one never, others now and then."""
        if self.name == "large":
            return False
        if self.name in {"dense", "nonempty", "alike", "steady"} and index == len(self.layouts) - 1:
            return True
        return self.name != "steady" and (index + step) % 5 == 4

    def compute_gradients(self, step: int) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for index, ((shape, _, layout), dtype) in enumerate(zip(self.layouts, self.dtypes, strict=True)):
            if self.absent(index, step):
                found.append(None)
            elif self.name == "sparse":
                found.append(sparse_gradient(shape, dtype, seed=1000 * step + index))
            else:
                gradient = numbers(shape, dtype, seed=1000 * step + index + 100)
                if gradient.dim() == 1 and step % 3 == 0:
                    gradient[0] = 0
                found.append(layout(gradient))
        return found


@functools.lru_cache(maxsize=512)
def _stream(name: str, dtype: str, implementation: str, step: int) -> tuple[Tensor | None, ...]:
    return tuple(Problem(name, dtype, implementation).compute_gradients(step))


def sparse_gradient(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """A COO gradient over rows, uncoalesced with repeated rows; every fourth one is empty."""
    rows = 0 if seed % 4 == 3 else 4
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(shape[0], (1, rows), generator=generator)
    return torch.sparse_coo_tensor(indices, numbers((rows, *shape[1:]), dtype, seed), shape, check_invariants=True)


def curved_loss(parameters: Sequence[Tensor]) -> Tensor:
    """A smooth function with curvature that differs by direction, real for complex parameters too."""
    terms = []
    for index, parameter in enumerate(parameters[:-1]):
        distance = (parameter - 0.5).abs().square()
        weight = torch.linspace(0.5, 3.0, parameter.numel(), dtype=distance.dtype).reshape(parameter.shape)
        terms.append((weight * distance + 0.1 * (index + 1) * distance.square()).sum())
    return torch.stack(terms).sum()


# --- one run ----------------------------------------------------------------------------------------------------------


class Run:
    """One optimizer class on one case's problem."""

    def __init__(self, optimizer_class: Callable[..., torch.optim.Optimizer], case: Case) -> None:
        self.case = case
        self.problem = Problem(case.problem, case.dtype, case.implementation)
        self.parameters = self.problem.parameters()
        self.optimizer = optimizer_class(self.groups(), **case.kwargs())
        self.results: list[Any] = []

    def groups(self) -> list[dict[str, Any]]:
        """One group, or two of which the second has options of its own."""
        if self.case.second_group is None:
            return [{"params": self.parameters}]
        middle = len(self.parameters) // 2
        options = {name: value for name, value in self.case.second_group.items() if name not in self.case.options}
        return [{"params": self.parameters[:middle]}, {"params": self.parameters[middle:], **options}]

    def step(self, number: int) -> None:
        if self.case.problem == "closure":
            self.results.append(self.optimizer.step(self.closure).detach())
            return
        for parameter, gradient in zip(self.parameters, self.problem.gradients(number), strict=True):
            parameter.grad = gradient
        self.results.append(self.optimizer.step())

    def closure(self) -> Any:
        self.optimizer.zero_grad()
        loss = curved_loss(self.parameters)
        torch.autograd.backward(loss)
        return loss

    def steps(self, start: int, stop: int) -> None:
        with contextlib.ExitStack() as stack:
            if self.case.capturable:
                stack.enter_context(capturable_on_cpu())
            if self.case.problem == "sparse":
                stack.enter_context(torch.sparse.check_sparse_tensor_invariants(True))  # type: ignore[no-untyped-call]
            for number in range(start, stop):
                self.step(number)

    def view(self) -> dict[str, Any]:
        """Everything that must be equal, by what a reader would call it."""
        by_place = {f"parameter {index}": parameter for index, parameter in enumerate(self.parameters)}
        return {
            **by_place,
            "state_dict": self.optimizer.state_dict(),
            "defaults": self.optimizer.defaults,
            "results": self.results,
            "repr": repr(self.optimizer),
            "states held": len(self.optimizer.state),
        }

    def finite_fraction(self) -> float:
        flat = torch.cat([torch.isfinite(p.detach()).reshape(-1) for p in self.parameters])
        return flat.double().mean().item()


@contextlib.contextmanager
def capturable_on_cpu() -> Iterator[None]:
    """Let `capturable=True` run without an accelerator: torch then counts the CPU among the devices that support it."""
    function = torch_optimizer_module._get_capturable_supported_devices
    original = function.__code__
    function.__code__ = _with_cpu.__code__
    try:
        yield
    finally:
        function.__code__ = original


def _with_cpu(supports_xla: bool = True) -> list[str]:
    return ["cuda", "cpu"]


# --- comparison -------------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> Tensor:
    """The values as a flat uint8 tensor, in logical order whatever the strides."""
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return dense.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def tensor_difference(left: Tensor, right: Tensor) -> str:
    """What differs between two tensors, or an empty string."""
    facts = [("dtype", left.dtype, right.dtype), ("shape", tuple(left.shape), tuple(right.shape))]
    facts += [("device", left.device, right.device), ("layout", left.layout, right.layout)]
    facts += [("requires_grad", left.requires_grad, right.requires_grad)]
    if left.layout == right.layout == torch.strided:
        facts.append(("stride", left.stride(), right.stride()))
    told = [f"{name} {one} != {other}" for name, one, other in facts if one != other]
    if told:
        return "; ".join(told)
    if torch.equal(tensor_bytes(left), tensor_bytes(right)):
        return ""
    wide = torch.complex128 if left.is_complex() else torch.float64
    gap = (left.detach().to_dense().to(wide) - right.detach().to_dense().to(wide)).abs()
    count = int((tensor_bytes(left) != tensor_bytes(right)).reshape(gap.numel(), -1).any(1).sum())
    return f"{count} of {gap.numel()} elements differ, by at most {gap.max().item():.3g}"


def differences(left: Any, right: Any, place: str = "") -> list[str]:
    """Every difference between two nested values: types, keys and their order, lengths, numbers and tensors as bits."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        told = tensor_difference(left, right)
        return [f"{place}: {told}"] if told else []
    if type(left) is not type(right):
        return [f"{place}: type {type(left).__name__} != {type(right).__name__} ({left!r} != {right!r})"]
    if isinstance(left, Mapping):
        if list(left) != list(right):
            return [f"{place}: keys {list(left)} != {list(right)}"]
        inside = ((left[key], right[key], f"{place}.{key}" if place else str(key)) for key in left)
        return [told for one, other, name in inside for told in differences(one, other, name)]
    if isinstance(left, list | tuple):
        if len(left) != len(right):
            return [f"{place}: length {len(left)} != {len(right)}"]
        pairs = enumerate(zip(left, right, strict=True))
        return [told for index, (one, other) in pairs for told in differences(one, other, f"{place}[{index}]")]
    same = struct.pack("d", left) == struct.pack("d", right) if isinstance(left, float) else left == right
    return [] if same else [f"{place}: {left!r} != {right!r}"]


def compare(
    reference: Callable[..., torch.optim.Optimizer],
    candidate: Callable[..., torch.optim.Optimizer],
    case: Case,
    steps: int = STEPS,
) -> list[str]:
    """Run both from the same start and list what differs at the end, with the first step that differed."""
    one, other = Run(reference, case), Run(candidate, case)
    told = differences(one.view(), other.view())
    if told:
        return [f"{case}: after construction: {line}" for line in told]
    one.steps(0, steps)
    other.steps(0, steps)
    climbs = case.problem == "closure" and case.options.get("maximize")  # a loss without a top
    assert climbs or one.finite_fraction() >= LEAST_FINITE, f"{case}: {one.finite_fraction():.0%} finite proves little"
    told = differences(one.view(), other.view())
    if not told:
        return []
    first = first_difference(reference, candidate, case, steps)
    return [f"{case}: from step {first}: {line}" for line in told]


def first_difference(
    reference: Callable[..., torch.optim.Optimizer],
    candidate: Callable[..., torch.optim.Optimizer],
    case: Case,
    steps: int,
) -> int:
    """The first step (from 0) after which the two differ, found in lockstep; `steps` if they no longer do."""
    one, other = Run(reference, case), Run(candidate, case)
    for number in range(steps):
        one.steps(number, number + 1)
        other.steps(number, number + 1)
        if differences(one.view(), other.view()):
            return number
    return steps
