"""A configuration in the environment that cannot be used is named by its variable, and its values are not printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import optimstate
from optimstate.errors import OptimStateError
from optimstate.io.remote.objects import object_store
from tests.remote.conftest import SECRET

pytest.importorskip("obstore")
pytest.importorskip("botocore")

NOWHERE = "http://127.0.0.1:9"
GOOGLE, ACCOUNT = "GOOGLE_SERVICE_ACCOUNT_KEY", {"AZURE_STORAGE_ACCOUNT_NAME": "account"}


@pytest.mark.parametrize("verb", ["read", "write"])
@pytest.mark.parametrize(
    ("scheme", "environment"),
    [
        ("s3", {"AWS_SESSION_TOKEN": f"{SECRET}\n"}),
        ("s3", {"AWS_SESSION_TOKEN": f"{SECRET}\r"}),
        ("s3", {"AWS_ACCESS_KEY_ID": f"{SECRET}\u00e9"}),
        ("s3", {"AWS_SECRET_ACCESS_KEY": ""}),
        ("s3", {"AWS_REGION": f"{SECRET} region"}),
        ("s3", {"AWS_SKIP_SIGNATURE": SECRET}),
        ("s3", {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": SECRET}),
        ("gs", {GOOGLE: f'"{SECRET}"'}),
        ("gs", {GOOGLE: SECRET}),
        ("gs", {GOOGLE: f'{{"private_key": "{SECRET}", "private_key_id": "{SECRET}", "client_email": "{SECRET}"}}'}),
        ("gs", {GOOGLE: f'{{"{SECRET}'}),
        ("az", {**ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": f"{SECRET}==="}),
        ("az", {**ACCOUNT, "AZURE_STORAGE_SAS_TOKEN": f"{SECRET}%zz"}),
        ("az", {**ACCOUNT, "AZURE_STORAGE_USE_EMULATOR": SECRET}),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": f"{SECRET} account/"}),
    ],
)
def test_no_value_of_the_environment_is_printed(
    scheme: str, environment: dict[str, str], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AZURE_STORAGE_ENDPOINT"):
        monkeypatch.setenv(name, NOWHERE)
    if "AZURE_STORAGE_USE_EMULATOR" in environment or " account/" in environment.get("AZURE_STORAGE_ACCOUNT_NAME", ""):
        monkeypatch.delenv("AZURE_STORAGE_ENDPOINT")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    object_store.cache_clear()
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "a.pt")
    there = f"{scheme}://bucket/a.pt"
    ask: dict[str, Callable[[], object]] = {
        "read": lambda: optimstate.inspect(there),
        "write": lambda: optimstate.convert(tmp_path / "a.pt", there, force=True),
    }
    with pytest.raises(OptimStateError) as caught:
        ask[verb]()
    assert SECRET not in str(caught.value)
    assert SECRET[:6] not in str(caught.value)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("token", [f"hf_{SECRET}\nx", f"hf_{SECRET}\u00e9"])
def test_a_token_of_the_hub_that_cannot_be_sent(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    with pytest.raises(OptimStateError, match="the value of HF_TOKEN has a character") as caught:
        optimstate.inspect("hf://owner/name/a.pt")
    assert SECRET not in str(caught.value)
