"""Checkpoints in stores are read by few requests, of one version, and by no lie of a server."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.cli.render import terminal
from optimstate.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    UnsupportedCheckpointError,
    UsageError,
)
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.registry import open_checkpoint
from optimstate.io.places import located
from tests.cli.test_together import together
from tests.remote.conftest import SECRET
from tests.remote.server import RangeServer, serving

pytest.importorskip("urllib3")


def served(server: RangeServer, file: Path, name: str) -> str:
    target = server.root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if file.is_dir() else shutil.copyfile)(file, target)  # type: ignore[operator]
    return f"{server.address}/{name}"


# --- requests ---------------------------------------------------------------------------------------------------------


def sparse_zip(path: Path) -> None:
    """A checkpoint of torch.save of 2 GB, whose tensors are a hole."""
    torch.save({"model": {f"layer.{n}.weight": torch.zeros(1) for n in range(60)}, "epoch": 3}, path)
    document = open_checkpoint(path)
    from optimstate.io.extents import Extent
    from optimstate.tensors.lazy import LazyTensor, Storage

    nbytes = 36_000_000
    document.tree["model"] = {
        name: LazyTensor(Storage((Extent(None, 0, nbytes),), nbytes, "FloatStorage", crc=1), "float32", (nbytes // 4,))
        for name in document.tree["model"]
    }
    document.tree["optimizer"] = {"state": {}, "param_groups": [{"lr": 0.1, "params": []}]}
    with pytest.MonkeyPatch.context() as patch:
        from optimstate.io import copying

        def put(copier: Any, extents: Any, position: int) -> int:
            return sum(extent.length for extent in extents)

        patch.setattr(copying.FileCopier, "put", put)
        from optimstate.formats.torch import zip as torch_zip

        torch_zip.write(document.tree, path, options=WriteOptions(sync=False))


def sparse_shards(folder: Path, shards: int, tensors: int) -> None:
    """Safetensors of 2 GB in shards with an index; the tensors are holes."""
    nbytes = 2_000_000_000 // shards // tensors // 4 * 4
    weight_map = {}
    for shard in range(shards):
        file = folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header = {
            f"layers.{shard}.{n}.weight": {
                "dtype": "F32",
                "shape": [nbytes // 4],
                "data_offsets": [n * nbytes, (n + 1) * nbytes],
            }
            for n in range(tensors)
        }
        data = json.dumps(header).encode()
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(data)) + data)
            out.truncate(8 + len(data) + tensors * nbytes)
        weight_map.update(dict.fromkeys(header, file.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sparse_dcp(folder: Path) -> None:
    """A distributed checkpoint as torch writes one in four files; of 2 MB, for the requests are as many as for 2 GB."""
    import torch.distributed.checkpoint as dcp

    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(24)])
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    writer = dcp.FileSystemWriter(folder, thread_count=4)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=writer)


@pytest.mark.parametrize("delay", [0.03])
def test_inspecting_two_gigabytes_takes_few_requests(ranges: RangeServer, tmp_path: Path, delay: float) -> None:
    bucket = ranges.root / "bucket"
    (bucket / "shards").mkdir(parents=True)
    (bucket / "dcp").mkdir()
    sparse_zip(bucket / "run.pt")
    sparse_shards(bucket / "shards", 9, 16)
    sparse_dcp(bucket / "dcp")
    assert (bucket / "run.pt").stat().st_size > 2_000_000_000
    ranges.delay = delay
    allowed = {"run.pt": 4, "shards": 9 + 3, "shards/model.safetensors.index.json": 9 + 3, "dcp": 15}
    for name, most in allowed.items():
        ranges.forget()
        found = optimstate.inspect(f"s3://bucket/{name}")
        assert found.tensors >= 60
        assert len(ranges.requests) <= most, (name, ranges.requests)
        assert ranges.sent < 4 << 20


def test_steps_that_lie_apart_are_not_all_read(ranges: RangeServer) -> None:
    """As in large checkpoints; which of them were read is said."""
    folder = ranges.root / "bucket"
    folder.mkdir()
    weights = {f"{n}.weight": torch.zeros(256, 128) for n in range(30)}
    names = list(weights)
    state = {n: {"step": torch.tensor(5.0), "exp_avg": weights[name]} for n, name in enumerate(names)}
    group = {"lr": 0.1, "params": list(state), "param_names": names}
    torch.save({"model": weights, "optimizer": {"state": state, "param_groups": [group]}}, folder / "run.pt")
    optimstate.convert(folder / "run.pt", folder / "run.dcp")
    near, far = (
        next(section for section in optimstate.inspect(place).sections if section.kind == "optimizer")
        for place in (folder / "run.dcp", "s3://bucket/run.dcp")
    )
    assert len(ranges.requests) <= 12, ranges.requests
    assert (near.steps, near.unread_steps) == ({"5": 30}, 0)
    assert (far.steps, far.unread_steps) == ({"5": 3}, 27)
    assert "step 5 (27 were not read" in str(optimstate.inspect("s3://bucket/run.dcp"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64, torch.float64])
@pytest.mark.parametrize("name", ["run.pt", "run.safetensors", "run.dcp"])
def test_steps_that_differ_do_not_take_a_request_each(
    ranges: RangeServer, name: str, dtype: torch.dtype, nested: bool
) -> None:
    """As those of experts that are not always used. The checksums of zips tell steps of four bytes without reading."""
    folder = ranges.root / "bucket"
    folder.mkdir()
    weights = {f"{n}.weight": torch.zeros(256, 128) for n in range(20)}
    names = list(weights)
    slots = [{"step": torch.tensor(n, dtype=dtype), "exp_avg": torch.zeros(256, 128)} for n in range(20)]
    state = {n: {"inner": slots[n]} if nested else slots[n] for n in range(20)}
    group = {"lr": 0.1, "params": list(state), "param_names": names}
    torch.save({"model": weights, "optimizer": {"state": state, "param_groups": [group]}}, folder / "whole.pt")
    if name == "run.pt":
        (folder / "whole.pt").rename(folder / name)
    else:
        optimstate.convert(folder / "whole.pt", folder / name)
    near, far = (
        next(section for section in optimstate.inspect(place).sections if section.kind == "optimizer")
        for place in (folder / name, f"s3://bucket/{name}")
    )
    assert len(ranges.requests) <= {"run.pt": 2, "run.safetensors": 1, "run.dcp": 6}[name] + 3, ranges.requests
    assert sum(near.steps.values()) == 20
    assert near.unread_steps == 0
    assert sum(far.steps.values()) + far.unread_steps == 20
    assert far.steps.items() <= near.steps.items()
    if name == "run.pt" and dtype.itemsize == 4:
        assert far.steps == near.steps


def test_headers_of_zips_are_compared_by_their_directories(ranges: RangeServer, checkpoint: Path) -> None:
    served(ranges, checkpoint, "bucket/run.pt")
    assert optimstate.diff("s3://bucket/run.pt", checkpoint, headers=True).equal == 24
    assert len(ranges.requests) <= 4, ranges.requests


@pytest.mark.parametrize("size", [0, 3, 50_000])
def test_the_files_of_a_folder_are_asked_for_together(ranges: RangeServer, size: int) -> None:
    folder = ranges.root / "bucket" / "many"
    folder.mkdir(parents=True)
    for number in range(70):
        (folder / f"{number}.txt").write_bytes(b"x" * size)
    torch.save({"a.weight": torch.ones(2)}, folder / "run.pt")
    ranges.delay = 0.02
    for verb in (optimstate.inspect, optimstate.scan):
        ranges.forget()
        verb("s3://bucket/many")
        assert len(ranges.requests) <= 1 + 70 + 2, len(ranges.requests)
        assert ranges.most >= 8
    if size:  # of an empty one it is asked whether it stands for a folder
        ranges.faults["/bucket/many/7.txt"] = 403
        found = optimstate.scan("s3://bucket/many")
        assert (found.pickles, [line.partition(":")[0] for line in found.unreadable]) == (1, ["7.txt"])


def test_scanning_a_distributed_checkpoint_reads_the_ends_of_its_items(ranges: RangeServer) -> None:
    import torch.distributed.checkpoint as dcp

    folder = ranges.root / "bucket" / "run.dcp"
    folder.parent.mkdir()
    tree = {"model": {f"{n}.weight": torch.zeros(300, 500) for n in range(40)}, "epoch": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, checkpoint_id=str(folder))
    size = sum(file.stat().st_size for file in folder.iterdir())
    ranges.delay = 0.01
    for place in ("s3://bucket/run.dcp", "s3://bucket/run.dcp/__0_0.distcp"):
        ranges.forget()
        report = optimstate.scan(place)
        assert report.clean
        assert report.pickles >= 40
        assert ranges.sent < size // 20
        assert len(ranges.requests) < 60
        assert ranges.most >= 8
    assert optimstate.scan(folder).findings == optimstate.scan("s3://bucket/run.dcp").findings


def test_tensors_are_recognised_by_content_with_several_requests_at_once(ranges: RangeServer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"{n}.weight": torch.randn(200, 300) for n in range(40)}
    torch.save(weights, tmp_path / "old.pt")
    torch.save({f"layers.{name}": value for name, value in weights.items()}, tmp_path / "new.pt")
    old, new = (served(ranges, tmp_path / name, f"bucket/{name}").rpartition("/")[2] for name in ("old.pt", "new.pt"))
    ranges.delay = 0.02
    ranges.forget()
    found = optimstate.suggest(f"s3://bucket/{old}", f"s3://bucket/{new}")
    assert "layers.{" in found.plan
    assert ranges.most >= 4
    assert ranges.sent < 2.2 * (tmp_path / "old.pt").stat().st_size


def test_the_same_over_the_web(web: RangeServer) -> None:
    sparse_zip(web.root / "run.pt")
    (web.root / "shards").mkdir()
    sparse_shards(web.root / "shards", 5, 4)
    for name, most in {"run.pt": 4, "shards/model.safetensors.index.json": 5 + 3}.items():
        web.forget()
        optimstate.inspect(f"{web.address}/{name}")
        assert len(web.requests) <= most, web.requests


def test_every_verb_reads_from_a_store_what_it_reads_from_a_file(
    ranges: RangeServer, checkpoint: Path, tmp_path: Path
) -> None:
    served(ranges, checkpoint, "bucket/run.pt")
    url = "s3://bucket/run.pt"
    there = {"source": url, "path": url, "left": url, "right": url, "target": url, "destination": ""}
    here = {name: str(checkpoint) for name in there} | {"destination": ""}

    def fields(report: Any, names: dict[str, str]) -> Any:
        found = json.loads(report.to_json().replace(url, str(checkpoint)))
        return {key: value for key, value in found.items() if key not in names}

    plan = optimstate.Plan.from_options(rename=["{i:int}.{p}=layers.{i}.{p}"])
    names = list(torch.load(checkpoint)["model"])
    optimstate.remap(checkpoint, tmp_path / "near.pt", plan)
    for verb in (
        optimstate.inspect,
        optimstate.verify,
        optimstate.scan,
        lambda place: optimstate.diff(place, checkpoint),
        lambda place: optimstate.diff(place, checkpoint, headers=True),
        lambda place: optimstate.remap(place, None, plan, dry_run=True),
        lambda place: optimstate.surgery.check_plan(plan, place),
        lambda place: optimstate.name(place, None, names=names, dry_run=True),
        lambda place: optimstate.suggest(place, tmp_path / "near.pt"),
        lambda place: optimstate.suggest(tmp_path / "near.pt", place, headers=True),
    ):
        mine, theirs = fields(verb(url), there), fields(verb(checkpoint), here)
        mine.pop("checkpoint", None), theirs.pop("checkpoint", None)
        mine.pop("findings", None), theirs.pop("findings", None)
        assert mine == theirs
    optimstate.remap(url, tmp_path / "far.pt", plan)
    assert (tmp_path / "far.pt").read_bytes() == (tmp_path / "near.pt").read_bytes()


def test_progress_counts_requests_and_bytes(
    ranges: RangeServer, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    served(ranges, checkpoint, "bucket/run.pt")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(terminal, "PROGRESS_FROM", 0)
    for name, value in {"COLUMNS": "160", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with terminal.progress("remapping", located("s3://bucket/run.pt")) as advance:
        optimstate.convert("s3://bucket/run.pt", tmp_path / "new.safetensors", options=WriteOptions(progress=advance))
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\d+ requests, [\d.]+ MB down", said), said


def test_a_copy_reads_every_byte_once(web: RangeServer, checkpoint: Path, tmp_path: Path) -> None:
    url = served(web, checkpoint, "run.pt")
    optimstate.convert(url, tmp_path / "copy.safetensors", verify=False)
    size = checkpoint.stat().st_size
    assert size < web.sent < 1.05 * size + (1 << 20)
    assert (
        torch.load(checkpoint)["model"].keys()
        == optimstate.open_checkpoint(tmp_path / "copy.safetensors").tree["model"].keys()
    )


def test_processes_of_torchrun_share_what_is_in_a_store(ranges: RangeServer, checkpoint: Path, tmp_path: Path) -> None:
    optimstate.convert(checkpoint, tmp_path / "run.dcp")
    served(ranges, tmp_path / "run.dcp", "bucket/run.dcp")
    ranges.forget()
    arguments = ["remap", "s3://bucket/run.dcp", tmp_path / "far", "--rename", "0.{p}=first.{p}", "--copy"]
    done = together(2, arguments, OPTIMSTATE_PATIENCE="10")
    assert [code for code, _ in done] == [0, 0], done
    optimstate.remap(tmp_path / "run.dcp", tmp_path / "near", optimstate.Plan.from_options(rename=["0.{p}=first.{p}"]))
    assert {file.name: file.read_bytes() for file in (tmp_path / "far").iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "near").iterdir()
    }
    assert ranges.sent < 1.1 * checkpoint.stat().st_size


# --- one version ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_an_object_that_changes_while_it_is_read_is_an_error(
    ranges: RangeServer, checkpoint: Path, tmp_path: Path, scheme: str
) -> None:
    url = served(ranges, checkpoint, "bucket/run.pt")
    url = "s3://bucket/run.pt" if scheme == "s3" else url
    ranges.changes_after = 3
    with pytest.raises(CheckpointError, match="changed while it was read"):
        optimstate.remap(url, tmp_path / "new.pt", optimstate.Plan.from_options(rename=["0.{p}=first.{p}"]))
    assert list(tmp_path.iterdir()) == [ranges.root]


def test_without_an_etag_the_size_is_compared(web: RangeServer, tmp_path: Path, checkpoint: Path) -> None:
    url = served(web, checkpoint, "run.pt")
    web.faults["/run.pt"] = "no-etag"
    document = open_checkpoint(url)
    with (web.root / "run.pt").open("ab") as out:
        out.write(b"more")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        document.tree["model"]["0.weight"].tobytes()


# --- lies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("ignore-range", UnsupportedCheckpointError, "does not support ranges"),
        ("more", CheckpointError, "got more"),
        ("size", CheckpointError, "requested|changed|answers 416"),
        ("short", CheckpointError, "requested"),
        (403, CheckpointError, "access is denied"),
        (404, CheckpointNotFoundError, "no such file"),
        (500, CheckpointError, "answers 500"),
    ],
)
def test_a_server_that_does_wrong_is_an_error_of_one_line(
    web: RangeServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, error: type, message: str
) -> None:
    monkeypatch.setattr("optimstate.io.remote.web.time.sleep", lambda _: None)
    url = served(web, checkpoint, "run.pt")
    web.faults["/run.pt"] = fault
    with pytest.raises(error, match=message) as caught:
        optimstate.verify(url)
    assert "\n" not in caught.value.message
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignore-range", "does not support ranges"),
        ("more", "got 165536"),
        ("size", "another range than requested"),
        ("short", "requested"),
        (403, "access is denied"),
        (404, "no such file"),
        (400, "the store answers 400 Bad Request"),
        (301, "in another region"),
    ],
)
def test_a_store_that_does_wrong_is_an_error_of_one_line(
    ranges: RangeServer, checkpoint: Path, fault: Any, message: str
) -> None:
    served(ranges, checkpoint, "bucket/run.pt")
    ranges.faults["/bucket/run.pt"] = fault
    with pytest.raises(CheckpointError, match=message) as caught:
        optimstate.verify("s3://bucket/run.pt")
    assert "\n" not in caught.value.message
    assert not any(word in str(caught.value) for word in ("secret", "Debug", "Generic", SECRET))


def test_a_server_that_is_busy_is_asked_again(
    web: RangeServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimstate.io.remote.web.time.sleep", lambda _: None)
    url = served(web, checkpoint, "run.pt")
    web.fails["/run.pt"] = 2
    assert optimstate.inspect(url).tensors == 18 + 6
    web.fails["/run.pt"] = 20
    with pytest.raises(CheckpointError, match="answers 503"):
        optimstate.inspect(url)
    assert web.fails["/run.pt"] >= 20 - 2 * 4


# --- redirects --------------------------------------------------------------------------------------------------------


def test_redirects_are_followed_on_this_machine_and_to_no_other_scheme(
    web: RangeServer, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with serving(other) as second:
        target = served(second, checkpoint, "kept.pt")
        web.faults["/run.pt"] = f"{target}?signature={SECRET}"
        found = optimstate.inspect(f"{web.address}/run.pt")
        assert found.path == f"{web.address}/run.pt"
        assert SECRET not in found.to_json()
        assert not any(authorization for *_, authorization in second.requests)
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a", "http://example.org/run.pt"):
        web.faults["/run.pt"] = target
        with pytest.raises(CheckpointError, match="not followed"):
            optimstate.inspect(f"{web.address}/run.pt")


def test_a_redirect_into_a_private_network_is_refused(web: RangeServer, checkpoint: Path) -> None:
    """The first address is taken for one of the world; where the connection arrives is what counts."""
    from optimstate.io.remote import web as module

    served(web, checkpoint, "kept.pt")
    web.faults["/run.pt"] = f"{web.address}/kept.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_is_private", lambda host: False)
        with pytest.raises(CheckpointError, match="private network"):
            optimstate.inspect(f"{web.address}/run.pt")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"s3://key:{SECRET}@bucket/run.pt", "the name contains credentials"),
        (f"https://user:{SECRET}@example.org/run.pt", "the name contains credentials"),
        (f"s3://bucket/run.pt?X-Amz-Signature={SECRET}", "s3://BUCKET/NAME"),
        ("http://example.org/run.pt", "not encrypted"),
        ("sftp://example.org/run.pt", "not a known kind of store"),
        ("hf://owner", "hf://OWNER/NAME"),
    ],
)
def test_names_with_credentials_or_of_no_store_are_refused(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        optimstate.inspect(url)
    assert SECRET not in str(caught.value)


def test_a_signature_is_sent_and_never_told(web: RangeServer, checkpoint: Path, tmp_path: Path) -> None:
    url = f"{served(web, checkpoint, 'run.pt')}?token={SECRET}"
    plan = optimstate.Plan.from_options(rename=["0.{p}=first.{p}"])
    reports = [optimstate.inspect(url), optimstate.scan(url), optimstate.remap(url, tmp_path / "new.pt", plan)]
    reports.append(optimstate.verify(url, numbers=False))
    assert all(path.endswith(f"?token={SECRET}") for _, path, _, _ in web.requests)
    assert all(SECRET not in report.to_json() + str(report) for report in reports)
    assert SECRET.encode() not in (tmp_path / "new.pt").read_bytes()


def test_missing_objects_and_buckets_are_one_line(bucket: Any) -> None:
    for url, what in (
        (f"{bucket.url}/none.pt", "no such file"),
        (f"{bucket.url}/none", "no such file"),
        ("s3://no-such-bucket-here/none.pt", "no such bucket"),
    ):
        with pytest.raises(CheckpointError, match=what) as caught:
            optimstate.inspect(url)
        assert "\n" not in caught.value.message
        assert SECRET not in str(caught.value)
