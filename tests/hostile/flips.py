"""Changed bytes: each must be told by `verify` or be without effect, and `convert` must not copy what could be told.

`python -m tests.hostile.flips [--bytes 400]` changes that many bytes in a checkpoint of each container, one at a time.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optimstate
from optimstate.errors import OptimStateError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.surgery.verification.verifying import verify
from optimstate.tree import difference
from tests.corpus import FILES

__all__ = ["CHECKPOINTS", "flips", "made"]

CHECKPOINTS = {
    "torch": FILES / "nanogpt/ckpt/ckpt.pt",
    "dcp": FILES / "dcp/fsdp2_ws2_adamw_nested",
    "zero": FILES / "deepspeed/z2_ws2_fp32_adam_sched",
    "zero-3": FILES / "deepspeed/z3_ws2_bf16_adamw",
    "universal": FILES / "deepspeed/bf16opt_ws2_z1_universal",
    "ranks": FILES / "dcp/fsdp2_ws2_dtensor_torchsave_per_rank",
    "zip": FILES / "stable_baselines3/ppo",
    "safetensors": FILES / "nanogpt/ckpt/ckpt.pt",
}
# These have no checksums, in any program: what a flip makes of a name or number in them may be what was meant.
WITHOUT_CHECKSUMS = (".metadata", "latest")


def made(container: str, folder: Path) -> Path:
    """A copy of a checkpoint that may be damaged."""
    source = CHECKPOINTS[container]
    if container == "safetensors":
        optimstate.convert(source, folder / "digest.safetensors", options=WriteOptions(digest="sha256", sync=False))
        return folder / "digest.safetensors"
    path = folder / source.name
    if source.is_dir():
        shutil.copytree(source, path)
    else:
        shutil.copyfile(source, path)
    return _entry(path)


def _entry(path: Path) -> Path:
    """The folder that is the checkpoint: that of the tag in DeepSpeed's."""
    inner = [found for found in path.iterdir() if found.is_dir()] if path.is_dir() else []
    is_checkpoint = not path.is_dir() or (path / ".metadata").exists() or (path / "zero").exists()
    return path if is_checkpoint or len(inner) != 1 else _entry(inner[0])


def flips(container: str, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """What became of each changed byte, and where it was.

    `refused` when opening, `found` by verify, `same` in spite of it; the others are wrong: `missed` (another tree, and
    verify is content) and `copied` (convert writes another tree than that of the sound one).
    """
    chosen = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        path = made(container, Path(place))
        sound = open_checkpoint(path)
        optimstate.convert(path, Path(place, "sound.pt"), options=WriteOptions(sync=False))
        expected = open_checkpoint(Path(place, "sound.pt")).tree
        files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        sizes = [file.stat().st_size for file in files]
        for number in range(count):
            (file,) = chosen.choices(files, sizes)
            whole = file.read_bytes()
            at = chosen.randrange(len(whole))
            other = bytes([whole[at] ^ (1 << chosen.randrange(8))])
            damaged = file.with_name(f"{file.name}.new")
            damaged.write_bytes(whole[:at] + other + whole[at + 1 :])
            damaged.replace(file)  # another file: `sound` goes on reading the first
            out = Path(place, f"{number}.pt")
            yield _judged(path, sound.tree, expected, out), f"{file.name} byte {at}"
            out.unlink(missing_ok=True)
            damaged.write_bytes(whole)
            damaged.replace(file)


def _judged(path: Path, sound: object, expected: object, out: Path) -> str:
    try:
        report = verify(path, numbers=False)
        same = difference(sound, open_checkpoint(path).tree) is None
        told = "same" if same and report.healthy else "found" if not report.healthy else "missed"
    except OptimStateError:
        told = "refused"
    try:
        optimstate.convert(path, out, options=WriteOptions(sync=False))
    except OptimStateError:
        return told
    return told if difference(expected, open_checkpoint(out).tree) is None or told == "missed" else "copied"


def main() -> int:
    """Print what became of the bytes of each container."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("containers", nargs="*", default=list(CHECKPOINTS))
    options = parser.parse_args()
    wrong = 0
    for container in options.containers:
        counts: Counter[str] = Counter()
        for told, where in flips(container, options.bytes, options.seed):
            untold = told in ("missed", "copied") and where.split()[0] in WITHOUT_CHECKSUMS
            counts["without a checksum" if untold else told] += 1
            if told in ("missed", "copied"):
                print(f"{container}: {told}: {where}", flush=True)
                wrong += not untold
        print(f"{container}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())), flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
