"""`python -m tests.bench [--quick] [--full] [--only NAME...]`: one table a bench, targets beside what was measured."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import sys

BENCHES = ("cli", "optim", "plan", "hooks", "growth")


def main(arguments: list[str] | None = None) -> int:
    """Run the benches that were asked for; 1 if a measured command failed, never for a missed target."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair of runs of everything")
    parser.add_argument("--full", action="store_true", help="also the 4.4 GB checkpoint (needs 15 GB of disk)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="cli, optim, plan, hooks, growth, or a part: cli.inspect"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only if name.split(".")[0] not in BENCHES]
    if unknown:
        parser.error(f"no such bench: {', '.join(unknown)} (there are {', '.join(BENCHES)})")

    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, load {load}")
    failed = False
    for bench in BENCHES:
        named = [name for name in options.only if name.split(".")[0] == bench]
        parts = [part for name in named if (part := name.partition(".")[2])]
        if options.only and not named:
            continue
        if importlib.util.find_spec(f"tests.bench.{bench}") is None:
            print(f"\n{bench}: not in this checkout, skipped")
            continue
        module = importlib.import_module(f"tests.bench.{bench}")
        if bench == "cli":
            failed |= not module.main(options.quick, full=options.full, only=parts)
        elif bench == "optim":
            module.main(options.quick, only=parts)
        else:
            module.main(options.quick)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
