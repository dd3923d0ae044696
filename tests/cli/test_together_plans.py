"""Every operation of a plan by several processes: what one process writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from optimstate.formats.registry import open_checkpoint
from optimstate.tree import difference
from tests.cli.running import run
from tests.cli.test_together import parts_of, together

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

REARRANGED = {
    "rename": ("h.{i}.w", 'to = "g.{i}.w"'),
    "split": ("emb", 'to = "{x=a|b}.emb"\nsplit = 0'),
    "fuse": ("{x=q|k}.w", 'to = "qk.w"\nconcat = 0'),
    "stack": ("{x=r|s}.w", 'to = "rs.w"\nstack = 0'),
    "experts": ("mlp.w", 'to = "mlp.{e=0..3}.w"'),
    "drop": ("old", "drop = true"),
    "fresh": ("new", "fresh = true"),
    "cut": ("long", "slice = { dim = 0, start = 3, stop = 20 }"),
    "padded": ("short", "resize = { dim = 0, size = 50, fill = 0.0 }"),
    "reshape": ("flat", "reshape = [8, 40]"),
    "repeat": ("few", "repeat = { dim = 0, times = 2 }"),
}
COMPUTED = {
    "transpose": ("emb", "transpose = [0, 1]"),
    "permute": ("long", "permute = [1, 0]"),
    "cast": ("flat", 'cast = "bfloat16"'),
    "scale": ("few", "scale = { param = 2.0, grad = 0.5 }"),
    "columns": ("{x=q|k}.w", 'to = "qk.w"\nconcat = 1'),
    "mean": ("short", 'resize = { dim = 0, size = 50, fill = "mean" }'),
}
SHAPES = {f"h.{i}.w": (12 + i, 8) for i in range(4)} | {f"{name}.w": (8, 8) for name in ("q", "k", "r", "s", "mlp")}
SHAPES |= dict.fromkeys(("emb", "long", "short", "flat", "few"), (40, 8)) | {
    "old": (5,),
    "new": (9, 8),
    "wide": (1, 5000),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans") / "a"
    torch.manual_seed(0)
    slots = {
        name: {"step": torch.tensor(5.0), "exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape)}
        for name, shape in SHAPES.items()
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": list(SHAPES)}
    tree = {
        "model": {name: torch.randn(shape) for name, shape in SHAPES.items()},
        "optimizer": {"state": slots, "param_groups": [group]},
        "odd": {"none": torch.zeros(0, 4), "yes": torch.ones(5) > 0, "c": torch.randn(3, dtype=torch.complex64)},
        "objects": [1, {"a": "x" * 40}],
    }
    dcp.save(tree, checkpoint_id=str(folder))
    return folder


@pytest.mark.parametrize(
    ("operations", "size", "options"),
    [(REARRANGED, 3, []), (REARRANGED, 5, ["--ranks", "4"]), (COMPUTED, 2, ["--copy"])],
    ids=["rearranged", "ranks", "computed"],
)
def test_every_operation_has_the_result_of_one_process(
    operations: dict[str, tuple[str, str]], size: int, options: list[str], source: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    rules = []
    for name, what in operations.values():
        to = "" if what.startswith(("to", "drop", "fresh")) else f'to = "{name}"\n'
        rules.append(f'[[rule]]\nfrom = "{name}"\n{to}{what}\n')
    plan.write_text("".join(rules))
    one, several = tmp_path / "one", tmp_path / "several"
    outcome = run("remap", str(source), str(one), "--plan", str(plan), *options)
    assert outcome.code == 0, outcome.err
    done = together(size, ["remap", source, several, "--plan", plan, *options])
    assert [code for code, _ in done] == [0] * size, done
    assert difference(open_checkpoint(one).tree, open_checkpoint(several).tree) is None
    assert not parts_of(several)
    assert not list(several.glob(".together*"))
