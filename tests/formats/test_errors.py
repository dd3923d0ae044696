"""What is said of files that cannot be read: each place once, and nothing of what stands for objects inside."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import pytest
import torch

from optimstate.errors import CheckpointError
from optimstate.formats.registry import open_checkpoint
from tests import corpus

OWN = re.compile(r"\b(Opaque|GlobalName|LazyTensor|InertUnpickler|AttributedTensor)\b|__\w+__\(\)")


def legacy() -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.ones(5), "b": torch.ones(3)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def damaged() -> dict[str, bytes]:
    whole = {"old.pth": legacy(), "plain.pkl": pickle.dumps({"a": [1, 2, 3], "b": "text"}, 2)}
    whole["new.pt"] = corpus.case("torch/adam_named_wd").entry.read_bytes()
    found = {f"{share}-{name}": data[: len(data) * share // 8] for name, data in whole.items() for share in range(1, 8)}
    found["twice.pkl"] = b"\x80\x02cjoblib.numpy_pickle\nNumpyArrayWrapper\n)R)R."
    found["nested.pkl"] = pickle.dumps({"w": 1}, 2)[:-1] + b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x03abc\x85R."
    return found


@pytest.mark.parametrize("name", damaged())
def test_each_place_is_named_once_and_in_words_about_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(damaged()[name])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = caught.value.message.removeprefix(str(path))
    assert str(path) not in message
    inner = (part.strip() for found in re.findall(r"\(([^()]*)\)", message) for part in found.split(","))
    places = [part for part in inner if re.search(r"\d", part)]
    assert len(places) == len(set(places)), message
    assert not OWN.search(message), message
    assert caught.value.reason in message


def test_an_error_within_a_part_is_told_of_it_once() -> None:
    error = CheckpointError("is cut off", place="byte 7")
    outer = error.within(path="a.pt", place="data.pkl, byte 7").within(part="tensor 'w'").within(path="folder")
    assert outer.message == "folder: tensor 'w': is cut off (data.pkl, byte 7)"
    assert isinstance(outer, CheckpointError)
