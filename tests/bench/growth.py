"""What a tensor costs in files of ten thousand, a hundred thousand and a million of them, with torch beside it.

Processor time and peak memory beyond those of starting, by the number of tensors. The files have tiny tensors, so that
nothing but the work for each is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from optimstate.formats.dcp import folder as dcp
from optimstate.formats.dcp.columns import Chunk, Form, Item, Metadata
from optimstate.formats.dcp.dump import dump_metadata
from optimstate.formats.dcp.metadata import load_metadata
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.extents import Extent
from optimstate.tensors.lazy import LazyTensor, Storage
from tests.bench._data import CACHE
from tests.bench._harness import Row, print_table, run_once

FLAT = 1.3  # times the cost of a tensor among ten thousand
TOOL = [sys.executable, "-m", "optimstate"]
SLOTS = ("exp_avg", "exp_avg_sq", "step")

_TORCH_LOAD = "import torch, sys; torch.load(sys.argv[1], mmap=True, weights_only=True)"
_TORCH_DCP = (
    "import sys; from torch.distributed.checkpoint.filesystem import FileSystemReader;"
    "FileSystemReader(sys.argv[1]).read_metadata()"
)
_SAFE_OPEN = "import sys; from safetensors import safe_open; len(safe_open(sys.argv[1], 'pt').keys())"
_STARTS = {
    _TORCH_LOAD: "import torch",
    _TORCH_DCP: "from torch.distributed.checkpoint.filesystem import FileSystemReader",
    _SAFE_OPEN: "from safetensors import safe_open",
}


def _names(tensors: int) -> Iterator[str]:
    for count in range(tensors // 4):
        yield f"model.layers.{count // 384}.mlp.experts.{count // 3 % 128}.{('up', 'gate', 'down')[count % 3]}.weight"


def _tensor(shape: tuple[int, ...] = (8,)) -> LazyTensor:
    nbytes = 4 * (shape[0] if shape else 1)
    return LazyTensor(Storage((Extent(None, 0, nbytes),), nbytes, "FloatStorage"), "float32", shape)


def write_zip(tensors: int, path: Path) -> None:
    """Weights and an AdamW, as torch saves them."""
    names = list(_names(tensors))
    state = {i: {slot: _tensor(() if slot == "step" else (8,)) for slot in SLOTS} for i in range(len(names))}
    group = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0, "params": list(state), "param_names": names}
    tree = {"model": {name: _tensor() for name in names}, "optimizer": {"state": state, "param_groups": [group]}}
    torch_zip.write(tree, path)


def write_safetensors(tensors: int, path: Path) -> None:
    """A header of names and one large hole; the names are short, because a header may have 100 MB."""
    header: dict[str, object] = {}
    short = (name.replace("mlp.experts.", "").removesuffix(".weight") for name in _names(tensors))
    for count, name in enumerate(f"{name}{tail}" for name in short for tail in (".w", ".a", ".b", ".c")):
        header[name] = {"dtype": "F32", "shape": [8], "data_offsets": [32 * count, 32 * count + 32]}
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 32 * len(header))


def write_dcp(tensors: int, path: Path) -> None:
    """A model and an AdamW in 64 files, as torch saves what `get_state_dict` returns; archives of tensors are alike."""
    names = list(_names(tensors))
    group = {"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.0, "params": names}
    dcp.write({"optimizer": {"param_groups": [group]}, "alike": {"step": _tensor(()), "exp_avg": _tensor()}}, path)
    metadata, _ = load_metadata((path / ".metadata").read_bytes())
    archive, made = _archives_of(metadata, path), Metadata()
    for number, name in enumerate(metadata.order):
        if metadata.forms[number] is None:
            made.add_object(name, metadata.item(metadata.first[number]))
            made.paths[name] = metadata.paths[name]
    with ExitStack() as stack:
        files = [stack.enter_context((path / f"__{rank}_0.distcp").open("wb")) for rank in range(1, 65)]
        for name in names:
            for keys in (("model", name), *(("optimizer", "state", name, slot) for slot in SLOTS)):
                file = files[len(made.order) % len(files)]
                form, data = archive["alike.step" if keys[-1] == "step" else "alike.exp_avg"]
                box = ((0,) * len(form.shape), form.shape)
                item = Item(Path(file.name).name, file.tell(), len(data))
                file.write(data)
                made.add_tensor(".".join(keys), form, [Chunk(box, item)])
                made.paths[".".join(keys)] = keys
    (path / ".metadata").write_bytes(dump_metadata(made))


def _archives_of(metadata: Metadata, path: Path) -> dict[str, tuple[Form, bytes]]:
    """The form and the archive of each tensor of a folder."""
    found = {}
    for number, name, form in metadata.tensors():
        item = metadata.item(metadata.first[number])
        found[name] = form, (path / item.file).read_bytes()[item.offset : item.offset + item.length]
    return found


WRITERS = {".pt": write_zip, ".safetensors": write_safetensors, ".dcp": write_dcp}


def checkpoint(tensors: int, suffix: str) -> Path:
    """A file of so many tensors, written once."""
    path = CACHE / f"growth-{tensors}{suffix}"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        WRITERS[suffix](tensors, path)
    return path


def commands(suffix: str, path: Path, target: Path) -> dict[str, list[str]]:
    """What is measured of a container."""
    plan = CACHE / "growth.toml"
    plan.write_text('[[rule]]\nfrom = "model.layers.{p**}"\nto = "layers.{p}"\n')
    made = {
        "inspect": ["inspect", str(path), "--json"],
        "diff --headers": ["diff", str(path), str(path), "--headers"],
        "verify --no-numbers": ["verify", str(path), "--no-numbers"],
        "remap": ["remap", str(path), str(target), "--plan", str(plan), "-q", "--no-sync"],
    }
    return {name: [*TOOL, *command] for name, command in made.items()}


PEERS = {".pt": _TORCH_LOAD, ".safetensors": _SAFE_OPEN, ".dcp": _TORCH_DCP}


def _remove(target: Path) -> None:
    import shutil

    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)


def rows(sizes: list[int], suffix: str, *, peers: int) -> list[Row]:
    """The table of one container; torch up to `peers` tensors."""
    made: list[Row] = []
    start = run_once([*TOOL, "inspect", "--help"])
    peer = PEERS[suffix]
    peer_start = run_once([sys.executable, "-c", _STARTS[peer]])
    first: dict[str, float] = {}
    for tensors in sizes:
        path, target = checkpoint(tensors, suffix), CACHE / f"growth-out{suffix}"
        for name, command in commands(suffix, path, target).items():
            run = run_once(command)
            _remove(target)
            each = max(run.cpu - start.cpu, 0.0) / tensors * 1e6
            kept = max(run.peak - start.peak, 0) / tensors / 1e3
            growth = each / first.setdefault(name, each)
            label = f"{suffix[1:]} {tensors:>9,} {name}"
            made.append(Row(f"{label}: processor ({kept:.1f} kB each)", round(each, 1), None, "us each"))
            if tensors > sizes[0]:
                made.append(Row(f"{label}: of a tensor among {sizes[0]:,}", growth * 100, FLAT * 100, "%"))
        if tensors <= peers:
            theirs = run_once([sys.executable, "-c", peer, str(path)])
            each = max(theirs.cpu - peer_start.cpu, 0.0) / tensors * 1e6
            kept = max(theirs.peak - peer_start.peak, 0) / tensors / 1e3
            made.append(
                Row(f"{suffix[1:]} {tensors:>9,} torch reads it: processor ({kept:.1f} kB each)", each, None, "us each")
            )
    return made


def main(quick: bool) -> None:
    """Print the tables: 10,000 and 40,000 tensors if quick, else up to a million."""
    sizes = [10_000, 40_000] if quick else [10_000, 100_000, 1_000_000]
    for suffix in WRITERS:
        print_table(f"growth, {suffix}", rows(sizes, suffix, peers=100_000))


if __name__ == "__main__":
    main("--quick" in sys.argv)
