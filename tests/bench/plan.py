"""Planning alone, without torch: how its time grows with the number of parameters, and with that of rules."""

from __future__ import annotations

import gc
import time

from optimstate.io.extents import Extent
from optimstate.plan.apply.execute import execute_optimizer
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.planner import plan_optimizer
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.lazy import LazyTensor, Storage
from tests.bench._harness import Row, Spread, print_table

SECONDS = 5.0  # for 100,000 parameters of three slots and 50 rules
GROWTH = 1.5  # of the time per parameter from 1,000 to 100,000


def checkpoint(parameters: int) -> OptimizerState:
    """An AdamW over layers of ten parameters, nothing of which is ever read."""
    leaves = ["q.weight", "k.weight", "v.weight", "o.weight", "up.weight", "down.weight", "gate.weight"]
    leaves += ["norm1.weight", "norm2.weight", "norm3.weight"]
    names = [f"model.layers.{layer}.{leaf}" for layer in range(parameters // 10) for leaf in leaves]
    storage = Storage((Extent(None, 0, 1 << 20),), 1 << 20)
    scalar = LazyTensor(storage, "float32", ())
    state = {
        index: {
            "step": scalar,
            "exp_avg": LazyTensor(storage, "float32", (16, 16)),
            "exp_avg_sq": LazyTensor(storage, "float32", (16, 16)),
        }
        for index in range(len(names))
    }
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "fused": None}
    options["decoupled_weight_decay"] = True
    group = {**options, "params": list(range(len(names))), "param_names": names}
    return OptimizerState.from_node({"state": state, "param_groups": [group]})


def plan(rules: int) -> Plan:
    """Rules of every kind; most match nothing, as in a plan that serves several models, but all are tried."""
    told = [
        'from = "model.layers.{i}.{x=q|k|v}.weight"\nto = "model.layers.{i}.qkv.weight"\nconcat = 0',
        'from = "model.layers.{i}.{x=up|gate}.weight"\nto = "blocks.{i}.mlp.{x}.{e=0..1}.weight"\nsplit = 0',
        'from = "model.layers.{i}.down.weight"\nto = "blocks.{i}.mlp.down.weight"\ntranspose = true',
        'from = "model.layers.{i:int}.norm{n}.weight"\nto = "model.layers.{i+1}.ln{n}.weight"',
    ]
    told += [
        f'from = "model.layers.{{i}}.other{n}.{{p}}"\nto = "blocks.{{i}}.other{n}.{{p}}"' for n in range(rules - 5)
    ]
    told.append('from = "model.layers.{i}.{m}.weight"\nto = "blocks.{i}.{m}.weight"')
    text = '[policy]\nunused = "ignore"\n' + "".join(f"[[rule]]\n{rule}\n" for rule in told)
    return Plan.from_toml(text)


def seconds(parameters: int, rules: int, repeats: int) -> tuple[float, float]:
    """The best time to plan and to carry out."""
    state, made = checkpoint(parameters), plan(rules)
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        migration = plan_optimizer(made, state)
        planned = time.process_time()
        execute_optimizer(migration.sections["optimizer"], state)
        best = [min(best[0], planned - start), min(best[1], time.process_time() - planned)]
    return best[0], best[1]


def main(quick: bool) -> None:
    """Print the table."""
    many = 20_000 if quick else 100_000
    repeats = 1 if quick else 3
    few, _ = seconds(1_000, 50, 5)
    time_50, carried = seconds(many, 50, repeats)
    time_5, _ = seconds(many, 5, repeats)
    growth = (time_50 / many) / (few / 1_000)
    print_table(
        f"planning {many:,} parameters x 3 slots (CPU time)",
        [
            Row("50 rules: plan", _spread(time_50), SECONDS, "s"),
            Row("50 rules: carry out", _spread(carried), None, "s"),
            Row("5 rules: plan", _spread(time_5), None, "s"),
            Row("1,000 parameters, 50 rules: plan", _spread(few), None, "s"),
            Row(f"time per parameter, {many:,} over 1,000", _spread(growth), GROWTH),
        ],
    )


def _spread(number: float) -> Spread:

    return Spread.of([number])
