"""`optimstate demo`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimstate.cli.app import app, register

if TYPE_CHECKING:
    from collections.abc import Mapping


@app.command(epilog="Example: optimstate demo --keep optimstate-demo")
def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Leave the files there to look at.", show_default=False)
    ] = None,
) -> None:
    """Show the main job on a real checkpoint: inspect it, rename, duplicate experts, convert, and prove every tensor.

    Needs a checkout of the repository, whose fixtures it reads. Torch loads the results and compares them bit by bit.
    """
    import shutil
    import tempfile
    from contextlib import chdir

    from optimstate.errors import CheckpointNotFoundError

    source = Path(__file__).resolve().parent.parent / "fixtures/files/optimstate/moe_before_experts/checkpoint.pt"
    if not source.is_file():
        raise CheckpointNotFoundError("the demo's checkpoint is missing", path=source, hint="Run it in a checkout.")
    with tempfile.TemporaryDirectory(prefix="optimstate-demo-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / "dense.pt")
        with chdir(folder):
            _run()


EXPERTS = 4


def _run() -> None:
    register([])
    dense, renamed, upcycled = Path("dense.pt"), Path("renamed.pt"), Path("upcycled.pt")
    container, returned = Path("upcycled.safetensors"), Path("returned.pt")
    layers = "layers.{i}.mlp.{fc=fc1|fc2}.{p}"
    experts = f"layers.{{i}}.mlp.experts.{{e=0..{EXPERTS - 1}}}.{{fc}}.{{p}}"

    _command("inspect", dense)
    _command("remap", dense, renamed, "--force", "--rename", "layers.{i}.{p**}=blocks.{i}.{p**}")
    _prove("every tensor stands under its new name", dense, renamed, _renamed)
    _command("remap", dense, upcycled, "--force", "--duplicate", f"{layers}={experts}")
    _prove(f"{EXPERTS} experts have each MLP's weights and moments", dense, upcycled, _expert_names)
    _command("convert", upcycled, container, "--force")
    _command("convert", container, returned, "--force")
    _prove("safetensors and back changed nothing", upcycled, returned, lambda name: [name])
    typer.echo("\nall of it loaded with torch.load(weights_only=True) and compared bit by bit")


def _renamed(name: str) -> list[str]:
    return [re.sub("^layers", "blocks", name)]


def _expert_names(name: str) -> list[str]:
    if "mlp.fc" not in name:
        return [name]
    return [name.replace("mlp.fc", f"mlp.experts.{expert}.fc") for expert in range(EXPERTS)]


def _command(*arguments: object) -> None:
    """Show and run one command of this program."""
    words = list(map(str, arguments))
    typer.secho("\n$ optimstate " + " ".join(f"'{word}'" if "{" in word else word for word in words), bold=True)
    app(words, standalone_mode=False)


def _prove(claim: str, before: Path, after: Path, expected: Any) -> None:
    """Compare what torch loads from two files, name by name: model tensors and every slot of every parameter."""
    from optimstate.errors import MigrationError

    old, new = _tensors_by_name(before), _tensors_by_name(after)
    compared = 0
    missing = set(new)
    for (section, name, slot), tensor in old.items():
        for target in expected(name):
            found = new.get((section, target, slot))
            if found is None or found.dtype != tensor.dtype or not _same_bits(found, tensor):
                raise MigrationError([f"{section} {target} {slot}: not the tensor that {name} had"])
            missing.discard((section, target, slot))
            compared += 1
    if missing:
        raise MigrationError([f"{after} holds {min(missing)}, which {before} does not"])
    typer.secho(f"proved: {claim} ({compared} tensors)", fg=typer.colors.GREEN)


def _same_bits(a: Any, b: Any) -> bool:
    import torch

    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _tensors_by_name(path: Path) -> dict[tuple[str, str, str], Any]:
    import torch

    checkpoint: Mapping[str, Any] = torch.load(path, weights_only=True)
    found = {("model", name, ""): tensor.reshape(-1) for name, tensor in checkpoint["model"].items()}
    for group in checkpoint["optimizer"]["param_groups"]:
        for key, name in zip(group["params"], group["param_names"], strict=True):
            for slot, value in checkpoint["optimizer"]["state"].get(key, {}).items():
                found["optimizer", name, slot] = value.reshape(-1)
    return found
