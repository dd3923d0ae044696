"""remap and convert as several processes: the bytes of one, whichever dies; started again they go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from optimstate import convert
from optimstate.cli.together import stage_of
from optimstate.errors import CheckpointError, DestinationError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.io.staging import FolderStage
from optimstate.io.together import Team, team_of_environment
from optimstate.tree import difference
from tests.cli.running import run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOT = Path(__file__).parents[2]
RENAME = ("--rename", "model.{p**}=net.{p}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "a"
    torch.manual_seed(0)
    tree = {"model": {f"model.{i}.weight": torch.randn(60 + i, 40) for i in range(30)}, "epoch": 3, "text": "x" * 50}
    tree["model"]["model.large"] = torch.randn(4000, 40)  # type: ignore[index]
    tree["model"]["model.scalar"] = torch.tensor(1.5)  # type: ignore[index]
    dcp.save(tree, checkpoint_id=str(folder))
    return folder


def begin(rank: int, size: int, arguments: Sequence[object], **environment: str) -> subprocess.Popen[str]:
    env = os.environ | {"OPTIMSTATE_TOGETHER": "1", "RANK": str(rank), "WORLD_SIZE": str(size), **environment}
    command = [sys.executable, "-m", "optimstate", *map(str, arguments)]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def together(size: int, arguments: Sequence[object], **environment: str) -> list[tuple[int, str]]:
    """Exit code and words of each process."""
    started = [begin(rank, size, arguments, **environment) for rank in range(size)]
    said = [process.communicate(timeout=60) for process in started]
    return [(process.returncode, "".join(words)) for process, words in zip(started, said, strict=True)]


def torchrun(size: int, arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """What torchrun and its processes say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "optimstate"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and errors."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def data_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def parts_of(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("size", [3])
def test_a_copy_has_the_bytes_of_one_process(size: int, source: Path, tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    assert run("remap", str(source), str(one), *RENAME, "--copy").code == 0
    done = together(size, ["remap", source, several, *RENAME, "--copy"])
    assert [code for code, _ in done] == [0] * size
    assert [bool(words) for _, words in done] == [True, *[False] * (size - 1)]  # the first reports
    assert data_of(one) == data_of(several)
    assert not parts_of(several)


@pytest.mark.parametrize(
    "arguments",
    [
        ("remap", "--rename", "model.large={x=q|k}.large", "--rename", "model.{p**}=net.{p}"),
        ("convert", "--to", "dcp", "--ranks", "6"),
        ("convert", "--to", "dcp", "--dtype", "model=bf16"),  # computed: each process decides for itself
    ],
    ids=["split", "ranks", "cast"],
)
def test_every_process_writes_its_share(arguments: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    verb, *options = arguments
    if verb == "remap":
        plan = tmp_path / "plan.toml"
        plan.write_text(
            '[[rule]]\nfrom = "model.large"\nto = "{x=q|k}.large"\nsplit = 0\n'
            '[[rule]]\nfrom = "model.{p**}"\nto = "net.{p}"\n'
        )
        options = ["--plan", str(plan)]
    one, several = tmp_path / "one", tmp_path / "several"
    assert run(verb, str(source), str(one), *options).code == 0
    size = 2 if "--dtype" in options else 3
    done = together(size, [verb, source, several, *options])
    assert [code for code, _ in done] == [0] * size, done
    a, b = open_checkpoint(one), open_checkpoint(several)
    assert difference(a.tree, b.tree) is None
    assert not parts_of(several)
    new = [file.stat().st_size for file in several.glob("*.distcp") if file.stat().st_nlink == 1]
    assert len(new) == (6 if "--ranks" in options else size)
    assert max(new) < 1.6 * sum(new) / len(new)


def test_a_rank_that_dies_leaves_nothing_that_loads_and_the_next_attempt_goes_on(source: Path, tmp_path: Path) -> None:
    target, arguments = tmp_path / "b", ["convert", source, tmp_path / "b", "--to", "dcp", "--ranks", "3"]
    before = data_of(source)
    first = [begin(rank, 3, arguments, OPTIMSTATE_PATIENCE="1.2") for rank in (0, 2)]  # rank 1 never comes
    said = [ended(process) for process in first]
    assert [code for code, _ in said] == [5, 5]
    assert "rank 1 has given no sign of life" in said[0][1]
    assert "rank 0 has ended: " in said[1][1]
    assert f"is kept in {tmp_path / parts_of(target)[0]}" in said[0][1]
    assert not target.exists()
    assert data_of(source) == before
    (stage,) = (tmp_path / name for name in parts_of(target))
    with pytest.raises(CheckpointError, match=r"without \.metadata"):
        open_checkpoint(stage)
    (kept,) = stage.glob("__2_0.distcp")
    written = kept.stat().st_mtime_ns
    said = together(3, arguments)
    assert [code for code, _ in said] == [0] * 3, said
    assert (target / "__2_0.distcp").stat().st_mtime_ns == written
    assert difference(open_checkpoint(source).tree, open_checkpoint(target).tree) is None
    assert not parts_of(target)
    assert not list(target.glob(".together*"))


def test_another_plan_does_not_go_on_with_what_is_there(source: Path, tmp_path: Path) -> None:
    target, arguments = tmp_path / "b", ["convert", source, tmp_path / "b", "--to", "dcp", "--ranks"]
    assert ended(begin(0, 2, [*arguments, "2"], OPTIMSTATE_PATIENCE="0.5"))[0] == 5
    before = parts_of(target)
    assert [code for code, _ in together(2, [*arguments, "3"])] == [0] * 2
    assert before
    assert not parts_of(target)
    assert len(list(target.glob("*.distcp"))) == 3


def test_processes_with_different_plans_are_told_apart(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    first = begin(0, 2, ["convert", source, target, "--to", "dcp", "--ranks", "2"], OPTIMSTATE_PATIENCE="2.5")
    second = begin(1, 2, ["convert", source, target, "--to", "dcp", "--ranks", "3"], OPTIMSTATE_PATIENCE="30")
    code, said = ended(second)
    assert code == 5
    assert "by another command" in said
    assert ended(first)[0] == 5
    assert not target.exists()


def test_a_killed_first_process_is_noticed(source: Path, tmp_path: Path) -> None:
    arguments = ["convert", source, tmp_path / "b", "--to", "dcp", "--ranks", "2"]
    first = begin(0, 3, arguments, OPTIMSTATE_PATIENCE="30")
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".b.*.part/.together.work.1")) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    code, said = ended(begin(1, 3, arguments, OPTIMSTATE_PATIENCE="1.5"))
    assert code == 5
    assert "rank 0 has given no sign of life" in said
    assert not (tmp_path / "b").exists()


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"model.{i}.weight": torch.randn(60 + i, 40) for i in range(20)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as trainers leave it: safetensors in shards with an index, files of torch.save, and text."""
    folder = tmp_path_factory.mktemp("shards") / "a"
    folder.mkdir()
    torch.save(weights(1), folder.parent / "model.pt")
    convert(folder.parent / "model.pt", folder.parent / "b", to="safetensors", options=WriteOptions(shard_size=60_000))
    for file in (folder.parent / "b").iterdir():
        file.rename(folder / file.name)
    for part in range(2):
        torch.save(weights(part), folder / f"rank_{part}.pt")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("remap", "--rename", "model.{p**}=net.{p}"),
        ("convert", "--to", "safetensors", "--shard-size", "50000", "--section", "model.safetensors.index.json"),
        ("convert", "--to", "folder", "--dtype", "model.safetensors.index.json=bf16"),
    ],
    ids=["remap", "convert", "cast"],
)
def test_shards_are_written_together(arguments: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    verb, *options = arguments
    one, several = tmp_path / "one", tmp_path / "several"
    assert run(verb, str(shards), str(one), *options).code == 0
    size = 2 if "--dtype" in options else 3
    done = together(size, [verb, shards, several, *options])
    assert [code for code, _ in done] == [0] * size, done
    assert data_of(one) == data_of(several)
    assert not parts_of(several)


def test_what_one_process_must_write_alone_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    torch.save({"w": torch.ones(300, 200)}, tmp_path / "a" / "model.pt")
    arguments = ("--to", "folder", "--dtype", "model=bf16")
    assert run("convert", str(tmp_path / "a"), str(tmp_path / "one"), *arguments).code == 0
    done = together(2, ["convert", tmp_path / "a", tmp_path / "b", *arguments])
    assert [code for code, _ in done] == [0, 0], done
    assert "120,000 bytes of tensors were written by the first process alone" in " ".join(done[0][1].split())
    assert data_of(tmp_path / "one") == data_of(tmp_path / "b")


def test_a_second_attempt_goes_on_with_shards(shards: Path, tmp_path: Path) -> None:
    target, arguments = tmp_path / "b", ["remap", shards, tmp_path / "b", *RENAME]
    first = [begin(rank, 3, arguments, OPTIMSTATE_PATIENCE="1.2") for rank in (0, 2)]  # rank 1 never comes
    assert [ended(process)[0] for process in first] == [5, 5]
    assert not target.exists()
    said = together(3, arguments)
    assert [code for code, _ in said] == [0] * 3, said
    assert run("remap", str(shards), str(tmp_path / "one"), *RENAME).code == 0
    assert data_of(tmp_path / "one") == data_of(target)


def test_a_source_that_changes_meanwhile_is_noticed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"OPTIMSTATE_TOGETHER": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    stage = stage_of(shards, tmp_path / "b", ["remap"])
    assert stage is not None
    stage.folder.mkdir()
    stage.vote([])
    os.utime(shards / "config.json")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        stage.vote([])
    other = stage_of(shards, tmp_path / "b", ["remap"])
    assert other is not None
    assert other.folder != stage.folder


def test_a_process_reads_hardly_more_than_it_writes(tmp_path: Path) -> None:
    """As the system counts: 1.02 times the bytes, beside what Python and the metadata take."""
    folder = tmp_path / "a"
    tree = {"model": {f"model.{i}.weight": torch.full((512, 1024), float(i)) for i in range(24)}}
    dcp.save(tree, checkpoint_id=str(folder))
    script = (
        "import os, sys\n"
        "import optimstate\n"
        "optimstate.inspect(sys.argv[2])\n"
        "import optimstate.cli.remap, optimstate.formats.dcp.sharing\n"
        "def count():\n"
        "    return [int(line.split()[1]) for line in open('/proc/self/io').readlines()[:2]]\n"
        "before, end = count(), os._exit\n"
        "def leave(code):\n"
        "    print('MOVED', *(b - a for a, b in zip(before, count())), flush=True)\n"
        "    end(code)\n"
        "os._exit = leave\n"
        "from optimstate.cli.__main__ import main\n"
        "main()\n"
    )
    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not count what a process reads")
    size = 3
    arguments = ["remap", folder, tmp_path / "b", *RENAME, "--copy", "--no-sync"]
    started = []
    for rank in range(size):
        env = os.environ | {"OPTIMSTATE_TOGETHER": "1", "RANK": str(rank), "WORLD_SIZE": str(size)}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE))
    total = 24 * 512 * 1024 * 4
    for process in started:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        read, written = map(int, said.split("MOVED ")[1].split())
        assert written >= total // size
        assert read <= 1.02 * written + 3_000_000, (read, written)  # the rest is modules


def test_other_containers_and_stores_that_are_read_are_refused(source: Path, tmp_path: Path) -> None:
    code, said = ended(begin(0, 2, ["convert", source, tmp_path / "b.pt"]))
    assert code == 2
    assert "several processes write a folder" in said
    assert ended(begin(0, 2, ["convert", source, "https://127.0.0.1:9/b", "--to", "dcp"]))[0] == 5


def test_the_environment_says_who_works_together() -> None:
    assert team_of_environment({"RANK": "0", "WORLD_SIZE": "4"}) is None  # a training run
    assert team_of_environment({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}) is None
    assert team_of_environment({"RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}) == Team(3, 4)
    with pytest.raises(DestinationError, match="must be numbers"):
        team_of_environment({"RANK": "x", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"})
    for rank, patience in (("4", "60"), ("-1", "60"), ("1", "0"), ("1", "nan"), ("1", "inf")):
        with pytest.raises(DestinationError, match="the first must be"):
            team_of_environment(
                {"RANK": rank, "WORLD_SIZE": "4", "OPTIMSTATE_PATIENCE": patience, "OPTIMSTATE_TOGETHER": "1"}
            )


def test_two_first_processes_do_not_share_a_stage(tmp_path: Path) -> None:
    one, other = (FolderStage(tmp_path / "a", "0" * 12, Team(0, 2)) for _ in range(2))
    with one, pytest.raises(DestinationError, match="is being written by other processes"), other:
        pass


def test_what_one_process_does_is_refused_and_what_is_only_said_is_said_once(source: Path, tmp_path: Path) -> None:
    one = tmp_path / "a.pt"
    torch.save({"model": {"model.a": torch.ones(3)}}, one)
    before = one.read_bytes()
    for arguments in (["remap", one, *RENAME, "--in-place"], ["remap", source, tmp_path / "b", "--plan", "-"]):
        for code, said in together(2, arguments):
            assert code == 2
            assert "is for one process, and torchrun has started 2" in " ".join(said.split())
    assert one.read_bytes() == before
    for verb, options in (("remap", [*RENAME, "--dry-run"]), ("convert", ["--to", "dcp", "--dry-run"])):
        done = together(2, [verb, source, *([tmp_path / "b"] if verb == "convert" else []), *options])
        assert [(code, bool(words)) for code, words in done] == [(0, True), (0, False)]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["--shard-size", "50000"], ["--shard-size", "90000"]),
        (["--shard-size", "50000"], ["--shard-size", "50000", "--digest", "sha256"]),
    ],
)
def test_an_attempt_with_other_options_does_not_go_on_with_the_bytes_of_the_first(
    first: list[str], second: list[str], shards: Path, tmp_path: Path
) -> None:
    common = ["--to", "safetensors", "--section", "model.safetensors.index.json"]
    arguments = ["convert", shards, tmp_path / "b", *common]
    assert ended(begin(0, 2, [*arguments, *first], OPTIMSTATE_PATIENCE="0.6"))[0] == 5
    assert parts_of(tmp_path / "b")
    assert [code for code, _ in together(2, [*arguments, *second])] == [0, 0]
    assert run("convert", str(shards), str(tmp_path / "one"), *common, *second).code == 0
    assert data_of(tmp_path / "one") == data_of(tmp_path / "b")


def test_a_names_file_that_changes_between_attempts_begins_anew(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"OPTIMSTATE_TOGETHER": "1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    one = stage_of(shards, tmp_path / "b", ["remap"], like=names)
    names.write_text("b\na\nc\n")
    other = stage_of(shards, tmp_path / "b", ["remap"], like=names)
    assert one is not None
    assert other is not None
    assert one.folder != other.folder


@pytest.mark.parametrize("arguments", [["remap", *RENAME], ["convert", "--to", "folder"]])
def test_damage_that_verify_finds_is_found_before_the_commit(
    arguments: list[str], shards: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    data = bytearray((damaged / "rank_1.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "rank_1.pt").write_bytes(data)
    verb, *options = arguments
    done = together(2, [verb, damaged, tmp_path / "b", *options, "--verify"], OPTIMSTATE_PATIENCE="1.5")
    assert done[0][0] == 3
    assert "checksum" in done[0][1]
    assert done[1][0] == 3
    assert "rank 0 has ended: " in done[1][1]
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_torchrun(source: Path, tmp_path: Path) -> None:
    done = torchrun(2, ["remap", source, tmp_path / "b", *RENAME, "--copy"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert {"net.large"} < set(open_checkpoint(tmp_path / "b").tree["model"])
