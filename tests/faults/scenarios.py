"""Commands that write, each run again and again with a fault at another moment; started by `tests.faults`."""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, NamedTuple, NoReturn

INDEX = "model.safetensors.index.json"
RENAME = ("--rename", "{i}.{p}=layers.{i}.{p}")
SHARDS = ("--to", "safetensors", "--shard-size", "60KB")


class Scenario(NamedTuple):
    """A command.

    Attributes:
        words: What is run.
        destination: What it writes.
        source: What must not change; nothing where that is the destination.
        before: Commands that prepare the folder.
    """

    words: tuple[str, ...]
    destination: str
    source: str = "source.pt"
    before: tuple[tuple[str, ...], ...] = ()


SCENARIOS = {
    "remap-new": Scenario(("remap", "source.pt", "new.pt", *RENAME), "new.pt"),
    "remap-force": Scenario(("remap", "source.pt", "old.pt", *RENAME, "--force"), "old.pt"),
    "remap-in-place": Scenario(("remap", "short.pt", "--in-place", *RENAME), "short.pt"),
    "remap-in-place-long": Scenario(("remap", "long.pt", "--in-place", *RENAME), "long.pt"),
    "remap-folder": Scenario(
        ("remap", "folder", "old-folder", *RENAME, "--force"),
        "old-folder",
        "folder",
        (("copy", "folder", "old-folder"),),
    ),
    "remap-index": Scenario(
        ("remap", f"shards/{INDEX}", f"old-shards/{INDEX}", "--rename", "0.{p}=zero.{p}", "--force"),
        "old-shards",
        "shards",
        (
            ("convert", "source.pt", "shards", *SHARDS, "--section", "model"),
            ("convert", "old.pt", "old-shards", *SHARDS, "--section", "model"),
        ),
    ),
    "remap-dcp": Scenario(
        ("remap", "source.dcp", "old.dcp", *RENAME, "--force"),
        "old.dcp",
        "source.dcp",
        (("convert", "source.pt", "source.dcp"), ("convert", "old.pt", "old.dcp")),
    ),
    "convert-zip": Scenario(("convert", "source.pt", "old.pt", "--section", "optimizer", "--force"), "old.pt"),
    "convert-safetensors": Scenario(
        ("convert", "source.pt", "new.safetensors", "--digest", "sha256"), "new.safetensors"
    ),
    "convert-shards": Scenario(
        ("convert", "source.pt", "old", *SHARDS, "--force"), "old", before=(("convert", "old.pt", "old", *SHARDS),)
    ),
    "convert-dcp": Scenario(
        ("convert", "source.pt", "old.dcp", "--force"), "old.dcp", before=(("convert", "old.pt", "old.dcp"),)
    ),
    "convert-dcp-new": Scenario(("convert", "source.pt", "new.dcp"), "new.dcp"),
    "convert-folder": Scenario(("convert", "folder", "new-folder", "--to", "folder"), "new-folder", "folder"),
    "name": Scenario(("name", "anonymous.pt", "named.pt"), "named.pt", "anonymous.pt"),
}

COUNT, KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, FAIL, FULL, SHORT, SIGNAL, FAIL_READ = range(9)
FAULTS = {
    "kill": [(KILL_BEFORE, 0), (KILL_AFTER, 0), (KILL_HALFWAY, 0)],
    "enospc": [(FULL, 0)],
    "edquot": [(FAIL, errno.EDQUOT)],
    "eio": [(FAIL, errno.EIO)],
    "read": [(FAIL_READ, errno.EIO)],
    "short": [(SHORT, 0)],
    "eintr": [(FAIL, errno.EINTR)],
    "sigint": [(SIGNAL, signal.SIGINT)],
    "sigterm": [(SIGNAL, signal.SIGTERM)],
    "sighup": [(SIGNAL, signal.SIGHUP)],
}
EXITS = {"kill": {-9, 0}, "sigint": {130, 0}, "sigterm": {143, 0}, "sighup": {129, 0}, "short": {0}, "eintr": {0}}
SECONDS = 60


# --- what the commands are run on -----------------------------------------------------------------------------------


def make_sources(folder: Path) -> None:
    """Checkpoints, by torch."""
    import torch

    def save(path: str, layers: int, width: int, seed: int, *, named: bool = True) -> None:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)])
        optimizer = torch.optim.AdamW(model.named_parameters() if named else model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, folder / path)

    (folder / "folder").mkdir(parents=True)
    save("source.pt", 4, 64, 0)
    save("old.pt", 4, 64, 1)
    save("short.pt", 3, 16, 0)
    save("long.pt", 220, 4, 0)
    save("anonymous.pt", 3, 48, 0, named=False)
    save("folder/state.pt", 2, 48, 0)
    (folder / "folder" / "config.json").write_text('{"layers": 2}')


def read_by_its_library(path: Path) -> None:
    """Torch or safetensors loads it.

    Raises:
        Exception: It does not.
    """
    import torch

    if path.suffix == ".pt":
        torch.load(path, weights_only=True)
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        load_file(path)
    elif path.suffix == ".dcp":
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        out = path.with_name("from-dcp.pt")
        dcp_to_torch_save(path, out)
        out.unlink()
    else:
        for file in path.iterdir():
            if file.suffix in (".pt", ".safetensors"):
                read_by_its_library(file)


def contents(path: Path) -> str:
    """A digest of a file or of everything in a folder; temporary files do not count, nor dates in a DCP's metadata."""
    if not path.exists():
        return ""
    made = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and not file.name.endswith(".part"):
            made.update(f"{file.relative_to(path.parent)}\0".encode() + file.read_bytes())
    return made.hexdigest()


def named_by_index(folder: Path) -> tuple[object, ...]:
    """The tensors of an index, from the files that it names."""
    from safetensors import safe_open

    found = []
    for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items():
        with safe_open(folder / file, "np") as shard:
            found.append((name, hashlib.sha256(shard.get_tensor(name).tobytes()).hexdigest()))
    return tuple(found)


def unnamed_shards(folder: Path) -> list[str]:
    """Shards beside an index that it does not name."""
    if not (folder / INDEX).is_file():
        return []
    named = {*json.loads((folder / INDEX).read_text())["weight_map"].values()}
    return [path.name for path in folder.glob("*.safetensors") if path.name not in named]


def keys_of(path: Path) -> tuple[str, ...]:
    """What torch finds in a file that was changed in place."""
    import torch

    return tuple(torch.load(path, weights_only=True)["model"])


# --- one run --------------------------------------------------------------------------------------------------------


class Library:
    """The loaded `faults.c`."""

    def __init__(self) -> None:
        self.calls = ctypes.CDLL(os.environ["FAULTS"])
        self.calls.faults_names.restype = ctypes.c_char_p

    def run(
        self, words: Sequence[str], folder: Path, out: Path, fault: tuple[int, int, int] | None = None
    ) -> int | str:
        """The exit code of a command, negative for a signal; `hangs`; the calls are written behind its output."""
        child = os.fork()
        if not child:
            self._in_child(words, folder, out, fault)
        begun = time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - begun > SECONDS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "hangs"
            time.sleep(0.002)

    def _in_child(self, words: Sequence[str], folder: Path, out: Path, fault: tuple[int, int, int] | None) -> NoReturn:
        leave: Callable[[int], Any] = os._exit
        try:
            os.chdir(folder)
            shown = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(shown, 1)
            os.dup2(shown, 2)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            sys.argv = ["optimstate", *words]
            signal.signal(signal.SIGINT, signal.default_int_handler)

            def end(code: int) -> NoReturn:
                self.calls.faults_end()
                log = f"{self.calls.faults_changes()} {self.calls.faults_reads()} {self.calls.faults_names().decode()}"
                Path(f"{out}.calls").write_text(log)
                leave(code)
                raise AssertionError

            os._exit = end
            if fault is not None:
                self.calls.faults_begin(*fault)
            try:
                runpy.run_module("optimstate.cli", run_name="__main__")
            except SystemExit as stop:
                end(stop.code if isinstance(stop.code, int) else 1)
            end(0)
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
        leave(99)
        raise AssertionError


# --- a scenario -----------------------------------------------------------------------------------------------------


def judged(library: Library, name: str, kinds: Sequence[str], most: int, sources: Path, work: Path) -> Iterator[str]:
    """Lines `count KIND NUMBER` and `wrong ...`."""
    scenario = SCENARIOS[name]
    start, here, out = work / "start", work / "here", work / "out"
    shutil.rmtree(start, ignore_errors=True)
    shutil.copytree(sources, start)
    for command, *words in scenario.before:
        if command == "copy":
            shutil.copytree(start / words[0], start / words[1])
            (start / words[1] / "state.pt").write_bytes((start / "old.pt").read_bytes())
        elif library.run([command, *words], start, out) != 0:
            yield f"wrong {name}: cannot be prepared: {out.read_text()}"
            return

    def again() -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(start, here)

    again()
    if library.run([*scenario.words], here, out, (COUNT, 0, 0)) != 0:
        yield f"wrong {name}: fails without a fault: {out.read_text()}"
        return
    changes, reads, *_ = map(int, Path(f"{out}.calls").read_text().split()[:2])
    in_place = "--in-place" in scenario.words
    index = scenario.destination == "old-shards"
    state: Callable[[Path], object] = keys_of if in_place else named_by_index if index else contents
    read_by_its_library(here / scenario.destination)
    old, new = state(start / scenario.destination), state(here / scenario.destination)
    source = contents(start / scenario.source)
    for kind in kinds:
        moments = [
            (how, at, detail)
            for how, detail in FAULTS[kind]
            for at in ([1] if how == SHORT else range(1, (reads if how == FAIL_READ else changes) + 1))
        ]
        if len(moments) > most:
            moments = random.Random(name + kind).sample(moments, most)
        for fault in moments:
            again()
            code = library.run([*scenario.words], here, out, fault)
            for problem in _problems(library, scenario, kind, code, (old, new, source), state, here, out):
                yield f"wrong {name}: {kind} {fault}: {problem}"
        yield f"count {kind} {len(moments)}"


def _problems(
    library: Library,
    scenario: Scenario,
    kind: str,
    code: int | str,
    expected: tuple[object, object, str],
    state: Callable[[Path], object],
    here: Path,
    out: Path,
) -> Iterator[str]:
    old, new, source = expected
    said = out.read_text(errors="replace")
    try:
        now = state(here / scenario.destination)
    except Exception as error:  # noqa: BLE001  # whatever torch says of a broken file
        now = f"not loadable: {type(error).__name__}"
    if now not in (old, new):
        yield f"the destination is neither old nor new: {now}"
    if code == 0 and now != new:
        yield "exit 0, and the destination is not new"
    if contents(here / scenario.source) != source:
        yield "the source changed"
    left = _left(here, scenario)
    if left and kind != "kill":
        yield f"left {left}"
    if code not in EXITS.get(kind, {0, 3, 5}):
        yield f"exit {code}"
    if "Traceback" in said or code == 99:
        yield f"a traceback: {said.strip().splitlines()[-1]}"
    if isinstance(code, int) and code in (3, 5) and "error:" not in said:
        yield "no error line"
    if left and kind == "kill":
        again = library.run([*scenario.words, *(() if "--force" in scenario.words else ("--force",))], here, out)
        left = _left(here, scenario)
        if left or (again != 0 and "--in-place" not in scenario.words):
            yield f"the next run ended with {again} and left {left}"


def _modules() -> Iterator[str]:
    import optimstate

    for module in walk_packages(optimstate.__path__, "optimstate."):
        if module.name.split(".")[1] in ("io", "formats", "tree", "tensors", "state", "plan", "surgery"):
            yield module.name


def _left(here: Path, scenario: Scenario) -> list[str]:
    return [
        *(str(path.relative_to(here)) for path in here.rglob("*.part")),
        *(unnamed_shards(here / scenario.destination) if scenario.destination == "old-shards" else ()),
    ]


def main() -> None:
    """Print the lines of all scenarios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenarios", nargs="*")
    parser.add_argument("--kinds", required=True)
    parser.add_argument("--most", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    for name in ("numpy", "torch", "optimstate.cli.app", *_modules()):  # once, for all children
        import_module(name)
    make_sources(options.folder / "sources")
    library = Library()
    for name in options.scenarios:
        for line in judged(
            library, name, options.kinds.split(","), options.most, options.folder / "sources", options.folder
        ):
            print(line, flush=True)


if __name__ == "__main__":
    main()
