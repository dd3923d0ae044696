"""What stores and servers answer is told in one line of plain words, without what they said; versions without ETags."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optimstate
from optimstate.errors import CheckpointError, OptimStateError, UnsupportedCheckpointError, UsageError
from tests.remote.between import Answer, Between, error
from tests.remote.conftest import SECRET, Bucket
from tests.remote.server import RangeServer
from tests.remote.test_reading import served

pytest.importorskip("urllib3")
pytest.importorskip("obstore")

LIBRARY = re.compile(
    r"Generic|Error |error:|whilst|Event|Header|Debug|HTTP error|reqwest|botocore|exception", re.IGNORECASE
)
"""Words of libraries, none of which are the user's business."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.pt"
    torch.save({"a.weight": torch.ones(3, 4)}, path)
    return path


def refusal(verb: str, bucket: Bucket, small: Path) -> OptimStateError:
    """The error of reading an object, of listing a folder, or of writing an object."""
    ask: dict[str, Callable[[], object]] = {
        "read": lambda: optimstate.inspect(f"{bucket.url}/run.pt"),
        "list": lambda: optimstate.inspect(f"{bucket.url}/folder"),
        "write": lambda: optimstate.convert(small, f"{bucket.url}/new.pt", force=True),
    }
    with pytest.raises(OptimStateError) as caught:
        ask[verb]()
    assert "\n" not in caught.value.message
    assert SECRET not in str(caught.value)
    assert not LIBRARY.search(str(caught.value)), str(caught.value)
    return caught.value


@pytest.mark.parametrize("verb", ["read", "list", "write"])
@pytest.mark.parametrize(
    ("status", "code", "message", "hint"),
    [
        ("403 Forbidden", "AccessDenied", "access is denied", "credentials"),
        ("403 Forbidden", "InvalidAccessKeyId", "access is denied", "credentials"),
        ("403 Forbidden", "SignatureDoesNotMatch", "access is denied", "credentials"),
        ("403 Forbidden", "RequestTimeTooSkewed", "the clock of this machine is wrong", "Set it"),
        ("400 Bad Request", "ExpiredToken", "the credentials have expired", "Get new ones"),
        ("400 Bad Request", "InvalidToken", "the session token is not valid", "AWS_SESSION_TOKEN"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "does not accept the signature", "AWS_REGION"),
        ("400 Bad Request", "Nonsense", "answers (400|Nonsense)", ""),
    ],
)
def test_a_refusal_says_what_it_means_and_what_helps(
    between: Between, bucket: Bucket, small: Path, status: str, code: str, message: str, hint: str, verb: str
) -> None:
    between.rule = lambda _: error(status, code, SECRET)
    found = refusal(verb, bucket, small)
    assert re.search(message, found.message)
    assert hint in found.hint
    if verb == "list" and message == "access is denied":
        assert "Listing a folder needs a permission of its own" in found.hint


@pytest.mark.parametrize("body", [b"", b"<ListBucketResult><Contents><Key>"])
def test_a_list_that_cannot_be_read(between: Between, bucket: Bucket, small: Path, body: bytes) -> None:
    between.rule = lambda asked: ("200 OK", body) if "list-type" in asked else None
    assert "list of objects cannot be read" in refusal("list", bucket, small).message


def test_a_store_without_conditions_is_named_as_that(between: Between, bucket: Bucket, small: Path) -> None:
    def rule(asked: str) -> Answer | None:
        return error("501 Not Implemented", "NotImplemented") if asked.startswith("PUT") else None

    between.rule = rule
    with pytest.raises(OptimStateError) as caught:
        optimstate.convert(small, f"{bucket.url}/new.pt")
    assert "--force" in caught.value.hint
    assert "--force" not in refusal("write", bucket, small).hint


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("fault", ["no-size", "no-range", "chunked", "packed", "cut", "short", "more", "ignore-range"])
def test_an_answer_that_is_not_the_range_is_refused_in_plain_words(
    ranges: RangeServer, checkpoint: Path, scheme: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimstate.io.remote.web.time.sleep", lambda _: None)
    url = served(ranges, checkpoint, "bucket/run.pt")
    ranges.faults["/bucket/run.pt"] = fault
    if (fault, scheme) in (("chunked", "http"), ("packed", "s3")):  # the length is not needed; objects come as stored
        optimstate.inspect("s3://bucket/run.pt" if scheme == "s3" else url)
        return
    with pytest.raises(CheckpointError) as caught:
        optimstate.verify("s3://bucket/run.pt" if scheme == "s3" else url)
    assert "\n" not in caught.value.message
    assert not LIBRARY.search(str(caught.value)), str(caught.value)
    if fault == "packed":
        assert isinstance(caught.value, UnsupportedCheckpointError)
        assert "compressed" in str(caught.value)
    if fault == "cut":
        assert "the connection broke" in str(caught.value)


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("fault", ["weak", "dated"])
@pytest.mark.parametrize("replaced", [False, True])
def test_without_a_strong_etag_versions_are_compared(
    ranges: RangeServer, checkpoint: Path, tmp_path: Path, scheme: str, fault: str, replaced: bool
) -> None:
    url = served(ranges, checkpoint, "bucket/run.pt")
    ranges.faults["/bucket/run.pt"] = fault
    document = optimstate.open_checkpoint("s3://bucket/run.pt" if scheme == "s3" else url)
    file = ranges.root / "bucket" / "run.pt"
    if replaced:
        file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
        os.utime(file, (2_000_000_000, 2_000_000_000))
        with pytest.raises(CheckpointError, match="changed while it was read"):
            document.tree["model"]["0.weight"].tobytes()
    else:
        expected = torch.load(checkpoint)["model"]["0.weight"].numpy().tobytes()
        assert document.tree["model"]["0.weight"].tobytes() == expected


@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("name", ["empty.pt", "empty"])
def test_an_empty_object_is_called_that(bucket: Bucket, web: RangeServer, scheme: str, name: str) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key=name, Body=b"")
    (web.root / name).touch()
    with pytest.raises(CheckpointError, match="an empty file"):
        optimstate.inspect(f"{bucket.url}/{name}" if scheme == "s3" else f"{web.address}/{name}")


@pytest.mark.parametrize(
    "endpoint",
    ["ftp://127.0.0.1", "http://[::1", f"http://127.0.0.1/?token={SECRET}", "http://127.0.0.1:99999", "http://"],
)
@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_an_endpoint_that_is_no_address(endpoint: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
    monkeypatch.setenv(names[scheme], endpoint)
    with pytest.raises(CheckpointError, match=f"the value of {names[scheme]} is not the address of a server") as caught:
        optimstate.inspect(f"{scheme}://bucket/a.pt")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://b[b/x.pt",
        "http://[::1/x.pt",
        "https://127.0.0.1:99999/x.pt",
        "https://127.0.0.1:x/x.pt",
        "https://127.0.0.1:0/x.pt",
        "https://127.0.0.1/a#b.pt",
        "https://127.0.0.1/a.pt#",
        "https://127.0.0.1/a\tb.pt",
        "s3://bucket/a\tb.pt",
        "gs://bucket/a\x7fb.pt",
    ],
)
def test_a_name_that_cannot_be_meant_is_wrong_usage(url: str) -> None:
    for verb in (optimstate.inspect, optimstate.open_checkpoint, optimstate.scan):
        with pytest.raises(UsageError) as caught:
            verb(url)
        assert not LIBRARY.search(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("place", ["s3://bucket/run.pt", "https://server/run.pt", "hf://owner/name"])
def test_a_path_that_has_lost_a_slash_is_recognised(place: str, small: Path) -> None:
    for given in (Path(place), str(Path(place))):
        for verb in (optimstate.inspect, optimstate.scan, lambda name: optimstate.convert(small, name, to="torch")):
            with pytest.raises(UsageError, match="two slashes after the colon"):
                verb(given)


def test_a_plan_in_a_store_is_refused_with_what_helps(small: Path) -> None:
    with pytest.raises(OptimStateError) as caught:
        optimstate.remap(small, small.with_name("new.pt"), "s3://bucket/plan.toml")
    assert "download it first" in caught.value.hint


def test_servers_and_the_hub_are_refused_as_destinations_at_once(web: RangeServer, small: Path, tmp_path: Path) -> None:
    for force in (False, True):
        with pytest.raises(OptimStateError, match="read, but not written"):
            optimstate.convert(small, f"{web.address}/new.pt", force=force)
    assert web.requests == []


def test_names_of_shards_are_quoted_in_addresses(web: RangeServer, small: Path, tmp_path: Path) -> None:
    """An index names files, and no addresses: `#` and `?` in them are not those of an address."""
    optimstate.convert(small, tmp_path / "small.safetensors")
    for name in ("a b.safetensors", "a#b.safetensors", "a?b.safetensors", "é;+&.safetensors"):
        (web.root / name).write_bytes((tmp_path / "small.safetensors").read_bytes())
        index: Any = {"metadata": {}, "weight_map": {"a.weight": name}}
        (web.root / "model.safetensors.index.json").write_text(json.dumps(index))
        assert optimstate.inspect(f"{web.address}/model.safetensors.index.json").tensors == 1
