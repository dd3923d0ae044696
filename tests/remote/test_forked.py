"""A process that was forked from one that has used a store reads from web servers, and is refused by others at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.remote.server import RangeServer
from tests.remote.test_reading import served

SCRIPT = """
import os, sys, warnings
warnings.simplefilter("ignore")
import optimstate
from optimstate.errors import CheckpointError

before, inside = sys.argv[1:]
document = optimstate.open_checkpoint(before)
weight = document.tree["model"]["0.weight"]
reader, writer = os.pipe()
if not os.fork():
    for read in (lambda: optimstate.inspect(inside).tensors, lambda: len(weight.tobytes())):
        try:
            said = str(read())
        except CheckpointError as error:
            said = error.message
        os.write(writer, (said + chr(10)).encode())
    os._exit(0)
os.close(writer)
os.wait()
print(os.read(reader, 10_000).decode(), optimstate.inspect(before).tensors)
"""


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_forked_process_reads_or_is_refused(ranges: RangeServer, checkpoint: Path, scheme: str) -> None:
    url = served(ranges, checkpoint, "bucket/run.pt")
    url = "s3://bucket/run.pt" if scheme == "s3" else url
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, url, url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    if scheme == "http":
        assert (first, second) == ("24", str(768 * 768 * 4))
    else:
        assert "forked" in first
        assert "forked" in second
    assert last.strip() == "24"
