"""Every class compiled by every backend, as each implementation, beside torch's: `python -m tests.optim.compiled`.

Prints a line where numbers, state or graph breaks differ, and exits 1 if any does. The suite has a sample of it.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch

import optimstate.optim as optim
from tests import cases, oracle
from tests.optim.test_compile import combinations, compiled

CLOSE = {"inductor"}  # what it generates may round otherwise


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.optim.compiled", description=__doc__)
    parser.add_argument("backends", nargs="*", default=["eager", "aot_eager", "inductor"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong = count = 0
    for backend in given.backends:
        for name, implementation in combinations():
            flags = dict(cases.FLAGS[implementation])
            (expected, torchs_breaks), (found, breaks) = (
                compiled(library, name, flags, backend) for library in (torch.optim, optim)
            )
            told = oracle.differences(list(expected), list(found))
            if told and backend in CLOSE:
                told = [f"bits differ: {told[0]}"] if close(expected, found) else told
            exact = not told or told[0].startswith("bits differ")
            count += 1
            wrong += not exact or breaks > torchs_breaks
            if told or breaks > torchs_breaks:
                print(
                    f"{backend} {name} {implementation}: {breaks} breaks, torch {torchs_breaks}; {told[:3]}", flush=True
                )
    print(f"{count} compared, {wrong} wrong")
    return int(wrong > 0)


def close(expected: object, found: object) -> bool:
    try:
        torch.testing.assert_close(found, expected, equal_nan=True)
    except AssertionError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
