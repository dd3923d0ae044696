"""What the tests show on the CPU, on a GPU: `python -m tests.gpu`. Prints one line a check; exits 1 if any differs.

Foreach, fused, capturable and compiled steps against torch's classes on the same device, loading, hooks and `resume`,
and the time of a step of both.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import optimstate
import optimstate.optim as optim
from optimstate import hooks
from tests import cases, oracle

SHAPES = ((64, 33), (128,), (7, 5, 3), ())
FLAGS: dict[str, dict[str, Any]] = {
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"foreach": True, "capturable": True},
    "capturable loop": {"foreach": False, "capturable": True},
}
MATRICES = ("Muon",)


def trained(library: Any, name: str, flags: dict[str, Any], *, compiled: bool = False, steps: int = 5) -> Any:
    """Parameters and state after some steps on the GPU."""
    shapes = SHAPES[:1] if name in MATRICES else SHAPES
    parameters = [nn.Parameter(oracle.numbers(shape, torch.float32, seed=3).cuda()) for shape in shapes]
    optimizer = getattr(library, name)(parameters, lr=0.01, **flags)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    for number in range(steps):
        for index, p in enumerate(parameters):
            p.grad = oracle.numbers(tuple(p.shape), torch.float32, seed=10 * number + index).cuda()
        step()
    return [p.detach().cpu() for p in parameters], oracle_state(optimizer, parameters)


def oracle_state(optimizer: Any, parameters: list[Any]) -> list[dict[str, Any]]:
    def on_cpu(value: Any) -> Any:
        return value.cpu() if isinstance(value, torch.Tensor) else value

    return [{slot: on_cpu(value) for slot, value in optimizer.state[p].items()} for p in parameters]


def steps() -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Every class with each implementation that torch's has, and some compiled."""
    for name in sorted(set(cases.OPTIMIZERS) - {"LBFGS", "SparseAdam"}):
        for flag, options in FLAGS.items():
            for compiled in (False, True) if name in {"AdamW", "SGD"} and flag == "foreach" else (False,):
                label = f"{name} {flag}{' compiled' if compiled else ''}"
                yield label, lambda n=name, o=options, c=compiled: compared(n, o, compiled=c)


def compared(name: str, flags: dict[str, Any], *, compiled: bool) -> list[str]:
    try:
        expected = trained(torch.optim, name, flags, compiled=compiled)
    except (TypeError, RuntimeError) as error:
        return [f"(torch has none: {str(error)[:60]})"] if "unexpected keyword" not in str(error) else ["(not there)"]
    return oracle.differences(list(expected), list(trained(optim, name, flags, compiled=compiled)))


def loading() -> list[str]:
    """A state saved on the GPU goes on with torch's bits in ours, and from the CPU."""
    told = []
    for place in ("cuda", "cpu"):
        found = []
        for library in (torch.optim, optim):
            torch.manual_seed(0)
            model = nn.Linear(8, 8).cuda()
            optimizer = library.AdamW(model.named_parameters(), lr=0.01, fused=True)
            for _ in range(3):
                model(torch.ones(2, 8, device="cuda")).square().sum().backward()
                optimizer.step()
                state = copy.deepcopy(optimizer.state_dict())
                with tempfile.TemporaryDirectory() as folder:
                    torch.save(state, Path(folder) / "state.pt")
                    optimizer.load_state_dict(torch.load(Path(folder) / "state.pt", map_location=place))
            found.append([p.detach().cpu() for p in model.parameters()])
        told += oracle.differences(*found)
    return told


def resuming() -> list[str]:
    """Weights and state of a renamed model on the GPU, by a hook and by `resume`."""
    told = []
    for how in ("hook", "resume"):
        torch.manual_seed(0)
        old = nn.ModuleDict({"a": nn.Linear(4, 4)}).cuda()
        saved = torch.optim.AdamW(old.named_parameters(), lr=0.01)
        old["a"](torch.ones(2, 4, device="cuda")).square().sum().backward()
        saved.step()
        new = nn.ModuleDict({"b": nn.Linear(4, 4)}).cuda()
        optimizer = optim.AdamW(new.named_parameters(), lr=0.01)
        plan = optimstate.Plan.from_options(rename=["a.{p}=b.{p}"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            torch.save({"model": old.state_dict(), "optimizer": saved.state_dict()}, path)
            if how == "hook":
                optimizer.register_load_state_dict_pre_hook(hooks.migrate(plan))
                optimizer.load_state_dict(torch.load(path)["optimizer"])
            else:
                optimstate.resume(path, model=new, optimizer=optimizer, plan=plan)
        for p, q in zip(old.parameters(), new.parameters(), strict=True):
            told += oracle.differences(dict(saved.state[p]), dict(optimizer.state[q]), how)
    return told


def step_time(library: Any, name: str, flags: dict[str, Any]) -> float:
    """Milliseconds of one step over 200 matrices, the best of five."""
    parameters = [nn.Parameter(torch.ones(256, 256, device="cuda")) for _ in range(200)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = getattr(library, name)(parameters, lr=0.01, **flags)
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def main() -> int:
    if not torch.cuda.is_available():
        print("there is no GPU here that this torch can use")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    wrong = 0
    for label, check in (*steps(), ("load_state_dict", loading), ("hooks and resume", resuming)):
        told = check()
        noted = told and all(line.startswith("(") for line in told)
        wrong += bool(told) and not noted
        print(f"{label}: {told[0] if told else 'equal'}", flush=True)
    for name in ("AdamW", "SGD", "NAdam"):
        for flag in ("foreach", "fused") if name != "NAdam" else ("foreach",):
            torchs, ours = (step_time(library, name, FLAGS[flag]) for library in (torch.optim, optim))
            print(f"{name} {flag}: torch {torchs:.2f} ms, ours {ours:.2f} ms")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
